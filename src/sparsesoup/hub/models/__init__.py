"""Checkpoints: loading, prunable parameters, saving."""
