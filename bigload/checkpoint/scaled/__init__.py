"""Weights that other methods stored as small numbers with scales, and whose values can be computed."""
