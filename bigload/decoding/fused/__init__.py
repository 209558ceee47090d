"""What a captured step computes with fewer kernels than the model's code launches, to the same bits."""
