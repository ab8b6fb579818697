"""Tasks: columns, batches and metrics of text, questions, images and zero-shot."""
