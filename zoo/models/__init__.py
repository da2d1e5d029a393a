"""transformers classes of compressed checkpoints, one file a family."""
