"""Adapters in PEFT's format, loaded and saved: the folders that PEFT, transformers and vLLM read.

    params = lora_jax.peft.load("adapter", model.params, names=model.names)
    lora_jax.peft.save("adapter", params, names=model.names)

A model of your own has no `names`: `lora_jax.peft.names(params)` makes them from the paths of its leaves.

Only LoRA is read (`peft_type` "LORA"), strictly: every field of the config is honoured or refused by name, and tensors
that are missing, unexpected, misshapen or not finite are reported together. No pickle is ever read.
"""

from lora_jax._extras import require

require(__name__, hf=("regex", "safetensors"))

from lora_jax.peft._load import load as load
from lora_jax.peft._own_model_names import names as names
from lora_jax.peft._save import save as save
from lora_jax.peft._updates import updates as updates
