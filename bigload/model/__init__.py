"""What a model is made of: its modules and tensors, its layers, and what transformers says of it."""
