"""Passes over ONNX graphs, and writing them. Needs onnx, not torch."""
