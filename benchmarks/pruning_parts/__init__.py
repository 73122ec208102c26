"""What the benchmarks `erasure` and `sparsify` share: networks with branches, and the peer."""
