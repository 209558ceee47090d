"""From a model, a checkpoint and a request to the Plan: every decision of a load, before a byte is read."""
