"""Figures of a trained model on a data set."""
