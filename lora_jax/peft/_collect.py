"""Collecting the parts of a tree that an adapter's files hold: factors, experts, token rows, leaves trained in full.

Saving mirrors loading, in three steps: collect the parts (here), derive the config under which PEFT reads them as the
same function (`_derived_config`), and give each array PEFT's name (`_named_tensors`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax._huggingface import untied
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
    """The parts of a tree that are saved.

    Attributes:
        factors: The factors of each adapted module; a stack of 3 layers is three entries.
        parameters: The factors of experts that are written as parameters (`target_parameters`).
        rows: The trained rows of embeddings that are saved as rows only.
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
    trained_rows: Sequence[TokenRows],
    fused: bool,
    prefixed: bool,
) -> Collected:
    """Collect the parts of a tree that are saved.

    Args:
        tree: Nodes, leaves, and which of the leaves were trained in full.
        names: The Hugging Face name of each leaf.
        portable: Whether every module gets the same rank, and scale 1.
        tokens: Row numbers by the path of an embedding; no other rows of it are saved.
        trained_rows: Rows that the tree held as such.
        fused: Whether experts become parameters even where PEFT can read one entry for each expert.
        prefixed: Whether prefix embeddings are saved too, so that the tree may have nothing else that trains.

    Raises:
        ValueError: There is nothing to save, a leaf has no name, or PEFT's format can't express it.
    """
    nodes = tree.nodes
    if not (nodes or tree.trained or tokens or trained_rows or prefixed):
        raise ValueError("there is no adapter in these parameters: nothing to save (lora_jax.init makes one)")
    _tied_heads.check(tree, names, {*tokens, *(rows.tensor.path for rows in trained_rows)})
    # From here on a head that has a leaf of its own has a name of its own, and is no copy of the embedding.
    names = untied.names_of(names, nodes.keys() | tree.leaves.keys())
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
        factors = _with_one_rank(factors)
    rows = [*trained_rows, *_token_rows.collect(tokens, tree, table)]
    # An embedding whose rows are saved alone isn't saved as a leaf that was trained in full as well.
    others = tree._replace(trained=tree.trained - tokens.keys())
    trained = _trained_in_full.collect(others, table, {found.tensor.module for found in factors}, names)
    # Where a file has one entry for each expert, PEFT fuses them and scales by alpha/r whatever use_rslora says. With
    # alpha/√r the scale would be wrong, so that experts must be written as parameters then.
    stabilized, _ = alphas_of(
        {found.tensor.module: found.rank for found in factors}, {found.tensor.module: found.scale for found in factors}
    )
    parameters = [] if portable else _fused_experts.fused(factors, names, table, always=fused or stabilized)
    # Modules whose factors are now a part of a parameter's have no entry of their own.
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
    """Return the factors of every module that a node adapts.

    A node beside `layers/query/kernel` (3, 8, 6) is three modules, `layers.0.query` to `layers.2.query`. One whose
    scale is 0 isn't adapted, and is left out.
    """
    by_path: dict[str, list[Tensor]] = {}
    for tensor in table.values():
        by_path.setdefault(tensor.path, []).append(tensor)
    nodes = tree.nodes
    factors = [found for path in sorted(nodes) for found in factors_of(path, nodes[path], by_path[path])]
    if nodes and not factors:
        raise ValueError("every adapter in these parameters has scale 0: nothing to save")
    return factors


def _check_magnitudes(factors: Sequence[Factors], form: str) -> None:
    """Refuse magnitudes in some nodes only, which `use_dora` can't express, and in the portable and fused forms."""
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


def _with_one_rank(factors: Sequence[Factors]) -> list[Factors]:
    """Return the same ΔW with scale 1 and one rank for all: the scale goes into b, rows and columns of zeros are added.

    With ranks 2 and 4, the first becomes a [in, 2] -> [in, 4] and b [2, out] -> [4, out], whose product is the same.
    """
    rank = max(found.rank for found in factors)
    padded = []
    for tensor, a, b, scale, _ in factors:
        more = rank - a.shape[1]
        # In float32: in bfloat16 a scale such as 0.1 would itself be rounded before it multiplies b.
        scaled = (b.astype(np.float32) * np.float32(scale)).astype(b.dtype)
        padded.append(Factors(tensor, np.pad(a, ((0, 0), (0, more))), np.pad(scaled, ((0, more), (0, 0))), 1.0))
    return padded
