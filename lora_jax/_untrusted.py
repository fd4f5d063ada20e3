"""Checks of an untrusted file before it is opened, for models, adapters and checkpoints.

Opening a pipe waits for a writer, a device never ends, and a file that Git LFS has not downloaded yet looks damaged.
Each is described here instead, in words for an error's message.
"""

import json
import re
import stat
from pathlib import Path
from typing import Any

LARGEST_POINTER = 1024  # bytes; the specification's limit, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER = re.compile(rb"version https?://[^\n]*\n(?:[^\n]*\n)*?oid [a-z0-9]+:[0-9a-f]+\r?\n")
_SIZE = re.compile(rb"^size (\d{1,20})\r?$", re.MULTILINE)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def not_a_file(path: Path) -> str:
    """Describe what `path` is instead of a regular file; empty where it is one. Links are followed.

    Raises:
        FileNotFoundError: There is nothing at the path.
        OSError: The path can't be resolved, as in a loop of links.

    >>> import os
    >>> not_a_file(Path(os.devnull)), not_a_file(Path(os.sep))
    ('a device', 'a folder')
    """
    mode = path.stat().st_mode
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def git_lfs_pointer(path: Path) -> str:
    """Describe a file that is a Git LFS pointer, and how to get the real file; empty where it is none.

    A clone without git-lfs has three lines of text in place of each large file. This never blocks: only a regular file
    is opened, and only one of at most a kilobyte.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> _ = path.write_text(f"version https://git-lfs.github.com/spec/v1\\noid sha256:{'0' * 64}\\nsize 1049\\n")
    >>> git_lfs_pointer(path)
    'a Git LFS pointer to 1,049 bytes that are not here: run `git lfs pull` in its folder, or download it again'
    """
    try:
        if not_a_file(path) or path.stat().st_size > LARGEST_POINTER:
            return ""
        content = path.read_bytes()
    except OSError:
        return ""
    if not _POINTER.match(content):
        return ""
    size = _SIZE.search(content)
    what = f"{int(size[1]):,} bytes" if size else "a file"
    there = "that are" if size else "that is"
    return f"a Git LFS pointer to {what} {there} not here: run `git lfs pull` in its folder, or download it again"


def read_json(path: Path, most_bytes: int) -> Any:
    """Read a JSON file, if it is no larger than `most_bytes`.

    Raises:
        OSError: It can't be read.
        ValueError: It is too large, or not valid JSON.
    """
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {most_bytes:,} of such a file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)  # it may have grown
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
