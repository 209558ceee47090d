"""This machine: its devices, free memory and bandwidth, and how memory is allocated and pinned."""
