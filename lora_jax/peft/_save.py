"""Saving an adapter in PEFT's format: both files are complete before either appears in the folder."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax import _disk, prefix
from lora_jax._huggingface import trees
from lora_jax._huggingface.tensors import Weight
from lora_jax._processes import on_host, one_writes
from lora_jax.peft import _adapter_config_file, _check_arguments, _prefix_folder, _token_rows
from lora_jax.peft._adapter_config import CHECKSUM, checksum
from lora_jax.peft._adapter_config_file import CONFIG_FILE
from lora_jax.peft._collect import collect
from lora_jax.peft._derived_config import config_of
from lora_jax.peft._named_tensors import named
from lora_jax.peft._safetensors_file import TENSORS_FILE


def save(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    names: Mapping[str, Weight],
    also_train: Any = (),
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    portable: bool = False,
    tokens: Mapping[str, Sequence[int]] | None = None,
    fused: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the adapter in `params` as a folder that PEFT, transformers and vLLM load.

    `adapter_model.safetensors` gets, for each adapted module (each layer of a stacked leaf is one),
    `lora_A.weight = aᵀ` (rank, in) and `lora_B.weight = bᵀ` (out, rank). `adapter_config.json` gets ranks and alphas.
    Where they differ between modules they are patterns, each the full name of one module, so that the order of patterns
    can't matter. Nodes with magnitudes are saved under `use_dora`, each with its `lora_magnitude_vector`. Padded ranks
    and layers with scale 0 are left out. A tree may also have leaves trained in full and no nodes. The file contains a
    checksum of config and tensors, which `load` verifies.

    Prefix embeddings are saved in a folder `prefix`, which PEFT reads as an adapter of type PROMPT_TUNING. PEFT can't
    use both at once; a field of the config makes it warn when it loads the adapter without the prefix.

    The files are moved into place when all are complete: after any failure an earlier adapter is as it was. Of several
    processes all call this; the first one writes, and the others wait for it.

    Args:
        folder: The folder to write; created if it doesn't exist. Other files in it are kept.
        params: The tree with its nodes, or only the adapter (`lora_jax.split(params)[1]`).
        names: The Hugging Face name of each leaf: `model.names`.
        also_train: Other leaves that were trained in full, as given to `lora_jax.split`: saved as `modules_to_save`
            (biases of adapted modules as `bias="lora_only"`). In an adapter tree they are known without it.
        base_model: The name or path of the base model, which PEFT's `AutoPeftModel` loads.
        revision: The branch, tag or commit of the base model on the hub.
        task_type: PEFT's task, such as `"CAUSAL_LM"`.
        portable: Whether to fold the scale into B and pad to one rank, for tools that ignore patterns: alpha = r
            everywhere. DoRA has no such form.
        tokens: Rows of embeddings that were trained, by the path of the leaf (`embed_tokens/embedding`), or of a head
            that isn't tied. No other rows of these leaves are saved (`trainable_token_indices`), whether `also_train`
            names them or not. The rows of `lora_jax.init_rows` are known without it.
        fused: Whether to write experts as transformers 5 has them (`target_parameters`), which other tools may not
            read. Without it each expert has an entry, unless PEFT would read the entries wrong: where ranks or alphas
            differ, some experts are left out, or gate is adapted without up.
        overwrite: Whether to replace an adapter that is there.

    Raises:
        FileExistsError: `folder` holds an adapter and `overwrite` isn't set, or is a file.
        ValueError: An argument has the wrong type, nothing in `params` trains, a leaf isn't in `names`, PEFT's format
            can't express the adapter, or a value isn't finite.
        OSError: The files can't be written (disk full); an earlier adapter is as it was.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax, tempfile
        >>> from typing import NamedTuple
        >>> class Weight(NamedTuple):
        ...     name: str
        ...     transpose: bool
        >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("query",))
        >>> base = {"query": {"kernel": jnp.ones((3, 5))}}
        >>> params = lora_jax.init(jax.random.key(0), base, config)
        >>> names = {"query/kernel": Weight("encoder.query.weight", True)}
        >>> folder = tempfile.mkdtemp()
        >>> lora_jax.peft.save(folder, params, names=names)
        >>> again = lora_jax.peft.load(folder, base, names=names)
        >>> bool((again["query"]["kernel_lora"].a == params["query"]["kernel_lora"].a).all())
        True

    The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    folder, rows = _check_arguments.check_save(
        folder, params, names, also_train, tokens, base_model=base_model, revision=revision, task_type=task_type
    )
    with one_writes() as writes:  # the others don't look: the first one may be done before they are here
        if writes:
            _check_free(folder, overwrite)
    params, node = prefix.take(params)
    params, trained_rows = _token_rows.taken(params, names)
    saved = collect(
        trees.parts(params, also_train),
        names,
        portable=portable,
        tokens=rows,
        trained_rows=trained_rows,
        fused=fused,
        prefixed=node is not None,
    )
    config, tensors = config_of(saved), named(saved)
    _check_finite(tensors if node is None else {**tensors, prefix.PREFIX: on_host(node.value)})
    if node is not None:
        config = dataclasses.replace(config, lora_jax_prefix=_prefix_folder.declared(node))
    descriptive = {"base_model_name_or_path": base_model and os.fspath(base_model), "task_type": task_type}
    descriptive |= {} if revision is None else {"revision": revision}
    # transformers requires the format: "pt" means that tensors are named and laid out as PyTorch's are.
    metadata = {"format": "pt", CHECKSUM: checksum(config, tensors)}
    files = {
        TENSORS_FILE: safetensors.numpy.save(tensors, metadata),
        **_prefix_folder.files(node, config, **descriptive),
        CONFIG_FILE: _adapter_config_file.to_json(config, **descriptive).encode(),
    }
    with one_writes() as writes:
        if writes:
            _place(folder, files)


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter is saved as a folder")
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder} already holds an adapter; pass overwrite=True to replace it")


def _place(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Write all of `files` into a temporary folder, and move them into `folder` once they are on the disk.

    Files whose content is None are removed from `folder`.
    """
    try:
        with _disk.placing(folder, remove=[name for name, data in files.items() if data is None]) as beside:
            for name, data in files.items():
                if data is not None:
                    (beside / name).parent.mkdir(exist_ok=True)
                    _write(beside / name, data)
    except OSError as error:
        raise type(error)(error.errno, f"{folder}: the adapter was not saved: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _check_finite(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError where a value isn't finite."""
    for name, tensor in tensors.items():
        if not np.all(np.isfinite(tensor)):
            raise ValueError(
                f"{name}: has values that aren't finite, so the adapter isn't written; train again with a lower "
                "learning_rate or alpha"
            )
