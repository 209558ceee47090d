"""The quantized formats, and bitsandbytes' kernels and layers; forwards that are correct on the CPU."""
