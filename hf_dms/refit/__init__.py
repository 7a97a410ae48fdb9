"""Least squares on the cut model's weights."""
