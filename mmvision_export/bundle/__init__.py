"""A model, the code that runs it, and the proof that it works there, in one archive."""
