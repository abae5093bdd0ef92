"""What proves the project: metrics, baselines, the attribute reader and the benchmarks."""
