"""What this machine has: devices, free memory, bandwidth, memory that is pinned or allocated."""
