"""What trains: batches, the state, the loop, checkpoints and costs."""
