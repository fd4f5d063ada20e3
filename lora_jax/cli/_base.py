"""The model that a command works on: its flags, and how it is opened, with or without an adapter."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

import lora_jax
from lora_jax._tree import trained_paths
from lora_jax.cli import _named, _show
from lora_jax.demo import text_to_sql
from lora_jax.peft import adapter_folder

# `lora_jax.models` is reached through the package, which loads it at first use: `--help` needn't wait for transformers.

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRACED_TOKENS = 8  # of the abstract call that tells how each kernel is used


@dataclass(frozen=True, kw_only=True)
class LoRAFlags(lora_jax.LoRAConfig):
    """The settings of the adapter, where `--dtype` is the model's."""

    dtype: Annotated[str, tyro.conf.arg(name="lora-dtype")] = "float32"


LORA = LoRAFlags(rank=8, alpha=16)
LORA_EMBEDDED = LoRAFlags(rank=text_to_sql.DEFAULTS.rank, alpha=text_to_sql.DEFAULTS.alpha)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model."""

    model: str | None = None
    """Hugging Face folder, or the hub's owner/model; if not given, what the adapter names, or the embedded model"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the model's weights and activations; as in the files if not given (the embedded model: float32)"""
    adapter_folder: tyro.conf.Suppress[Path | None] = None
    """whose tokenizer goes before the model's"""

    def of(self, adapter: Path | None) -> "Base":
        """The base of this adapter: the one that was given, or that the adapter names.

        Raises:
            OSError: what it names can't be found.
            ValueError: it names none, and isn't one of the embedded model's.
        """
        if adapter is None:
            return self
        base = replace(self, adapter_folder=adapter)
        if self.model is None and (named := _named.base_of(adapter)) is None:
            model = base.abstract()
            if not _named.fits(adapter, model, kernel_axes(model)):
                raise ValueError(
                    f"{adapter}: its adapter_config.json names no base model (base_model_name_or_path), and it isn't "
                    "one of the embedded model's: give --model"
                )
        elif self.model is None and named != _named.EMBEDDED:
            base = replace(base, model=named)
            _show.notes().print(f"model: {named}, which {adapter} names", markup=False, soft_wrap=True)
        if own := lora_jax.models.tokenizer_in(adapter):
            _show.notes().print(f"{own}: that in {adapter}", markup=False, soft_wrap=True)
        elif _named.trains_tokens(adapter):
            note = f"tokenizer: {adapter} trained embeddings of tokens but holds none; the model's own is used"
            _show.notes().print(note, markup=False, soft_wrap=True)
        return base

    @property
    def folder(self) -> str | Path:
        return text_to_sql.BASE if self.model is None else self.model

    @property
    def name(self) -> str:
        return _named.EMBEDDED if self.model is None else self.model

    @property
    def loaded_dtype(self) -> str | None:
        # The embedded weights are stored in half precision to be small, not to be computed with.
        return self.dtype or ("float32" if self.model is None else None)

    @property
    def execution(self) -> dict[str, Any]:
        """How the model is computed, where the command computes with it."""
        return {}

    def abstract(self, *, labels: Sequence[str] | None = None) -> Any:
        """The model without weights: errors in its configuration are found before anything large is read."""
        return self._with_tokenizer(
            lora_jax.models.load_abstract(self.folder, self.loaded_dtype, labels=labels, **self.execution)
        )

    def load(
        self,
        dtype: str | None = None,
        *,
        labels: Sequence[str] | None = None,
        key: jax.Array | None = None,
    ) -> Any:
        with _show.working(f"reading {self.name}"):
            dtype = dtype or self.loaded_dtype
            return self._with_tokenizer(
                lora_jax.models.load(self.folder, dtype, labels=labels, key=key, **self.execution)
            )

    def load_streamed(self, labels: Sequence[str] | None = None, key: jax.Array | None = None) -> Any:
        """The model with its weights left in their files, to be read one tensor at a time."""
        return self._with_tokenizer(
            lora_jax.models.load_streamed(self.folder, self.loaded_dtype, labels=labels, key=key)
        )

    def _with_tokenizer(self, model: Any) -> Any:
        return replace(model, adapter=self.adapter_folder)


@dataclass(frozen=True, kw_only=True)
class Computed(Base):
    """The model, of which outputs are computed."""

    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = "auto"
    """auto: the fastest on this platform. cudnn (CUDA, 16-bit) and splash (TPU) are kernels, xla holds all scores and
    blockwise some of them"""

    @property
    def execution(self) -> dict[str, Any]:
        return {"attention": self.attention, "remat": "none", "layers": "scan"}  # not worth a longer compilation


@dataclass(frozen=True, kw_only=True)
class Trained(Computed):
    """The model, of which gradients are computed."""

    remat: Literal["auto", "none", "lean", "full"] = "auto"
    """what the backward pass computes anew, to save memory: full, each layer; lean, all but its products with kernels
    and attention's output. auto: none on CPUs, else lean"""
    layers: Literal["auto", "scan", "unrolled"] = "auto"
    """scan: one loop over the layers. unrolled: none, faster on GPUs by 5 to 9 percent, and longer to compile. auto:
    unrolled on CUDA"""

    @property
    def execution(self) -> dict[str, Any]:
        return {"attention": self.attention, "remat": self.remat, "layers": self.layers}


def execution_line(model: Any, rows: int, length: int) -> str:
    """How a model is trained: one line to print."""
    return f"{model.attention(rows, min(length, model.max_length))}; remat: {model.remat}; layers: {model.layers}"


def kernel_axes(model: Any) -> lora_jax.KernelAxes:
    """How the model uses its kernels, from an abstract call."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    return lora_jax.kernel_axes(model.apply, params, jax.ShapeDtypeStruct((1, TRACED_TOKENS), jnp.int32))


def with_adapter(model: Any, adapter: Path | None) -> Any:
    """The model's parameters, with the adapter's nodes where one is given."""
    if adapter is None:
        return model.params
    params = lora_jax.peft.load(adapter, model.params, names=model.names, axes=kernel_axes(model))
    brought = trained_paths(params)
    if lacking := [path for path in model.newly_initialized if path not in brought]:
        raise ValueError(f"{adapter}: {lacking[0]} is neither in it nor in the model: it was trained with another base")
    return params


def check_generates(model: Any) -> None:
    """Refuses rows of text for a model that predicts no next token."""
    if not model.generates:
        what = model.config.architectures[0] if model.config.architectures else model.config.model_type
        raise ValueError(f'{what} is an encoder, which predicts no next token: give rows of {{"text", "label"}}')


def check_prefix(length: int, model: Any) -> None:
    """Refuses a prefix that leaves a row no two positions."""
    if not 0 <= length <= model.max_length - 2:
        raise ValueError(
            f"prefix_length: {length} given, expected 0 to {model.max_length - 2} for {model.max_length} positions"
        )


def prefix_place(model: Any) -> int:
    """How many of a row's tokens stand before a prefix: an encoder pools the first one for its head."""
    return 0 if model.generates else 1


def check_free(folder: Path, overwrite: bool, *sources: str | Path | None) -> None:
    """Refuses a folder that holds something, or one of the command's own sources, before anything is read for it."""
    check_writable(folder)
    if any(source is not None and folder.resolve() == Path(source).resolve() for source in sources):
        raise FileExistsError(f"{folder}: what is read from there would be lost; pass another --output")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; pass --overwrite or another --output")


def check_adapter_ours(folder: Path) -> None:
    """Refuses to overwrite an adapter that isn't of this library."""
    if (folder / ADAPTER[0]).exists() and not adapter_folder.saved_here(folder):
        raise FileExistsError(
            f"{folder}: holds {ADAPTER[0]}, which was not written here and would be lost; pass another --output"
        )


def check_writable(folder: Path) -> None:
    """Refuses a folder that can't be made or written to, before anything is computed for it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FileExistsError(
            f"{folder}: {'' if there == folder else f'{there} is '}a file, expected a folder to write"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: {there} can't be written to; give another --output")
