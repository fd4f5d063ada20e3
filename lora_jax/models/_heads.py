"""A classification head: the folder's own where it fits, a new one where there is none or its labels differ."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.models._family import Family, Weight
from lora_jax.models._files import TensorFiles


def label_names(config: Any) -> tuple[str, ...]:
    """Names of a configuration's labels, in the order of their numbers; bare numbers where it only counts them.

    >>> from transformers import BertConfig
    >>> label_names(BertConfig(id2label={0: "no", 1: "yes"})), label_names(BertConfig(num_labels=3))
    (('no', 'yes'), ('0', '1', '2'))
    """
    names = [name for _, name in sorted(config.id2label.items())]
    generic = [f"LABEL_{i}" for i in range(len(names))]
    return tuple(map(str, range(len(names)))) if names == generic else tuple(names)


def labelled(
    family: Family, config: Any, labels: Sequence[str], families: Mapping[str, Family]
) -> tuple[Family, Any, bool]:
    """The family and configuration that tell `labels`, and whether the folder's own head does.

    Raises:
        ValueError: no model of this type has a head for labels.
    """
    of_type = [other for other in families.values() if other.config_class is family.config_class]
    with_head = next((other for other in of_type if other.head), None)
    if with_head is None:
        known = ", ".join(sorted(name for name, other in families.items() if other.head))
        raise ValueError(f"{family.architecture} tells no labels; models that do are {known}")
    own = label_names(config)
    unnamed = own == tuple(map(str, range(len(own))))
    kept = bool(family.head) and len(own) == len(labels) and (unnamed or own == tuple(labels))
    config = copy.deepcopy(config)
    config.architectures = [with_head.architecture]
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "regression" if len(labels) == 1 else "single_label_classification"
    return with_head, config, kept


def absent(folder: Path, names: Mapping[str, Weight], family: Family, head_kept: bool) -> tuple[str, ...]:
    """The leaves to initialise newly: a head that isn't kept, and what the folder lacks before it.

    A part is made anew only where nothing of it is in the files: half of one is a mistake.
    """
    held = set(TensorFiles(folder).tensors)
    new = []
    for part in (family.head, *family.before_head):
        paths = [path for path in names if path.startswith(f"{part}/")]
        there = {names[path].name for path in paths} | {names[path].name.removeprefix(family.prefix) for path in paths}
        if not there & held or (part == family.head and not head_kept):
            new += paths
    return tuple(new)
