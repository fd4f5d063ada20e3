"""Loading the rows of a split from its own file, or holding them out of the training rows."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lora_jax.data import _glue, _sets
from lora_jax.data._forms import Format, Parser, accepted
from lora_jax.data._records import READERS, TEXT_ONLY, Records, records
from lora_jax.data._rows import Cell, Labelled, Row, listed

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
SHARDS = re.compile(r".*-\d+-of-(\d+)(-[0-9a-f]+)?\.parquet")  # older names of the hub end in a hash
FILES = {
    split: tuple(name + ending for name in names for ending in (*READERS, "-*-of-*.parquet"))
    for split, names in NAMES.items()
}


class _Layout(NamedTuple):
    """The possible names of each split's file or files (the first that exists is read), and what reads them."""

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Sequence[Path]], list[Row]]


def load(
    path: str | Path,
    split: Split | None = None,
    *,
    glue: str | None = None,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str = "",
    note: Callable[[str], None] | None = None,
    valid_share: float = 0.1,
    max_valid: int = 500,
    seed: int = 0,
) -> list[Row]:
    """Load the rows of a file, of a split's file in a folder, or of GLUE's own files.

    A file is `.jsonl`, `.json` (a list of objects), `.csv` or `.tsv` (the first row has the columns' names; labels are
    text, which `labels_of` takes for numbers if all are), or, with the extra `parquet`, `.parquet`, in a folder also
    in the parts in which `datasets` writes it (`train-00000-of-00002.parquet`). With the extra `datasets`, it may also
    be a folder that `save_to_disk` has written, or a name on the hub, `owner/name` or `owner/name:configuration`.

    Without a file of validation rows, some of the training rows are held out: a share of `valid_share`, at least 1 row
    and at most `max_valid`, selected with `seed`. `"train"` and `"valid"` then don't overlap, and together are the
    whole file, each in the file's order. A file of one row has no validation rows.

    The rows' columns say which form they have; of several, the first of `messages`, ShareGPT's `conversations`,
    `chosen` and `rejected`, `prompt` and `completion`, Alpaca's `instruction`, `input` and `output`, `text` and
    `label`, `text`. Columns that the form doesn't have are left out. A prompt and its completion, or its answers, may
    be lists of messages.

    Args:
        path: A file, or a folder with `train.jsonl` and optionally `valid.jsonl` and `test.jsonl`, or with other
            endings; `validation` and `dev` are `valid` too. Or a set of `datasets`.
        split: `"train"`, `"valid"` or `"test"`; None for all rows of a single file.
        glue: A task of GLUE (`GLUE_TASKS`), whose `train.tsv` and `dev.tsv` (`"valid"`) are in `path`.
        format: `"alpaca"`, `"sharegpt"` or `"preference"`, for rows that have the columns of another form too.
        columns: The columns of a form whose names in the file are others, such as `{"prompt": "question",
            "completion": "answer"}`, of `text`, `text_pair`, `label`, `prompt`, `completion`, `messages`, `chosen` and
            `rejected`. For ShareGPT `messages` alone.
        separator: Text put in front of each completion, of which it is a part.
        note: Called with a line on how a file was read, if it hasn't exactly the columns of a form.
        valid_share: The share of the training rows that is held out if there is no file of validation rows.
        max_valid: The most rows that are held out.
        seed: The seed that selects the rows held out.

    Raises:
        MissingExtra: It is a Parquet file, and pyarrow isn't installed, or a set, and `datasets` isn't.
        FileNotFoundError: The file, the folder or the split's file doesn't exist.
        ValueError: A line isn't JSON, lacks a column, has a value of the wrong type or another form than the lines
            before it (the message starts with `file:line`); a file is empty; no form has these `columns`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> _ = path.write_text('{"question": "2 + 2 =", "answer": "4"}')
    >>> load(path, columns={"prompt": "question", "completion": "answer"}, separator=" ")
    [Completion(prompt='2 + 2 =', completion=' 4')]
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: {split!r} given, expected train, valid or test")
    if glue is None:
        layout = _Layout(FILES, lambda paths: _read(paths, Parser(format, columns, separator), note))
    else:
        if format or columns or separator:
            raise ValueError(f"glue: {glue} given with a format, columns or a separator, which are for other data")
        task = _glue.glue_task(glue)
        layout = _Layout({**task.files, "test": ()}, lambda paths: _glue.read(paths[0], task))
    path = Path(path)
    if glue is None and (_sets.is_saved(path) or (not path.exists() and _sets.is_hub_name(path, READERS))):
        rows, divide = _of_set(path, split, Parser(format, columns, separator), note)
    else:
        rows, divide = _of_files(path, split, layout)
    if not divide:
        return rows
    held_out = _held_out(len(rows), valid_share, max_valid, seed)
    return [row for i, row in enumerate(rows) if (i in held_out) == (split == "valid")]


def _of_files(path: Path, split: Split | None, layout: _Layout) -> tuple[list[Row], bool]:
    """Return the rows of a split's file, and whether they are training rows from which some are held out."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    paths, divide = _files(path, split, layout.files) if path.is_dir() else ([path], split is not None)
    if split == "test" and not path.is_dir():
        raise ValueError(f"{path}: a single file, which has no test split; give a folder with test.jsonl")
    return layout.read(paths), divide


def _of_set(path: Path, split: Split | None, parser: Parser, note: Any) -> tuple[list[Row], bool]:
    """Return the same for a set of `datasets`."""
    found = _sets.splits(path)
    if "" in found:
        name, divide = None if split == "test" else "", split is not None
    elif split is None:
        raise ValueError(f"{path}: has the splits {listed(found)}, expected one of them: train, valid or test")
    else:
        own = {split: next((name for name in names if name in found), None) for split, names in NAMES.items()}
        name, divide = own[split], split == "train" and own["valid"] is None
        if name is None and split == "valid":
            name, divide = own["train"], True
    if name is None:
        has = "it is a single set" if "" in found else f"it has {listed(found)}"
        raise FileNotFoundError(f"{path}: no {split} split; {has}")
    where = f"{path}: {name}" if name else str(path)
    return _parsed(path, _sets.records(found[name], where), parser, note), divide


def _files(folder: Path, split: Split | None, names: Mapping[str, tuple[str, ...]]) -> tuple[list[Path], bool]:
    """Return the files of a split in a folder, and whether they are training rows from which some are held out."""
    if split is None:
        raise ValueError(f"{folder}: a folder, expected a file, or the split to read: train, valid or test")
    if not names[split]:
        raise ValueError(f"{folder}: GLUE publishes no labels for the {split} split; use the valid split (dev.tsv)")
    found = {name: _first(folder, possible) for name, possible in names.items()}
    if found[split]:
        return found[split], split == "train" and not found["valid"]
    if split != "valid" or not found["train"]:
        expected = f"{split} with {', '.join(READERS)}" if names is FILES else " or ".join(names[split])
        raise FileNotFoundError(f"{folder / names[split][0]}: no such file; the folder must have {expected}")
    return found["train"], True


def split_files(path: Path, split: Split) -> list[Path]:
    """Return the files of a split in a folder; empty if there is none.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "dev.jsonl").touch()
    >>> [file.name for file in split_files(folder, "valid")], split_files(folder, "test")
    (['dev.jsonl'], [])
    """
    return _first(path, FILES[split])


def train_files(path: Path) -> list[Path]:
    """Return the file, or the files of the training rows in a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    return _files(path, "train", FILES)[0] if path.is_dir() else [path]


def read_jsonl(path: str | Path) -> list[Row]:
    """Read all rows of one jsonl file, without blank lines; raises the errors of `load`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = path.write_text('{"text": "one"}')
    >>> read_jsonl(path)
    [Text(text='one')]
    """
    return _read([Path(path)], Parser(), None)


def _read(paths: Sequence[Path], parser: Parser, note: Callable[[str], None] | None) -> list[Row]:
    path = paths[0]
    rows = _parsed(path, (record for path in paths for record in records(path)), parser, note)
    if path.suffix.lower() in TEXT_ONLY:
        rows = [row._replace(label=Cell(row.label)) if isinstance(row, Labelled) else row for row in rows]
    return rows


def _parsed(path: Path, found: Records, parser: Parser, note: Callable[[str], None] | None) -> list[Row]:
    """Return the rows of records."""
    rows = [parser.row(fields, where) for where, fields in found]
    if not rows:
        raise ValueError(f"{path}: the file has no rows, expected {accepted()}")
    if note is not None and (line := parser.note(path)) is not None:
        note(line)
    return rows


def _first(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the file with the first name that is there, or the files if it is a pattern; empty if there is none."""
    for name in names:
        found = sorted(folder.glob(name)) if "*" in name else [folder / name]
        if found and found[0].exists():
            shards = SHARDS.fullmatch(found[0].name)
            if shards and len(found) != int(shards[1]):
                raise ValueError(f"{folder}: {len(found)} files {name}, expected {int(shards[1])}, as their names say")
            return found
    return []


def _held_out(count: int, share: float, most: int, seed: int) -> set[int]:
    size = min(max(1, round(share * count)), most, count - 1)
    return set(np.random.default_rng(seed).permutation(count)[:size].tolist())
