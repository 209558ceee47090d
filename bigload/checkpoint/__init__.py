"""Checkpoints on disk: how they are opened, described and written."""
