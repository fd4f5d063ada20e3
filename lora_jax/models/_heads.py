"""Classification heads: the folder's own if it has the right labels, else a new one."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.models._family import Family, Weight
from lora_jax.models._files import TensorFiles


def label_names(config: Any) -> tuple[str, ...]:
    """Return the names of a configuration's labels, in the order of their numbers; the numbers if the labels have no
    names.

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
    """Return the family and configuration that predict `labels`, and whether the folder's own head predicts them.

    Raises:
        ValueError: No model of this type has a classification head.
    """
    of_type = [other for other in families.values() if other.config_class is family.config_class]
    with_head = next((other for other in of_type if other.head), None)
    if with_head is None:
        known = ", ".join(sorted(name for name, other in families.items() if other.head))
        raise ValueError(f"{family.architecture} has no classification head; models with one are {known}")
    own = label_names(config)
    unnamed = own == tuple(map(str, range(len(own))))
    own_head = bool(family.head) and len(own) == len(labels) and (unnamed or own == tuple(labels))
    config = copy.deepcopy(config)
    config.architectures = [with_head.architecture]
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "regression" if len(labels) == 1 else "single_label_classification"
    return with_head, config, own_head


def absent(folder: Path, names: Mapping[str, Weight], family: Family, own_head: bool) -> tuple[str, ...]:
    """Return the paths of the leaves to initialise newly: of a new head, and of parts before it that the folder lacks.

    A part is initialised newly only if all its leaves are missing in the files: half a part is an error.
    """
    stored = set(TensorFiles(folder).tensors)
    new = []
    for part in (family.head, *family.before_head):
        paths = [path for path in names if path.startswith(f"{part}/")]
        expected = {names[path].name for path in paths} | {
            names[path].name.removeprefix(family.prefix) for path in paths
        }
        if not expected & stored or (part == family.head and not own_head):
            new += paths
    return tuple(new)
