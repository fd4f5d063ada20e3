"""Output heads that share the embedding's weight, and heads that have been untied: these have a leaf of their own.

For a tied weight `names` has the path of the leaf that its head gets when it is untied (`untied`). The model's function
uses that leaf where a tree has it, so that a tree alone shows whether its model is tied.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from lora_jax._huggingface.tensors import Weight


class PartlyTied(NamedTuple):
    """The name of a tied weight after some of its copies have become leaves of their own."""

    name: str
    transpose: bool
    tied: tuple[str, ...]
    parameter: str
    untied: tuple[tuple[str, Weight], ...] = ()


def heads_of(weight: Weight) -> tuple[tuple[str, Weight], ...]:
    """(path, name) of the leaf that each tied head has once it is untied."""
    return getattr(weight, "untied", ())


def names_of(names: Mapping[str, Weight], paths: Collection[str]) -> dict[str, Weight]:
    """Return the names of a tree that has leaves at `paths`: a head with a leaf of its own is no copy of the embedding.

    With a leaf at `lm_head/kernel`, `embed/embedding: Weight("embed.weight", tied=("lm_head.weight",))` becomes
    `embed/embedding: Weight("embed.weight")` and `lm_head/kernel: Weight("lm_head.weight")`.
    """
    found = dict(names)
    for path, weight in names.items():
        if untied := {own: head for own, head in heads_of(weight) if own in paths}:
            untied_names = {head.name for head in untied.values()}
            tied = tuple(name for name in getattr(weight, "tied", ()) if name not in untied_names)
            still_tied = tuple((own, head) for own, head in heads_of(weight) if own not in untied)
            parameter = getattr(weight, "parameter", "")
            found |= {path: PartlyTied(weight.name, weight.transpose, tied, parameter, still_tied), **untied}
    return found
