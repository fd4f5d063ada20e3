"""Sets of Hugging Face's `datasets`: folders that `save_to_disk` has written, and names on the hub."""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_jax._extras import require
from lora_jax.data._parquet import MOST_BYTES, without_nulls

HUB = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name, perhaps with a configuration
BATCH = 256  # rows decoded at once
LONGEST_ERROR = 150  # characters of an error of `datasets` in a message
DICT, SINGLE = "dataset_dict.json", ("dataset_info.json", "state.json")


def is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` has written the folder."""
    return (path / DICT).is_file() or all((path / name).is_file() for name in SINGLE)


def is_hub_name(path: Path, endings: Mapping[str, Any]) -> bool:
    """Return whether a path that doesn't exist may be a name on the hub, rather than a file with one of the endings."""
    return HUB.fullmatch(path.as_posix()) is not None and path.suffix.lower() not in endings


def has_splits(path: Path) -> bool:
    """Return whether the rows are in splits, as in a folder and on the hub, rather than in one file or set.

    >>> has_splits(Path("owner/name")), has_splits(Path(__file__))
    (True, False)
    """
    return (path / DICT).is_file() if is_saved(path) else not path.is_file()


def splits(path: Path) -> dict[str, Any]:
    """Return the sets of a folder from `save_to_disk`, or of the hub, by the name of their split; empty for a single
    one.

    Raises:
        MissingExtra: `datasets` isn't installed.
        FileNotFoundError: The hub has no such set, or can't be reached.
        ValueError: It can't be read.
    """
    saved = is_saved(path)
    missing = "a folder of datasets" if saved else "no such data file or folder; a set of the hub"
    require(f"{path}: {missing}", datasets=("datasets",))
    # Here, because few data are in such sets and its import takes long.
    datasets: Any = import_module("datasets")
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            name, _, configuration = path.as_posix().partition(":")
            found = datasets.load_dataset(name, configuration or None)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{path}: no such data file or folder, and no such set on the hub ({_short(error)})"
        ) from None
    except Exception as error:  # `datasets` raises many types
        hint = "" if saved else "; a configuration is given as owner/name:CONFIGURATION"
        raise ValueError(f"{path}: not readable as a set of datasets ({_short(error)}){hint}") from None
    return dict(found) if isinstance(found, Mapping) else {"": found}


def records(dataset: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows, each with its place; images and sound aren't decoded.

    Raises:
        ValueError: They take more memory than a data file may.
    """
    number = size = 0
    for table in dataset.with_format("arrow").iter(BATCH):
        size += table.nbytes
        if size > MOST_BYTES:
            raise ValueError(f"{where}: more than {MOST_BYTES:,} bytes in memory so far; divide the set's rows")
        for row in table.to_pylist():
            number += 1
            yield f"{where}: row {number}", {name: without_nulls(value) for name, value in row.items()}


def _short(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= LONGEST_ERROR else f"{said[:LONGEST_ERROR]}..."
