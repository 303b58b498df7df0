"""Benchmarks as declared data: one file a benchmark, one row a task."""
