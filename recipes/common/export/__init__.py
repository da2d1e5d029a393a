"""Checkpoints for other engines."""
