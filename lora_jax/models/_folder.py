"""A model's folder: finding it (here or on the hub), its configuration, and replacing it whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lora_jax.models import _settings
from lora_jax.models._family import Family
from lora_jax.models._settings import CONFIG

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
WEIGHT_FILES = ("*.safetensors",)
DISKS_OWN = "lost+found"  # which an ext4 disk has at its top
NOT_COPIED = re.compile(
    r"config\.json|.*\.safetensors\.index\.json|pytorch_model\.bin\.index\.json|adapter_config\.json"
)


def find(path_or_hub_id: str | os.PathLike, *, weights: bool) -> Path:
    """The local folder of a model; a hub name is downloaded (or found in the hub's cache) first.

    Raises:
        FileNotFoundError: neither a folder here nor a model that can be had from the hub.
        NotADirectoryError: a file.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder}: a file, expected a model's folder (with {CONFIG} in it)")
    name = os.fspath(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{folder}: no such folder, and not a hub name (owner/model) either")
    try:
        return Path(snapshot_download(name, allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if weights else ())]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub can't be reached for a model of that name; give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{name}: no such folder, and the hub refuses that name: {reason}") from None


def read_config(folder: Path, families: Mapping[str, Family]) -> tuple[Family, Any]:
    """The family of the folder's model and its transformers configuration.

    Raises:
        FileNotFoundError: no `config.json`.
        ValueError: it isn't JSON, describes a model that isn't supported, or a setting is none.
    """
    path, values = folder / CONFIG, _settings.read(folder)
    try:
        family = family_of(values.get("model_type"), values.get("architectures"), families)
        if values.get("quantization_config"):
            raise ValueError("a quantized model is not supported; use the float16, bfloat16 or float32 original")
        _settings.check(values, family.config_class)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        return family, family.config_class(**values)  # `from_dict` writes it out for its log, which takes seconds
    except Exception as error:  # transformers checks with whatever exceptions its validators raise
        raise ValueError(f"{path}: not a valid {family.config_class.__name__}: {_settings.one_line(error)}") from None


def family_of(model_type: Any, architectures: Any, families: Mapping[str, Family]) -> Family:
    """The family that a configuration names; where it names no architecture, the first of its model type.

    Raises:
        ValueError: it isn't supported.
    """
    if not isinstance(architectures or [], list) or not all(isinstance(name, str) for name in architectures or ()):
        raise ValueError(f"architectures: {_settings.shown(architectures)} given, expected a list of names")
    of_type = {name: family for name, family in families.items() if family.config_class.model_type == model_type}
    for name in architectures or of_type:
        if name in of_type:
            return of_type[name]
    what = (
        ", ".join(ascii(name[:60])[1:-1] for name in (architectures or ())[:3])
        or f"model_type {_settings.shown(model_type)}"
    )
    raise ValueError(f"{what} is not supported; supported are {', '.join(sorted(families))}")


@contextmanager
def replacing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write into, which takes `folder`'s place when the block ends without an error.

    It is a sibling, or inside where `folder` is a mounted disk: that can't be renamed, but what it holds can.
    Whatever goes wrong (no space left, an interrupt), nothing half-written stays behind and what was there is whole: in
    its place, or where even putting it back fails, beside it under a name that ends in `-old`.

    Raises:
        FileExistsError: `folder` exists and isn't empty, and `overwrite` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file, expected a folder to write")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: already there; choose another folder or ask to overwrite it")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    mounted = _is_mounted(folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder if mounted else folder.parent))
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        if mounted:
            _replace_contents(folder, temporary, old)
        else:
            _replace_folder(folder, temporary, old)
    except BaseException as error:
        with suppress(OSError):  # it is empty if all was put back
            old.rmdir()
        if old.exists():
            raise OSError(
                f"{folder}: couldn't be replaced, nor put back ({error}): what it held is in {old}"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    gone = old.with_name(old.name.removesuffix("-old") + "-gone")
    with suppress(OSError):
        old.rename(gone)  # one that is called old is whole
    shutil.rmtree(gone if gone.exists() else old, ignore_errors=True)


def _is_mounted(folder: Path) -> bool:
    """Whether a disk begins here. One bound from elsewhere on the same disk looks like any folder: Linux lists it."""
    listed = Path("/proc/self/mountinfo")
    mounts = [line.split()[4] for line in listed.read_text().splitlines()] if listed.exists() else []
    return folder.is_mount() or str(folder).replace(" ", r"\040") in mounts


def _replace_folder(folder: Path, new: Path, old: Path) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def _replace_contents(folder: Path, new: Path, old: Path) -> None:
    """Moves what `folder` holds to `old` and what `new` holds to `folder`, all of it within that folder; or nothing."""
    old.mkdir()
    before = [path for path in folder.iterdir() if path not in (new, old) and path.name != DISKS_OWN]
    with ExitStack() as undo:
        for path in before:
            path.rename(old / path.name)
            undo.callback((old / path.name).rename, path)
        for path in list(new.iterdir()):
            path.rename(folder / path.name)
            undo.callback((folder / path.name).rename, path)
        undo.pop_all()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_text_files(source: Path, target: Path, patterns: Sequence[str] = TEXT_FILES) -> None:
    """Copy the tokenizer's and generation's files; the configuration and the weights are written anew."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and not NOT_COPIED.fullmatch(path.name):
                shutil.copyfile(path, target / path.name)
