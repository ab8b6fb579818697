"""Scorers: parameters in, scores out; higher = keep, always."""

from sparsesoup.methods.scores.weight import magnitude, random_scores

__all__ = ["magnitude", "random_scores"]
