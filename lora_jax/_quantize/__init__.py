"""Kernels in few bits: `quantize` puts a `Quantized` node in the place of each, `dequantize` takes it out."""
