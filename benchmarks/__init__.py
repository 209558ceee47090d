"""What loading costs, measured against the peers: `python -m benchmarks --help`."""
