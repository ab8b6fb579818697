"""Where checkpoints and datasets come from: the only package that imports transformers and datasets."""
