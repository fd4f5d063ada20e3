"""The file of a run, run.yaml: its settings by the names of the flags, to read and to write."""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_origin

import tyro
import yaml

from lora_jax import _disk
from lora_jax._config import PEFT_NAMES
from lora_jax.cli import _flags

FILE = "run.yaml"
MOST_BYTES = 2**16  # of a file that comes with someone's adapter
ONCE = ("config", "overwrite", "resume")  # flags of one call, which another call doesn't repeat
# A run that is repeated replaces nothing on the hub, and where its processes are is another call's.
NOT_WRITTEN = (*ONCE, "push_to_hub", "distributed", "coordinator_address", "num_processes", "process_id")


def path_in(words: Sequence[str]) -> Path | None:
    """Return the last file that `--config` names; without a name tyro explains the mistake."""
    found = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    found += [name for flag, name in itertools.pairwise(words) if flag == "--config"]
    return Path(found[-1]) if found else None


def read(path: Path, kind: Any, other: Any = None) -> dict[str, list[str]]:
    """Return the flags that a file of settings stands for, as words, by name: `rank: 8` is `--rank=8`.

    Args:
        path: A YAML file of one mapping, from names of flags to their values; underscores or hyphens join words.
        kind: The dataclass of all settings.
        other: The default settings of another command, whose files are read too: a name that this one alone has is
            passed over if its value is the default.

    Raises:
        OSError: The file can't be read.
        ValueError: It is no such mapping, or has a name that no flag has; the message has the nearest one.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split()):.120}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply, expected a mapping from flags to values") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__} given, expected a mapping such as `rank: 8`")
    known = {name: hint for name, hint in _flags.types(kind) if name not in ONCE}
    others = {} if other is None else values_of(other)
    words = {}
    for given, value in content.items():
        name = str(given).replace("-", "_")
        if name in ONCE:
            raise ValueError(f"{path}: {name}: belongs to one call, expected on the command line")
        if name not in known and name in others:
            if value != others[name]:
                raise ValueError(f"{path}: {name}: {value!s:.60} given, which this command doesn't have; leave it out")
            continue
        if name not in known:
            raise ValueError(f"{path}: no setting {str(given)!r:.60}{_nearest(name, known)}")
        words[name] = _words(f"{path}: {name}", name, value, several=get_origin(known[name]) is tuple)
    return words


def settings(path: Path, words: dict[str, list[str]], default: Any) -> Any:
    """Return the default settings with the file's values.

    Raises:
        ValueError: A value has the wrong type or is out of range.
    """
    # Every flag takes a word here, so that false can be written out.
    config = (tyro.conf.FlagConversionOff,)
    listed = [word for flag in words.values() for word in flag]
    try:
        return _flags.settings_of(type(default), listed, default, prog=str(path), config=config, in_one_line=True)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--')}") from None


def value(folder: Path, name: str) -> Any:
    """Return a value in the file of the run in a folder; None if there is none that can be read."""
    try:
        content = yaml.safe_load((folder / FILE).read_bytes()[:MOST_BYTES])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def note(folder: Path, name: str) -> str | None:
    """Return a note in the comments that `write` puts at the head of the file of a run; None if there is none."""
    try:
        head = (folder / FILE).read_bytes()[:MOST_BYTES].decode(errors="replace")
    except OSError:
        return None
    notes = itertools.takewhile(lambda line: line.startswith("#"), head.splitlines())
    return next((line.removeprefix(f"# {name}: ") for line in notes if line.startswith(f"# {name}: ")), None)


def write(folder: Path, settings: Any, notes: Mapping[str, str] | None = None) -> None:
    """Write the run's settings to `run.yaml`, all of them, so that later defaults don't change them.

    The notes are of this run and folder: they are comments, which a run that repeats the file doesn't read.
    """
    values = {name: value for name, value in values_of(settings).items() if name not in NOT_WRITTEN}
    head = f"# lora-jax train --config {FILE} repeats this run of lora_jax {version('lora_jax')}; flags override it.\n"
    head += "".join(f"# {name}: {text}\n" for name, text in (notes or {}).items())
    _disk.write(folder / FILE, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110))


def values_of(settings: Any) -> dict[str, Any]:
    """Return the settings by the names of the flags, as YAML and JSON have them."""
    return dict(_values(settings))


def _words(where: str, name: str, value: Any, *, several: bool) -> list[str]:
    """Return a flag with its value, as it is typed; `several` says whether it takes a list."""
    if isinstance(value, dict) and name == "lr_scheduler_kwargs":
        value = json.dumps(value)
    values = value if several and isinstance(value, list) else [value]
    if any(isinstance(x, list | dict) for x in values):
        raise ValueError(f"{where}: {value!s:.60} given, expected {'a list of values' if several else 'one value'}")
    flag = f"--{name.replace('_', '-')}"
    if name in _flags.REPEATED:
        return [word for x in values for word in (flag, str(x))]
    return [flag, *map(str, values)] if several else [f"{flag}={value}"]


def _nearest(name: str, known: Iterable[str]) -> str:
    if (ours := PEFT_NAMES.get(name, "")) in known:
        return f": PEFT's {name} is here {ours}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"; the nearest is {near[0]}"


def _values(settings: Any) -> Iterator[tuple[str, Any]]:
    for field, name, hint in _flags.fields(type(settings)):
        value = getattr(settings, field)
        if dataclasses.is_dataclass(hint):
            yield from _values(value)
        else:
            yield name, list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
