"""Executes a Plan: weights are read, quantized and put into the model."""
