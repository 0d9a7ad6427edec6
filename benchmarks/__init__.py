"""Measurements of speed, compile time and memory; run them as ``python -m benchmarks.NAME``."""
