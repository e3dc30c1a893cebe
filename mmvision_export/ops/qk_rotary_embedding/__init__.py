"""Partial rotary position embedding of q and k."""
