"""Checkpoints on disk: opened, described, and written."""
