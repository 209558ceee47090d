"""Bytes of files on their way: what to read, the reads, the ring that they pass through, the copies to devices."""
