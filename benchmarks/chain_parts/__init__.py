"""Parts of the benchmarks `chain` and `chain-training`."""
