"""From a tree with nodes to what goes into the two files of an adapter."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_jax._node import check_node
from lora_jax.peft import _config, _names, _parameters, _tokens, _trees, _untie
from lora_jax.peft._config import PREFIX, AdapterConfig
from lora_jax.peft._factors import Factors, factors_of
from lora_jax.peft._names import Tensor, Weight
from lora_jax.peft._parameters import Fused
from lora_jax.peft._trees import Parts


def content(
    tree: Parts,
    names: Mapping[str, Weight],
    portable: bool = False,
    tokens: Mapping[str, Sequence[int]] | None = None,
    fused: bool = False,
    prefixed: bool = False,
) -> tuple[dict[str, np.ndarray], AdapterConfig]:
    """The tensors by name, and the config under which PEFT reads them as the same function.

    Args:
        tree: factors, leaves, and which of the leaves were trained in full.
        names: each leaf's Hugging Face name.
        portable: one rank, scale 1.
        tokens: rows of embeddings, the only ones to be saved of these leaves.
        fused: experts as parameters, even where PEFT reads one entry an expert.
        prefixed: prefix embeddings go with it, so that it may hold nothing itself.
    """
    nodes, tokens = tree.nodes, tokens or {}
    if not (nodes or tree.trained or tokens or prefixed):
        raise ValueError("there is no adapter in these parameters: nothing to save (lora_jax.init makes one)")
    _untie.check(tree, names, tokens)
    names = _untie.names_of(names, nodes.keys() | tree.leaves.keys())
    if unnamed := sorted((nodes.keys() | tree.trained) - names.keys()):
        raise ValueError(f"no Hugging Face name for {_config.one_line(unnamed)}: PEFT's format can't hold them")
    shapes = _trees.shapes(tree)
    for path, node in nodes.items():
        check_node(path, shapes[path], node)
    table = _names.tensors(names, shapes)
    factors = [found for path in sorted(nodes) for found in factors_of(path, nodes[path], table)]
    if nodes and not factors:
        raise ValueError("every adapter in these parameters has scale 0: nothing to save")
    if portable and fused:
        raise ValueError("portable and fused exclude one another: tools that ignore patterns don't know parameters")
    _check_magnitudes(factors, "portable" if portable else "fused" if fused else "")
    if portable and factors:
        factors = _one_rank(factors)
    rows = _tokens.saved(tokens, tree, table)
    others = tree._replace(trained=tree.trained - tokens.keys())
    extra = _Extra(table, others, {found.tensor.module for found in factors}, names)
    always = fused or _alphas(_by_module(factors, "rank"), _by_module(factors, "scale"))[0]  # over √rank: see there
    parameters = [] if portable else _parameters.fused(factors, names, table, always=always)
    inside = {tensor.module for it in parameters for tensor in it.parameter.tensors}
    factors = [found for found in factors if found.tensor.module not in inside]
    config = replace(
        _config_of(factors, parameters, extra, names, _names.modules(names, table)),
        target_parameters=_targets({it.parameter.name for it in parameters}, {*_parameters.parameters(names, table)}),
        trainable_token_indices=_tokens.named(tokens, table),
    )
    tensors = {name: array for found in factors for name, array in _factor_tensors(found)}
    return tensors | _parameters.tensors(parameters) | rows | extra.tensors(), config


def _check_magnitudes(factors: Sequence[Factors], form: str) -> None:
    """PEFT's `use_dora` is for all modules or none, and tools that ignore patterns don't know it."""
    with_one = [found.tensor.module for found in factors if found.magnitude is not None]
    without = [found.tensor.module for found in factors if found.magnitude is None]
    if with_one and without:
        raise ValueError(
            f"{with_one[0]} has a magnitude (DoRA) and {without[0]} has none: PEFT's format can't hold both"
        )
    if with_one and form:
        raise ValueError(
            f"{with_one[0]} has a magnitude (DoRA), which has no {form} form: merge it, or save without {form}"
        )


def _factor_tensors(found: Factors) -> list[tuple[str, np.ndarray]]:
    pairs = list(zip(_names.factor_names(found.tensor), (found.a.T, found.b.T), strict=True))
    for head in found.tensor.tied:  # the same ΔW seen from the other side
        pairs += zip(_names.head_factor_names(head), (found.b, found.a), strict=True)
    if found.magnitude is not None:
        pairs.append((_names.magnitude_name(found.tensor), found.magnitude))
    return [(name, np.ascontiguousarray(array)) for name, array in pairs]


def _one_rank(factors: Sequence[Factors]) -> list[Factors]:
    """The same ΔW with scale 1 and one rank for all: the scale goes into b, rows and columns of zeros are added."""
    rank = max(found.rank for found in factors)
    padded = []
    for tensor, a, b, scale, _ in factors:
        more = rank - a.shape[1]
        scaled = (b.astype(np.float32) * np.float32(scale)).astype(b.dtype)
        padded.append(Factors(tensor, np.pad(a, ((0, 0), (0, more))), np.pad(scaled, ((0, more), (0, 0))), 1.0))
    return padded


class _Extra:
    """What was trained besides the factors, in PEFT's ways: every bias, or whole modules and the adapted ones' biases.

    A module is saved with everything it holds: PEFT wraps modules, not tensors, and misses what isn't in the file.
    """

    def __init__(self, table: Mapping[str, Tensor], tree: Parts, adapted: set[str], names: Mapping[str, Weight]):
        self.leaves, trained, self.adapted = tree.leaves, tree.trained, adapted
        every = [t for t in table.values() if t.parameter == "bias"]
        biases = {path for path, weight in names.items() if weight.name.endswith(".bias")}
        if trained == biases and any(t.module not in adapted for t in every):
            self.bias, self.biases, self.modules, self.whole = "all", every, [], []
            return
        alone = {t.module for t in table.values() if t.path in trained and t.module not in adapted}
        alone = _with_heads_whole(alone, {t.module for t in table.values() if t.path not in trained})
        # PEFT can't load a module by itself that is inside another: the outer one has all of it.
        self.modules = sorted(m for m in alone if not any(m.startswith(f"{other}.") for other in alone))
        inside = tuple(f"{module}." for module in self.modules)
        if nested := sorted(module for module in adapted if module.startswith(inside)):
            raise ValueError(
                f"{nested[0]} has an adapter inside a module that is trained in full: PEFT's format can't hold both"
            )
        self.whole = [t for t in table.values() if t.module in self.modules or f"{t.module}.".startswith(inside)]
        beside = [t for t in table.values() if t.path in trained and t.module in adapted]
        if clash := [t.path for t in beside if t.parameter != "bias"]:
            raise ValueError(f"{clash[0]} is adapted and trained in full: PEFT's format can't hold both")
        # PEFT's reader takes biases one by one, its "lora_only" has them all: both are served by saving all.
        self.biases = [t for t in table.values() if t.module in adapted and t.parameter == "bias"] if beside else []
        self.bias = "lora_only" if self.biases else "none"
        self._check_complete(names, {t.path for t in table.values() if t.module in adapted} if beside else set())

    def _check_complete(self, names: Mapping[str, Weight], adapted: set[str]) -> None:
        """An adapter tree has only what was trained of a module, not the rest of it."""
        whole, with_bias = (
            {_module(names[path]) for path in paths} for paths in ({t.path for t in self.whole}, adapted)
        )
        for path, weight in names.items():
            needed = _module(weight) in whole or (_module(weight) in with_bias and weight.name.endswith(".bias"))
            if needed and path not in self.leaves:
                raise ValueError(f"{path} is saved with the module it belongs to: pass the whole tree, base included")

    def tensors(self) -> dict[str, np.ndarray]:
        saved = {}
        for tensor in self.whole:
            for module in (tensor.module, *tensor.tied):
                saved[f"{PREFIX}{module}.{tensor.parameter}"] = self._value(tensor)
        for tensor in self.biases:
            inner = ".base_layer" if tensor.module in self.adapted else ""
            for module in (tensor.module, *tensor.tied):
                saved[f"{PREFIX}{module}{inner}.bias"] = self._value(tensor)
        return saved

    def _value(self, tensor: Tensor) -> np.ndarray:
        leaf = self.leaves.get(tensor.path)
        if leaf is None:
            raise ValueError(
                f"{tensor.path} is saved with the module it belongs to: pass the whole tree, base included"
            )
        value = np.asarray(leaf)[tensor.index]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{tensor.path}: the leaf holds NaN or infinity: it is not saved")
        if tensor.transpose and value.ndim != 2:
            raise ValueError(f"{tensor.path}: a leaf of shape {value.shape} can't be saved whole, only matrices")
        return np.ascontiguousarray(value.T if tensor.transpose else value)


def _with_heads_whole(modules: set[str], others: set[str]) -> set[str]:
    """The modules, those that make up a whole head as one: PEFT saves heads of these names by itself for `SEQ_CLS`.

    >>> sorted(_with_heads_whole({"classifier.dense", "classifier.out_proj", "pooler"}, {"embeddings"}))
    ['classifier', 'pooler']
    """
    for head in ("classifier", "score"):
        inside = {module for module in modules if module.startswith(f"{head}.")}
        if inside and not any(module.startswith(f"{head}.") for module in others):
            modules = modules - inside | {head}
    return modules


def _module(weight: Weight) -> str:
    return weight.name.rpartition(".")[0]


def _by_module(factors: Sequence[Factors], attribute: str) -> dict[str, Any]:
    return {found.tensor.module: getattr(found, attribute) for found in factors}


def _config_of(
    factors: Sequence[Factors],
    parameters: Sequence[Fused],
    extra: _Extra,
    names: Mapping[str, Weight],
    modules: set[str],
) -> AdapterConfig:
    """The config under which PEFT gives each of `factors` and `parameters` its rank and scale."""
    ranks = _by_module(factors, "rank") | {it.parameter.name: it.rank for it in parameters}
    scales = _by_module(factors, "scale") | {it.parameter.name: it.scale for it in parameters}
    stabilized, alphas = _alphas(ranks, scales)
    # Of experts' entries PEFT makes parameters, by `r` and `lora_alpha` whatever patterns say: theirs, where there are.
    experts = [found.tensor.module for found in factors if _parameters.held_in(names[found.tensor.path])]
    r = _most_common((ranks[module] for module in experts or ranks), AdapterConfig.r)
    alpha = _most_common((alphas[module] for module in experts or alphas), AdapterConfig.lora_alpha)
    return AdapterConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=_targets({found.tensor.module for found in factors}, modules) if ranks else _config.NO_MODULE,
        rank_pattern={_pattern(module, ranks): value for module, value in ranks.items() if value != r},
        alpha_pattern={_pattern(module, ranks): value for module, value in alphas.items() if value != alpha},
        modules_to_save=tuple(_saved_name(module, modules) for module in extra.modules),
        bias=extra.bias,
        use_rslora=stabilized,
        fan_in_fan_out=bool(factors)
        and all(not f.tensor.transpose and not f.tensor.is_embedding for f in factors)
        and not parameters,
        use_dora=any(found.magnitude is not None for found in factors),
        ensure_weight_tying=any(t.tied and t.is_embedding for t in [found.tensor for found in factors] + extra.whole),
    )


def _most_common(values: Iterable[Any], default: Any) -> Any:
    return next((value for value, _ in Counter(values).most_common(1)), default)


def _alphas(ranks: Mapping[str, int], scales: Mapping[str, float]) -> tuple[bool, dict[str, float]]:
    """Whether alpha is over √rank, and each module's alpha: whole numbers where one of the two conventions has them."""
    for stabilized in (False, True):
        divisors = {module: math.sqrt(rank) if stabilized else rank for module, rank in ranks.items()}
        alphas = {module: round(scales[module] * divisors[module]) for module in ranks}
        # A float32 scale is within half an ulp of alpha/rank; one ulp more for a division done in float32.
        if all(math.isclose(alphas[m] / divisors[m], scales[m], rel_tol=2**-22) for m in ranks):
            return stabilized, {module: float(alpha) for module, alpha in alphas.items()}
    return False, {module: scales[module] * rank for module, rank in ranks.items()}


def _targets(adapted: set[str], modules: set[str]) -> tuple[str, ...]:
    """The shortest endings of names that select `adapted` out of `modules`: `q_proj`, or full names for some layers."""
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
    """A pattern that names `module` and no other: PEFT takes the first that fits, in an order that saving changes."""
    readable = re.compile(rf"(?:.*\.)?(?:{module})")
    return module if sum(readable.fullmatch(other) is not None for other in modules) == 1 else f"^{re.escape(module)}"


def _saved_name(module: str, modules: set[str]) -> str:
    """PEFT looks for names that end in this, dot or no dot before it."""
    return module if sum(other.endswith(module) for other in modules) <= 1 else PREFIX + module
