"""Training: batches, state, loop, checkpoints and costs."""
