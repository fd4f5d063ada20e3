"""The table of all model families."""

from lora_jax.models import bert, gemma, gpt2, granite, llama, mistral, qwen

FAMILIES = {
    family.architecture: family
    for module in (llama, mistral, qwen, gemma, granite, gpt2, bert)
    for family in module.FAMILIES
}
SUPPORTED = tuple(sorted(FAMILIES))
"""Architectures of Hugging Face folders that are read, as `config.json` names them."""
