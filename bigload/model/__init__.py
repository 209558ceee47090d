"""Reads a model's structure: modules, tensors, layers to quantize, and what transformers declares of it."""
