"""Models that several processes load, hold and run together, on torch.distributed."""
