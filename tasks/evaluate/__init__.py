"""Measure the five criteria of the base, of a candidate, or of the finished model."""
