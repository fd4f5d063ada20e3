"""The LoRA options of PEFT that decide what an adapter computes, and which modules they name."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lora_jax.peft import _module_patterns
from lora_jax.peft._tensor_names import PREFIX

CHECKSUM = "lora_jax.sha256"  # the key of the checksum in the metadata of the tensors' file
# PEFT's placeholder for the target_modules of an adapter without factors; with an empty list it refuses to load one.
NO_MODULE = "dummy-target-modules"
# Fields that were added after the first checksums had been written. Where one is off, the checksum leaves it out, so
# that the checksums in older files still hold.
_NOT_IN_OLD_CHECKSUMS = frozenset(
    {"use_dora", "lora_bias", "trainable_token_indices", "lora_jax_prefix", "target_parameters"}
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of PEFT's `LoraConfig` that decides which modules are adapted and how they are scaled.

    Fields carry PEFT's names and defaults; lists are tuples.
    """

    r: int = 8
    lora_alpha: float = 8.0
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None
    lora_jax_prefix: Mapping[str, int] | None = None  # ours: the adapter has prefix embeddings (`_prefix_folder`)

    @functools.cached_property
    def budget(self) -> _module_patterns.Budget:
        """The time that is left for matching this config's patterns."""
        return _module_patterns.Budget()

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        return {}

    def targets(self, module: str, *, linear: bool = False) -> bool:
        """Return whether PEFT would adapt `module` (its `check_target_module_exists`).

        Args:
            module: Dotted name, without PEFT's `base_model.model.` prefix.
            linear: Whether `"all-linear"` selects the module: a linear layer other than `lm_head`.
        """
        if self._named(self.exclude_modules, module):
            return False
        if any(_module_patterns.names_part(saved, module, self.budget) for saved in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return linear
        if isinstance(self.target_modules, str) or self.target_modules is None or module in self.target_modules:
            return self._named(self.target_modules, module)
        return self._named(self.target_modules, module) and self._in_layers(module)

    def _named(self, patterns: tuple[str, ...] | str | None, module: str) -> bool:
        """Return whether `patterns` name the module: a regular expression for its name, or a list of name endings."""
        if isinstance(patterns, str):
            return _module_patterns.fullmatch(patterns, module, self.budget)
        return any(module == name or module.endswith(f".{name}") for name in patterns or ())

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        return _module_patterns.layer(self.layers_pattern, module, self.budget) in self.layers_to_transform

    def rank(self, module: str) -> int:
        """Return the rank of `module`: that of the first pattern that names it, or `r`."""
        if module not in self._ranks:
            self._ranks[module] = self._by_pattern(self.rank_pattern, module, self.r)
        return self._ranks[module]

    def scale(self, module: str) -> float:
        """Return the scale: alpha/rank, or alpha/√rank with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank = self.rank(module)
        alpha = self._by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _by_pattern(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        for pattern, value in patterns.items():
            if _module_patterns.names_end(pattern, module, self.budget):
                return value
        return default

    def saves(self, module: str) -> bool:
        """Return whether `modules_to_save` names `module` or a module that contains it.

        PEFT compares endings of names and doesn't ask for a dot before them: "head" names `lm_head` too.
        """
        parts = module.split(".")
        # For "score.dense": "score" and "score.dense".
        containing = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(f"{PREFIX}{name}".endswith(saved) for name in containing for saved in self.modules_to_save)


def checksum(config: AdapterConfig, tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of everything that decides what the adapter computes: the config and the tensors.

    Nothing else would show that an alpha was edited or that a bit of a mantissa flipped: the adapter is still valid,
    and computes something else.
    """
    fields = {name: value for name, value in asdict(config).items() if value or name not in _NOT_IN_OLD_CHECKSUMS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
