"""Checkpoints and datasets: the only package that imports transformers and datasets."""
