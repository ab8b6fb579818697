"""Pruning inside training loops that are not ours: any loop, accelerate, the Trainer."""
