"""Measurements that anyone can run again; each writes one JSON line a run to benchmarks/results/."""
