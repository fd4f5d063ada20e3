"""The rows of a split: from its own file, or held out of the training rows."""

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
    """How a folder's files are named, the first that is there counting, and how one is read."""

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
    """The rows of a jsonl file, or of `{split}.jsonl` in a folder; or those of one of GLUE's own files or folders.

    Where there is no `valid.jsonl` (a lone file, or a folder that lacks it), a share of the training rows is held out:
    `valid_share` of them, at least 1 and at most `max_valid`, drawn with `seed`. `"train"` and `"valid"` then never
    overlap, and together are the whole file, each in the file's order. A single row is all for training.

    Args:
      path: a jsonl file, or a folder with `train.jsonl` and, where wanted, `valid.jsonl` and `test.jsonl`.
      split: `"train"`, `"valid"` or `"test"`; None for all rows of a lone file.
      glue: a task of GLUE (`GLUE_TASKS`), whose files `path` then holds: `train.tsv` and `dev.tsv`, which is `"valid"`.
      valid_share: share of the training rows held out for validation where no file gives them.
      max_valid: the most rows held out.
      seed: of the draw.

    Raises:
      FileNotFoundError: the file, the folder or the split's file is not there.
      ValueError: a line that is not JSON, has unknown keys or a value of the wrong type, or is of another kind than
        the lines before; an empty file. The message starts with `file:line`.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: {split!r} given, expected train, valid or test")
    path, layout = Path(path), _layout(glue)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    if path.is_dir():
        if split is None:
            raise ValueError(f"{path}: is a folder, name the split to read: train, valid or test")
        if not layout.files[split]:
            raise ValueError(f"{path}: GLUE publishes no labels of {split} rows; take the valid split (dev.tsv)")
        found = {name: _first(path, names) for name, names in layout.files.items()}
        file = found[split]
        if file is not None:
            if split != "train" or found["valid"] is not None:
                return layout.read(file)
        elif split != "valid" or found["train"] is None:
            expected = " or ".join(layout.files[split])
            raise FileNotFoundError(f"{path / layout.files[split][0]}: no such file; the folder must hold {expected}")
        path = found["train"] or path
    elif split == "test":
        raise ValueError(f"{path}: is a lone file and has no test split; give a folder with test.jsonl")
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
