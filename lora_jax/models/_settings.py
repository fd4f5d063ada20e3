"""Reading `config.json`, and checking the range of each setting that determines sizes before it is used.

transformers creates lists as long as the numbers in a configuration, and accepts numbers that no model has: a billion
layers would take gigabytes before the first error. Here every such field has a range, and errors name file and field.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._untrusted import git_lfs_pointer, not_a_file, read_json

CONFIG = "config.json"
MOST_BYTES = 4 * 2**20  # size of config.json: the largest known ones have names of 20,000 labels, in 1 MB
MOST_SETTINGS = 1000
MOST_PARAMETERS = 10**15
DTYPES = ("float32", "bfloat16", "float16", "float64")

_INT32 = 2**31 - 1
# Whole numbers: the least and the most. transformers checks whether null is allowed.
_WHOLE = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "sliding_window"), (1, _INT32)),
    **dict.fromkeys(("hidden_size", "n_embd", "type_vocab_size"), (1, 2**20)),
    **dict.fromkeys(("intermediate_size", "n_inner", "moe_intermediate_size"), (1, 2**24)),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 2**14)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), (1, 2**16)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), (1, 2**16)),
    "num_labels": (1, 2**20),
    "max_window_layers": (0, _INT32),
    "pad_token_id": (-1, _INT32),
}
# Numbers: the lower bound, whether the bound itself is allowed, and the upper bound.
_REAL = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), (0, True, 1e3)),
    "initializer_range": (0, True, 1e3),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), (0, False, 1e9)),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "logits_scaling"), (0, False, 1e9)),
    "residual_multiplier": (-1e9, True, 1e9),
    "rope_theta": (0, False, 1e30),
    "partial_rotary_factor": (0, True, 1),
}
_ROPE = {
    **dict.fromkeys(("factor", "rope_theta", "original_max_position_embeddings", "attention_factor"), (0, False, 1e30)),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), (0, False, 1e30)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (0, True, 1e30)),
    "partial_rotary_factor": (0, True, 1),
}
_ALWAYS = {"num_labels", "head_dim"}  # checked in every configuration


def read(folder: Path) -> dict[str, Any]:
    """Read the folder's `config.json`, without checking its settings.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It isn't a regular file, is too large, or isn't a JSON object.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: has no {CONFIG}, so it isn't the folder of a Hugging Face model")
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected a model's configuration")
    values = read_json(path, MOST_BYTES)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def check(values: Mapping[str, Any], config_class: type) -> None:
    """Refuse the first setting that is out of its range.

    >>> check({"num_labels": 10**9}, object)
    Traceback (most recent call last):
    ValueError: num_labels: 1000000000 given, expected a whole number from 1 to 1048576
    """
    known = (
        _ALWAYS
        | set(getattr(config_class, "__dataclass_fields__", {}))
        | set(getattr(config_class, "attribute_map", {}))
    )
    for name, (least, most) in _WHOLE.items():
        value = values.get(name) if name in known else None
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ValueError(f"{name}: {shown(value)} given, expected a whole number from {least} to {most}")
    _check_numbers({name: value for name, value in values.items() if name in known}, _REAL)
    for name in ("rope_parameters", "rope_scaling"):
        _check_rope(name, values.get(name))
    labels = values.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and all(isinstance(name, str) for name in labels.values())):
        raise ValueError(f"id2label: {shown(labels)} given, expected the labels' names by number")
    for name in ("dtype", "torch_dtype"):
        if values.get(name) not in (None, "auto"):
            check_dtype(values[name], name)
    if values.get("per_layer_config"):
        raise ValueError("per_layer_config is not supported; only models with equal layers are")
    if len(values) > MOST_SETTINGS:
        raise ValueError(f"{len(values):,} settings given, expected at most {MOST_SETTINGS:,}")
    # transformers sets an attribute for every key, whatever its name.
    methods = [name for name in values if callable(getattr(config_class, name, None))]
    if methods:
        raise ValueError(f"{shown(methods[0])} is the name of a method, expected the name of a setting")


def _check_numbers(values: Mapping[str, Any], ranges: Mapping[str, tuple[float, bool, float]], where: str = "") -> None:
    for name, (least, equal, most) in ranges.items():
        value = values.get(name)
        if value is not None and not _in_range(value, least, equal, most):
            bound = "from" if equal else "above"
            raise ValueError(f"{where}{name}: {shown(value)} given, expected a number {bound} {least:g} to {most:g}")


def _check_rope(name: str, value: Any) -> None:
    """Check the numbers of a rotation, or of a rotation for each type of layer."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {shown(value)} given, expected an object with rope_type and its settings")
    _check_numbers(value, _ROPE, f"{name}.")
    for layer_type in ("full_attention", "sliding_attention"):
        _check_rope(f"{name}.{layer_type}", value.get(layer_type))


def check_dtype(value: Any, name: str) -> None:
    """Refuse a value that isn't the name of a dtype of weights.

    Raises:
        ValueError: It isn't one of `DTYPES`, as a string.
    """
    if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"{name}: {shown(value)} given, expected one of {', '.join(DTYPES)}")


def param_dtype(config: Any, dtype: Any) -> np.dtype:
    """Return the given dtype, or the configuration's if it is None.

    Raises:
        ValueError: It isn't a dtype of weights.
    """
    named = dtype if dtype is not None else getattr(config, "dtype", None)
    named = "float32" if named is None or str(named) == "auto" else named
    try:
        found = jnp.dtype(named if dtype is not None else str(named).removeprefix("torch."))
    except TypeError:
        found = None
    check_dtype(found.name if found is not None else str(named), "dtype")
    return jnp.dtype(found)


def check_size(leaves: Mapping[str, Any]) -> None:
    """Refuse a model that is too large for any machine: its settings must be wrong."""
    if (total := sum(math.prod(leaf.shape) for leaf in leaves.values())) > MOST_PARAMETERS:
        path, leaf = max(leaves.items(), key=lambda item: math.prod(item[1].shape))
        raise ValueError(
            f"these settings describe a model of {total:.2g} parameters: {path} would have shape {leaf.shape}"
        )


def check_ratios(**counts: int) -> None:
    """Refuse two counts if the second doesn't divide the first.

    >>> check_ratios(num_attention_heads=4, num_key_value_heads=3)
    Traceback (most recent call last):
    ValueError: num_key_value_heads: 3 given, expected a divisor of num_attention_heads, which is 4
    """
    (whole, many), (part, few) = counts.items()
    if many % few:
        raise ValueError(f"{part}: {few} given, expected a divisor of {whole}, which is {many}")


def _in_range(value: Any, least: float, equal: bool, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or (type(value) is float and math.isnan(value)):
        return False
    return least <= value <= most if equal else least < value <= most


def shown(value: Any, most: int = 60) -> str:
    """Format a value for a message: as Python does, but cut if it is long; for a large container only its type."""
    if isinstance(value, dict | list) and len(value) > most:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**most:
        return f"a number of more than {most} digits"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: Exception, most: int = 160) -> str:
    """Format another package's error in one line, cut if it is long."""
    text = " ".join(str(error)[: 4 * most].split())
    return text if len(text) <= most else text[: most - 3] + "..."
