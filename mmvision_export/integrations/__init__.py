"""`VisionEncoder` inside other people's models."""
