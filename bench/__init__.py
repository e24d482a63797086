"""Benchmarks: programs run as `python -m bench.NAME [--json]`, never timed tests."""
