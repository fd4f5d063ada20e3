"""Uploads an adapter to the Hugging Face hub."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lora_jax._extras import require
from lora_jax.cli import _card, _labels, _show

# What is of use to others: no checkpoints, and no run.yaml, which has the paths of this machine.
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "prefix/*", _labels.FILE, _card.CARD, _card.CURVE),
    *TOKENIZER,
)


def check(name: str) -> None:
    """Refuse a name that the hub can't have, or a machine without a login, before anything is trained.

    Raises:
        ValueError: The name isn't `owner/name`, or there is no token.
    """
    hub = _hub()
    try:
        import_module("huggingface_hub.utils").validate_repo_id(name)
    except import_module("huggingface_hub.errors").HFValidationError as error:
        raise ValueError(f"push_to_hub: {name!r:.80} given, expected owner/name ({error!s:.80})") from None
    if "/" not in name:
        raise ValueError(f"push_to_hub: {name!r} given, expected owner/name")
    if hub.get_token() is None:
        raise ValueError("push_to_hub: no token of the hub on this machine; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> None:
    """Upload the adapter, and make its repository, a private one, if it isn't there.

    Raises:
        OSError: The hub can't be reached or refuses; the adapter is complete on the disk.
    """
    hub = _hub()
    api = hub.HfApi(library_name="lora_jax")
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message="Upload of lora-jax train"
        )
    except Exception as error:  # the hub's errors, and those of its HTTP client, have no common base
        why = " ".join(str(error).split())
        raise OSError(
            f"push_to_hub: {name}: not uploaded ({why:.90}); the adapter is complete in {folder}: upload it with"
            f" `hf upload {name} {folder}`"
        ) from error
    _show.results().print(f"uploaded: {commit}", markup=False, soft_wrap=True)


def _hub() -> Any:
    require("--push-to-hub", hf=("huggingface_hub",))
    return import_module("huggingface_hub")  # here, because few runs use it and help doesn't wait for it
