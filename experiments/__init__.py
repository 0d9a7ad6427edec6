"""Command-line experiments; run them as ``python -m experiments.NAME``."""
