"""What `lora-jax train` does when nothing is given: a small model and its task, both in the package, offline.

Only the command line imports this; the library knows nothing of it.
"""
