"""Weights in files and in memory: which files they are in, how they are read and written, whether they are sound."""
