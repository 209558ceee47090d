"""A Plan carried out: weights are read, quantized, and put into the model."""
