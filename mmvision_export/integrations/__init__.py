"""The encoder inside other people's models and servers.

`image_embedder` is the one call below the servers; each server has its module.
"""
