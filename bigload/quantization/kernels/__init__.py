"""Kernels of bigload's own, in Triton."""
