"""Training as a pure function."""
