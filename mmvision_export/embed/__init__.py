"""Embeddings of very many images, as a table: images in, Parquet out, in parts that survive a kill.

The stages, in order: `listing` (what is to be done), `decoding` (pictures), `packing` (embeddings),
`output` (a part of the table); `one_process` and `on_ray` drive them.
"""
