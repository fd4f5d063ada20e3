"""A model's folder: finding it, locally or on the hub, its configuration, and the files that are copied from it."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lora_jax.models import _settings
from lora_jax.models._family import Family
from lora_jax.models._packed import check_method
from lora_jax.models._settings import CONFIG

TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
WEIGHT_FILES = ("*.safetensors",)
NOT_COPIED = re.compile(
    r"config\.json|.*\.safetensors\.index\.json|pytorch_model\.bin\.index\.json|adapter_config\.json"
)

_FOUND_BY = re.compile(r"(Class v|V)alidation error for (field|validator) '\w+': (\w+: )?")


def find(path_or_hub_id: str | os.PathLike[str], *, weights: bool, revision: str | None = None) -> Path:
    """Find the local folder of a model; a model on the hub is downloaded first, unless it is in the hub's cache.

    Args:
        path_or_hub_id: A folder, or `owner/model`.
        weights: Whether the weights are needed too.
        revision: A branch, tag or commit on the hub; defaults to its main branch.

    Raises:
        FileNotFoundError: There is no such folder, and no such model can be downloaded from the hub.
        NotADirectoryError: It is a file.
        ValueError: A revision of a local folder is given.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> find(folder, weights=True) == Path(folder)
    True
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir() and revision is not None:
        raise ValueError(f"revision: {revision} given for {folder}, which is a local folder; leave it out")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder}: a file, expected a model's folder (with {CONFIG} in it)")
    name = os.fspath(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{folder}: no such folder, and no name on the hub (owner/model) either")
    try:
        patterns = [*TEXT_FILES, *(WEIGHT_FILES if weights else ())]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub can't be reached for a model with this name; give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        what = "this name" if revision is None else f"this name at revision {revision:.60}"
        raise FileNotFoundError(f"{name}: no such folder, and the hub refuses {what}: {reason}") from None


def read_config(folder: Path, families: Mapping[str, Family]) -> tuple[Family, Any]:
    """Read the family and the transformers configuration of the folder's model.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: It isn't JSON, describes a model that isn't supported, or has an invalid setting.
    """
    path, values = folder / CONFIG, _settings.read(folder)
    try:
        if not isinstance(model_type := values.get("model_type"), str | None):
            raise ValueError(f"model_type: {_settings.shown(model_type)} given, expected a model type's name")
        family = family_of(model_type, values.get("architectures"), families)
        check_method(values.pop("quantization_config", None))  # of the files, not of the model
        _settings.check(values, family.config_class)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in ("dtype", "torch_dtype"):  # transformers looks both up in torch
        if isinstance(values.get(name), str):
            values[name] = values[name].removeprefix("torch.")
    try:
        return family, family.config_class(**values)  # `from_dict` formats it for the log, which takes seconds
    except Exception as error:  # transformers' validators raise many types
        raise ValueError(f"{path}: not a valid {family.config_class.__name__}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the message of an error, without the place in transformers that raised it."""
    text = _settings.one_line(error, 1000)
    return _settings.one_line(ValueError(_FOUND_BY.sub("", text)), 110)


def family_of(model_type: Any, architectures: Any, families: Mapping[str, Family]) -> Family:
    """Return the family of a configuration: of its architecture, or the first of its model type if it names none.

    Raises:
        ValueError: The family isn't supported.
    """
    if not isinstance(architectures or [], list) or not all(isinstance(name, str) for name in architectures or ()):
        raise ValueError(f"architectures: {_settings.shown(architectures)} given, expected a list of names")
    of_type = {name: family for name, family in families.items() if family.config_class.model_type == model_type}
    for name in architectures or of_type:
        if name in of_type:
            return of_type[name]
    if of_type:
        supported = f"the supported ones with model_type {model_type} are {', '.join(sorted(of_type))}"
        raise ValueError(f"{ascii(architectures[0][:60])[1:-1]} is not supported; {supported}")
    types = sorted({family.config_class.model_type for family in families.values()})
    raise ValueError(f"model_type {_settings.shown(model_type, 30)} is not supported; supported are {', '.join(types)}")


def copy_text_files(source: Path, target: Path, patterns: Sequence[str] = TEXT_FILES) -> None:
    """Copy the files of tokenizer and generation, but not the configuration and the weights."""
    for path in text_files(source, patterns):
        shutil.copyfile(path, target / path.name)


def text_files(folder: Path, patterns: Sequence[str] = TEXT_FILES) -> list[Path]:
    """Return the files that are copied from a model's folder to a new one."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return [path for path in found if path.is_file() and not NOT_COPIED.fullmatch(path.name)]
