"""Models from Hugging Face folders: pure functions on plain trees of weights, in Flax Linen.

A `Model` has `apply`, `params` and `names`, which the rest of the library uses. Nothing here depends on LoRA.

    model = models.load("path/to/folder")
    logits = model.apply(model.params, input_ids)
"""

from lora_jax._extras import require

require(__name__, hf=("flax", "huggingface_hub", "safetensors", "transformers"))

from lora_jax.models._axis_rules import RULES as RULES
from lora_jax.models._families import SUPPORTED as SUPPORTED
from lora_jax.models._family import Weight as Weight
from lora_jax.models._family import flatten as flatten
from lora_jax.models._family import unflatten as unflatten
from lora_jax.models._folder import find as find
from lora_jax.models._heads import label_names as label_names
from lora_jax.models._load import ExecutionOptions as ExecutionOptions
from lora_jax.models._load import init as init
from lora_jax.models._load import load as load
from lora_jax.models._load import load_abstract as load_abstract
from lora_jax.models._load import load_streamed as load_streamed
from lora_jax.models._load import quant_method as quant_method
from lora_jax.models._model import Model as Model
from lora_jax.models._model import shardings as shardings
from lora_jax.models._new_tokens import NewTokens as NewTokens
from lora_jax.models._new_tokens import add_tokens as add_tokens
from lora_jax.models._new_tokens import resize_token_embeddings as resize_token_embeddings
from lora_jax.models._save import check_free as check_free
from lora_jax.models._save import save as save
from lora_jax.models._tokenizer import beside as tokenizer_in
from lora_jax.models._tokenizer import copy as copy_tokenizer
from lora_jax.models._tokenizer import digest as tokenizer_digest
from lora_jax.models._tokenizer import read_template as read_template
from lora_jax.models._tokenizer import remove as remove_tokenizer
from lora_jax.models._tokenizer import save as save_tokenizer
from lora_jax.models._untied import untied as untied
from lora_jax.models._weights import Streamed as Streamed

__all__ = [
    "RULES",
    "SUPPORTED",
    "ExecutionOptions",
    "Model",
    "NewTokens",
    "Streamed",
    "Weight",
    "add_tokens",
    "check_free",
    "copy_tokenizer",
    "find",
    "flatten",
    "init",
    "label_names",
    "load",
    "load_abstract",
    "load_streamed",
    "quant_method",
    "read_template",
    "remove_tokenizer",
    "resize_token_embeddings",
    "save",
    "save_tokenizer",
    "shardings",
    "tokenizer_digest",
    "tokenizer_in",
    "unflatten",
    "untied",
]
