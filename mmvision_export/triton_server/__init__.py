"""Triton Inference Server: a model repository of a model directory, and the model in it.

`repository` writes the repository, `config` its `config.pbtxt` files. `python_model` is what the server
runs, and `answers` packs requests of different sizes into calls of the encoder. This has nothing to do
with the language Triton, in which the plugins' kernels are written.
"""
