"""What a user reads: terminal, page, model card."""
