"""Hugging Face names and parameter trees: what `peft`, `loralib` and the command line know of both.

- `tensors`: which part of which leaf each tensor of a Hugging Face model is.
- `tied`: the names of a tree whose output head has a leaf of its own.
- `trees`: a parameter tree as tables by path, and back.
- `factors`: a node as the factors of single modules, and back.
- `messages`: lists of faults and strangers' values, in one line.
"""
