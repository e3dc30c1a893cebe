"""Running a model.

`VisionEncoder`, and a backend for each runtime. Needs numpy, pillow and the backend only.
"""
