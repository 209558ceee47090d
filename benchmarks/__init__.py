"""What loading costs, measured against the peers and the machine's limits: docs/benchmarks.md."""
