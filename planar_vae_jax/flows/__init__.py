"""Planar flows: the map, its inverse, and densities."""
