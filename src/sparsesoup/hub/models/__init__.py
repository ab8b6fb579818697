"""Checkpoints: what loads, what of it can be pruned, what is saved."""
