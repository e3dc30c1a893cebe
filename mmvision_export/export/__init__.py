"""From an encoder in PyTorch to a model directory."""
