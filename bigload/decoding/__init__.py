"""Decode steps captured in CUDA graphs: a step of generation waits for the GPU, not for Python."""
