"""The demo that `lora-jax train` runs without arguments: a small model and its task, both in the package, offline.

Only the command line imports this package.
"""
