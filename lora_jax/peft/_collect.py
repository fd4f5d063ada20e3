"""What an adapter's files hold of a tree: factors by module, parameters of experts, token rows, what trained in full.

Saving mirrors loading: what the tree has (here), the config under which PEFT reads it as the same function
(`_derived_config`), and each array under PEFT's name (`_named_tensors`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax._huggingface import tied
from lora_jax._huggingface.factors import Factors, factors_of
from lora_jax._huggingface.messages import one_line
from lora_jax._huggingface.tensors import Tensor, Weight, modules, tensors
from lora_jax._huggingface.trees import Parts, shapes
from lora_jax._node import check_node
from lora_jax.peft import _fused_experts, _tied_heads, _token_rows, _trained_in_full
from lora_jax.peft._alphas import alphas_of
from lora_jax.peft._fused_experts import Fused
from lora_jax.peft._token_rows import TokenRows
from lora_jax.peft._trained_in_full import TrainedInFull


class Collected(NamedTuple):
    """What is saved of a tree.

    Attributes:
        factors: Of each adapted module; a stack of 3 layers is three entries.
        parameters: Experts' factors, where they are written as parameters.
        rows: The rows of embeddings that alone are saved of them.
        trained: The leaves that were trained in full.
        modules: The dotted name of every module of the model.
        known_parameters: The name of every parameter that could be adapted.
    """

    factors: list[Factors]
    parameters: list[Fused]
    rows: list[TokenRows]
    trained: TrainedInFull
    modules: set[str]
    known_parameters: set[str]


def collect(
    tree: Parts,
    names: Mapping[str, Weight],
    *,
    portable: bool,
    tokens: Mapping[str, Sequence[int]],
    fused: bool,
    prefixed: bool,
) -> Collected:
    """What is saved of a tree.

    Args:
        tree: Nodes, leaves, and which of the leaves were trained in full.
        names: The Hugging Face name of each leaf.
        portable: Whether all get one rank and scale 1.
        tokens: Rows of embeddings, the only ones to be saved of these leaves.
        fused: Whether experts become parameters even where PEFT reads one entry an expert.
        prefixed: Whether prefix embeddings go with it, so that it may hold nothing itself.

    Raises:
        ValueError: There is nothing to save, a leaf has no name, or PEFT's format can't express it.
    """
    nodes = tree.nodes
    if not (nodes or tree.trained or tokens or prefixed):
        raise ValueError("there is no adapter in these parameters: nothing to save (lora_jax.init makes one)")
    _tied_heads.check(tree, names, tokens)
    names = tied.names_of(names, nodes.keys() | tree.leaves.keys())
    if unnamed := sorted((nodes.keys() | tree.trained) - names.keys()):
        raise ValueError(f"no Hugging Face name for {one_line(unnamed)}: PEFT's format can't hold them")
    kernels = shapes(tree)
    for path, node in nodes.items():
        check_node(path, kernels[path], node)
    table = tensors(names, kernels)
    factors = _factors(tree, table)
    if portable and fused:
        raise ValueError("portable and fused exclude one another: tools that ignore patterns don't know parameters")
    _check_magnitudes(factors, "portable" if portable else "fused" if fused else "")
    if portable and factors:
        factors = _one_rank(factors)
    rows = _token_rows.saved(tokens, tree, table)
    others = tree._replace(trained=tree.trained - tokens.keys())
    trained = _trained_in_full.of(others, table, {found.tensor.module for found in factors}, names)
    # PEFT makes parameters of one entry an expert by alpha/r alone: where alpha is over √r, it would scale them wrong.
    stabilized, _ = alphas_of(
        {found.tensor.module: found.rank for found in factors}, {found.tensor.module: found.scale for found in factors}
    )
    parameters = [] if portable else _fused_experts.fused(factors, names, table, always=fused or stabilized)
    inside = {tensor.module for it in parameters for tensor in it.parameter.tensors}
    return Collected(
        [found for found in factors if found.tensor.module not in inside],
        parameters,
        rows,
        trained,
        modules(names, table),
        {*_fused_experts.parameters(table)},
    )


def _factors(tree: Parts, table: Mapping[str, Tensor]) -> list[Factors]:
    by_path: dict[str, list[Tensor]] = {}
    for tensor in table.values():
        by_path.setdefault(tensor.path, []).append(tensor)
    nodes = tree.nodes
    factors = [found for path in sorted(nodes) for found in factors_of(path, nodes[path], by_path[path])]
    if nodes and not factors:
        raise ValueError("every adapter in these parameters has scale 0: nothing to save")
    return factors


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


def _one_rank(factors: Sequence[Factors]) -> list[Factors]:
    """The same ΔW with scale 1 and one rank for all: the scale goes into b, rows and columns of zeros are added."""
    rank = max(found.rank for found in factors)
    padded = []
    for tensor, a, b, scale, _ in factors:
        more = rank - a.shape[1]
        scaled = (b.astype(np.float32) * np.float32(scale)).astype(b.dtype)
        padded.append(Factors(tensor, np.pad(a, ((0, 0), (0, more))), np.pad(scaled, ((0, more), (0, 0))), 1.0))
    return padded
