"""Conversion between Hugging Face names and parameter trees, for `peft`, `loralib` and the command line.

- `tensors`: the leaf, and the part of it, that each tensor of a Hugging Face model is.
- `tied`: the names of a tree whose output head has a leaf of its own.
- `trees`: a parameter tree as tables by path, and back.
- `factors`: a node as the factors of single modules, and back.
- `messages`: lists of faults and untrusted values, in one line.
"""
