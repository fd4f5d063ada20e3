"""Loading the rows of a split from its own file, or holding them out of the training rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from lora_jax.data import _glue
from lora_jax.data._jsonl import read_jsonl
from lora_jax.data._rows import Row

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class _Layout(NamedTuple):
    """The possible names of each split's file (the first that exists is read), and the function that reads it."""

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Path], list[Row]]


def load(
    path: str | Path,
    split: Split | None = None,
    *,
    glue: str | None = None,
    valid_share: float = 0.1,
    max_valid: int = 500,
    seed: int = 0,
) -> list[Row]:
    """Load the rows of a jsonl file, of `{split}.jsonl` in a folder, or of GLUE's own files.

    Without a `valid.jsonl` (for a single file, or a folder that lacks it), some of the training rows are held out:
    a share of `valid_share`, at least 1 row and at most `max_valid`, selected with `seed`. `"train"` and `"valid"` then
    don't overlap, and together are the whole file, each in the file's order. A file of one row has no validation rows.

    Args:
        path: A jsonl file, or a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`.
        split: `"train"`, `"valid"` or `"test"`; None for all rows of a single file.
        glue: A task of GLUE (`GLUE_TASKS`), whose `train.tsv` and `dev.tsv` (`"valid"`) are in `path`.
        valid_share: The share of the training rows that is held out if there is no file of validation rows.
        max_valid: The most rows that are held out.
        seed: The seed that selects the rows held out.

    Raises:
        FileNotFoundError: The file, the folder or the split's file doesn't exist.
        ValueError: A line isn't JSON, has unknown keys, a value of the wrong type or other keys than the lines before
            it (the message starts with `file:line`); or a file is empty.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: {split!r} given, expected train, valid or test")
    path, layout = Path(path), _layout(glue)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    if path.is_dir():
        if split is None:
            raise ValueError(f"{path}: a folder, expected a file, or the split to read: train, valid or test")
        if not layout.files[split]:
            raise ValueError(f"{path}: GLUE publishes no labels for the {split} split; use the valid split (dev.tsv)")
        found = {name: _first(path, names) for name, names in layout.files.items()}
        file = found[split]
        if file is not None:
            if split != "train" or found["valid"] is not None:
                return layout.read(file)
        elif split != "valid" or found["train"] is None:
            expected = " or ".join(layout.files[split])
            raise FileNotFoundError(f"{path / layout.files[split][0]}: no such file; the folder must have {expected}")
        path = found["train"] or path
    elif split == "test":
        raise ValueError(f"{path}: a single file, which has no test split; give a folder with test.jsonl")
    rows = layout.read(path)
    if split is None:
        return rows
    held_out = _held_out(len(rows), valid_share, max_valid, seed)
    return [row for i, row in enumerate(rows) if (i in held_out) == (split == "valid")]


def _layout(glue: str | None) -> _Layout:
    if glue is None:
        return _Layout({split: (f"{split}.jsonl",) for split in SPLITS}, read_jsonl)
    task = _glue.glue_task(glue)
    return _Layout({**task.files, "test": ()}, lambda path: _glue.read(path, task))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _held_out(count: int, share: float, most: int, seed: int) -> set[int]:
    size = min(max(1, round(share * count)), most, count - 1)
    return set(np.random.default_rng(seed).permutation(count)[:size].tolist())
