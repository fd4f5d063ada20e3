"""Output heads that share the embedding's weight, and those of them that have a leaf of their own in a tree.

`names` says for a tied weight where its head goes once it has a leaf (`untied`), and the model's function uses that
leaf where a tree has it. So a tree says by itself whether its model is tied.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from lora_jax._huggingface.tensors import Weight


class PartlyTied(NamedTuple):
    """A weight of which some copies have become leaves, as its other copies are named."""

    name: str
    transpose: bool
    tied: tuple[str, ...]
    parameter: str
    untied: tuple[tuple[str, Weight], ...] = ()


def heads_of(weight: Weight) -> tuple[tuple[str, Weight], ...]:
    """(path, name) of the leaf that each tied head has once it is untied."""
    return getattr(weight, "untied", ())


def names_of(names: Mapping[str, Weight], paths: Collection[str]) -> dict[str, Weight]:
    """The names of a tree that has leaves at `paths`: a head with a leaf of its own is no copy of the embedding.

    With a leaf at `lm_head/kernel`, `embed/embedding: Weight("embed.weight", tied=("lm_head.weight",))` becomes
    `embed/embedding: Weight("embed.weight")` and `lm_head/kernel: Weight("lm_head.weight")`.
    """
    found = dict(names)
    for path, weight in names.items():
        if apart := {own: head for own, head in heads_of(weight) if own in paths}:
            gone = {head.name for head in apart.values()}
            tied = tuple(name for name in getattr(weight, "tied", ()) if name not in gone)
            rest = tuple((own, head) for own, head in heads_of(weight) if own not in apart)
            parameter = getattr(weight, "parameter", "")
            found |= {path: PartlyTied(weight.name, weight.transpose, tied, parameter, rest), **apart}
    return found
