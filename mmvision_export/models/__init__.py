"""Encoders in PyTorch, where their weights come from, and how images become their patches."""
