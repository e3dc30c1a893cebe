"""Attention inside each segment of a packed sequence."""
