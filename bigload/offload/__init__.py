"""Weights that rest off the device that computes, and are brought there as the model runs."""
