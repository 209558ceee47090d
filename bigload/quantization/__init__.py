"""The quantized formats, bitsandbytes' kernels and layers, and forwards that are right on the CPU."""
