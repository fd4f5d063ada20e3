"""The config under which PEFT reads the saved tensors as the same function: ranks, alphas, and names of modules."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lora_jax.peft._adapter_config import NO_MODULE, AdapterConfig
from lora_jax.peft._alphas import alphas_of
from lora_jax.peft._collect import Collected
from lora_jax.peft._tensor_names import PREFIX


def config_of(saved: Collected) -> AdapterConfig:
    """Return the config under which PEFT gives each saved module and parameter its rank and scale,
    and adapts nothing else.
    """
    factors, parameters = saved.factors, saved.parameters
    ranks = {found.tensor.module: found.rank for found in factors} | {it.parameter.name: it.rank for it in parameters}
    scales = {found.tensor.module: found.scale for found in factors} | {
        it.parameter.name: it.scale for it in parameters
    }
    stabilized, alphas = alphas_of(ranks, scales)
    # PEFT fuses entries of experts with `r` and `lora_alpha`, whatever the patterns say. So where there are experts,
    # `r` and `lora_alpha` are the experts', and patterns name the other modules.
    experts = [found.tensor.module for found in factors if found.tensor.held_in]
    r = _most_common((ranks[module] for module in experts or ranks), AdapterConfig.r)
    alpha = _most_common((alphas[module] for module in experts or alphas), AdapterConfig.lora_alpha)
    adapted = {found.tensor.module for found in factors}
    embeddings = [found.tensor for found in factors] + saved.trained.whole
    return AdapterConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=_targets(adapted, saved.modules) if ranks else NO_MODULE,
        target_parameters=_targets({it.parameter.name for it in parameters}, saved.known_parameters),
        rank_pattern={_pattern(module, ranks): value for module, value in ranks.items() if value != r},
        alpha_pattern={_pattern(module, ranks): value for module, value in alphas.items() if value != alpha},
        modules_to_save=tuple(_saved_name(module, saved.modules) for module in saved.trained.modules),
        bias=saved.trained.bias,
        use_rslora=stabilized,
        fan_in_fan_out=bool(factors)
        and all(not f.tensor.transpose and not f.tensor.is_embedding for f in factors)
        and not parameters,
        use_dora=any(found.magnitude is not None for found in factors),
        ensure_weight_tying=any(tensor.tied and tensor.is_embedding for tensor in embeddings),
        trainable_token_indices={rows.tensor.module: rows.rows for rows in saved.rows} or None,
    )


def _most_common(values: Iterable[Any], default: Any) -> Any:
    return next((value for value, _ in Counter(values).most_common(1)), default)


def _targets(adapted: set[str], modules: set[str]) -> tuple[str, ...]:
    """Return the shortest endings of names that select `adapted` out of `modules`: `q_proj`, or
    full names for some layers.
    """
    # PEFT compares endings with containers such as `layers.0.attn` too, and refuses to adapt one.
    everything = modules | {
        ".".join(parts[:n]) for parts in (m.split(".") for m in modules) for n in range(1, len(parts))
    }
    chosen: dict[str, bool] = {}

    def selects_adapted_only(ending: str) -> bool:
        if ending not in chosen:
            found = {name for name in everything if name == ending or name.endswith(f".{ending}")}
            chosen[ending] = found <= adapted
        return chosen[ending]

    targets = set()
    for module in adapted:
        parts = module.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts)))
        # An ending with a layer number in it is no shorter a list than full names, and harder to read.
        short = (ending for ending in endings if not any(part.isdecimal() for part in ending.split(".")))
        targets.add(next((ending for ending in short if selects_adapted_only(ending)), module))
    return tuple(sorted(targets))


def _pattern(module: str, modules: Iterable[str]) -> str:
    """Return a pattern that names `module` and no other of `modules`.

    PEFT takes the first pattern that fits, and saving may change their order: with two that fit, the rank would depend
    on it.
    """
    readable = re.compile(rf"(?:.*\.)?(?:{module})")
    return module if sum(readable.fullmatch(other) is not None for other in modules) == 1 else f"^{re.escape(module)}"


def _saved_name(module: str, modules: set[str]) -> str:
    """Return the name of `module` in `modules_to_save`: PEFT selects every name that ends in it, after a dot or not."""
    return module if sum(other.endswith(module) for other in modules) <= 1 else PREFIX + module
