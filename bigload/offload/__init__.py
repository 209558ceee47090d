"""Offloaded weights: stored in host memory or files, and copied to the device while the model runs."""
