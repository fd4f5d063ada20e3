"""`adapter_config.json`: every field of PEFT's LoRA config, honoured or refused by name.

Fields fall into three kinds. A field that shapes the adapter's function is honoured: `AdapterConfig` has it. A field
that only describes how the adapter was made (dropout, initialisation, provenance) is accepted whatever it says. All the
rest, fields that a newer PEFT adds included, is refused unless it is off (null, false or empty): an option that we
don't know may change what the adapter computes.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax import _disk
from lora_jax._huggingface.messages import one_line, show
from lora_jax._untrusted import git_lfs_pointer
from lora_jax.peft import _module_patterns
from lora_jax.peft._adapter_config import AdapterConfig

CONFIG_FILE = "adapter_config.json"
MAX_BYTES = 16 * 2**20
MAX_RANK = 65_536  # above the full rank of any kernel; the shapes of the tensors bound it much tighter

# These fields describe training or origin; none changes the function that the saved tensors compute.
DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Initialisations that leave the base weights as they were, and prefixes of those that edit them (pissa_niter_16 too).
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read(folder: Path) -> AdapterConfig:
    """Read the config in `folder`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It isn't JSON, or has fields that aren't supported; all of them are named in one line.
    """
    path = folder / CONFIG_FILE
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such adapter folder")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a PEFT adapter: it holds no {CONFIG_FILE}")
    return parse(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """Read the JSON value of a config's file; its fields aren't checked.

    Raises:
        ValueError: The file is too large or a Git LFS pointer, isn't JSON, or has a key twice, NaN or Infinity.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: {size} bytes is no adapter config; at most {MAX_BYTES} are read")
    if pointer := git_lfs_pointer(path):
        raise ValueError(f"{path}: {pointer}")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def parse(fields: Any, where: str) -> AdapterConfig:
    """Return the config that `fields` (parsed JSON) describe; the message of a ValueError begins with `where`."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {show(fields.get('peft_type'))}; only 'LORA' adapters can be read")
    problems, known = [], {}
    for name, value in fields.items():
        try:
            if name in _FIELDS:
                known[name] = _FIELDS[name](value)
            elif name == "init_lora_weights":
                _check_initialisation(value)
            elif name not in DESCRIPTIVE and value not in (None, False, {}, [], ""):
                raise ValueError("is not supported")
        except ValueError as error:
            problems.append(f"{name}: {error} (it is {show(value)})")
    if isinstance(known.get("target_modules"), str) and (
        known.get("layers_to_transform") or known.get("layers_pattern")
    ):
        problems.append("layers_to_transform and layers_pattern need target_modules to be a list")
    if problems:
        raise ValueError(f"{where}: {one_line(problems)}")
    return AdapterConfig(**known)


def to_json(config: AdapterConfig, **descriptive: Any) -> str:
    """`config` as the text of PEFT's file, with descriptive fields such as `base_model_name_or_path`."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        **{name: getattr(config, name) for name in _FIELDS},
        **descriptive,
    }
    fields["lora_alpha"] = _whole(config.lora_alpha)
    fields["alpha_pattern"] = {pattern: _whole(alpha) for pattern, alpha in config.alpha_pattern.items()}
    for name in ("layers_pattern", "modules_to_save", "target_parameters"):
        fields[name] = fields[name] or None
    if config.lora_jax_prefix is None:  # PEFT warns of fields that it doesn't know: it should where it lacks a prefix
        del fields["lora_jax_prefix"]
    return _disk.to_json(fields, indent=2, sort_keys=True) + "\n"


def _whole(number: float) -> float:
    """Return the number as an int where it is whole, 5.0 as 5: some readers insist on an int."""
    return int(number) if number == int(number) else number


def _check_initialisation(value: Any) -> None:
    """Refuses an `init_lora_weights` that edits the base weights, or that isn't known to leave them alone."""
    name = value.lower() if isinstance(value, str) else value  # as PEFT reads some of them
    if isinstance(name, str) and name.startswith(EDITS_BASE):
        raise ValueError("edits the base weights, which aren't here")
    if isinstance(name, str | bool | None) and name in KEEPS_BASE:
        return
    known = ", ".join(str(one) for one in KEEPS_BASE)
    raise ValueError(f"is not one that is known to leave the base weights as they are ({known})")


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ValueError(f"expected a whole number from 1 to {MAX_RANK}")
    return value


def _alpha(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not abs(number) <= 1e9:
        raise ValueError("expected a finite number")
    return number


def _switch(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError("expected true or false")
    return bool(value)


def _bias(value: Any) -> str:
    if value not in ("none", "all", "lora_only", None):
        raise ValueError("expected 'none', 'all' or 'lora_only'")
    return value or "none"


def _names(value: Any) -> tuple[str, ...]:
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("expected a list of names")
    return tuple(value)


def _patterned(value: Any) -> tuple[str, ...] | str | None:
    """Return a regular expression or a list of names; an expression is compiled once, so that its
    faults are found here.
    """
    if isinstance(value, str):
        _module_patterns.check([value])
        return value
    return None if value is None else _names(value)


def _saved(value: Any) -> tuple[str, ...]:
    names = _names(value)
    _module_patterns.check(names, _module_patterns.part)
    return names


def _layers(value: Any) -> tuple[int, ...] | None:
    value = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(index) is int and index >= 0 for index in value):
        raise ValueError("expected layer numbers")
    return tuple(value)


def _layers_pattern(value: Any) -> tuple[str, ...]:
    names = _names(value or None)
    _module_patterns.check(names, _module_patterns.layers)
    return names


def _tokens(value: Any) -> dict[str, tuple[int, ...]] | tuple[int, ...] | None:
    """Row numbers of the input embedding, or row numbers by the name of an embedding."""
    if isinstance(value, dict):
        if not value:
            return None
        return {name: _rows(rows) for name, rows in value.items()}
    return None if value in (None, []) else _rows(value)


def _rows(value: Any) -> tuple[int, ...]:
    rows = _layers(value) if isinstance(value, list) and value else None
    if rows is None or len(set(rows)) < len(rows):
        raise ValueError("expected token numbers, each once")
    return rows


def _prefix(value: Any) -> dict[str, int]:
    counts = value if isinstance(value, dict) and value.keys() == {"length", "after"} else {}
    if not counts or any(type(count) is not int or count < 0 for count in counts.values()):
        raise ValueError("expected an object of length and after, whole numbers")
    return counts


def _pattern_values(check: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def checked(value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise ValueError("expected an object of patterns and numbers")
        _module_patterns.check(value or {}, _module_patterns.end)
        return {pattern: check(number) for pattern, number in (value or {}).items()}

    return checked


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "target_modules": _patterned,
    "target_parameters": _names,
    "exclude_modules": _patterned,
    "layers_to_transform": _layers,
    "layers_pattern": _layers_pattern,
    "rank_pattern": _pattern_values(_rank),
    "alpha_pattern": _pattern_values(_alpha),
    "modules_to_save": _saved,
    "bias": _bias,
    "use_rslora": _switch,
    "fan_in_fan_out": _switch,
    "ensure_weight_tying": _switch,
    "use_dora": _switch,
    "lora_bias": _switch,
    "trainable_token_indices": _tokens,
    "lora_jax_prefix": _prefix,
}
