"""LoRA for JAX as a pure parameter-tree transform."""
