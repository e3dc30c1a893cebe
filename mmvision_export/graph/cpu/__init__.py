"""The CPU flavour of the graph, `model.cpu.onnx`: the same function, laid out for ONNX Runtime.

It shares the portable graph's weight file.

The portable graph is what any runtime can take. Three things make it slow on a CPU, and are
different here:

* Its attention is masked: work and memory grow with the square of the batch. Here `VarlenAttention`
  is defined by a `Loop` over the images, in which each attends to itself alone, in
  `com.microsoft::MultiHeadAttention`, a flash kernel whose memory is linear.
* Each operator passes over the whole batch before the next begins. At 4096 patches the inner
  activations of one MLP are 84 MB, more than any cache holds. Here everything between one layer's
  attention and the next layer's runs as a `Scan` over blocks of at most `BLOCK_PATCHES` patches,
  whose activations stay in the cache and are never all there at once.
* Its rotation is a dozen elementwise operators. Here it is one, `com.microsoft::RotaryEmbedding`.

The products and attention are operators of ours, which carry their definition in ONNX Runtime's as
functions, so that its kernels or ours can run them.

Blocks are of equal size, as Scan needs, so that the batch is padded at its end by less than an
image token a block. The padding is in no image and is cut off again.
"""
