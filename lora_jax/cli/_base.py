"""The base model that a command works on: its flags, and how it is loaded, with or without an adapter."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

import lora_jax
from lora_jax._processes import several
from lora_jax._quantize.transform import round_activations
from lora_jax._sharding import spread_over
from lora_jax._tree import trained_paths
from lora_jax.cli import _mesh, _named_base, _new_tokens, _show
from lora_jax.demo import text_to_sql
from lora_jax.peft import adapter_folder

# `lora_jax.models` is used through the package, which imports it at first use: `--help` doesn't wait for transformers.

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
DECODERS_HEAD = "score"  # which sees a row's last token
TRACED_TOKENS = 8  # length of the example with which the use of each kernel is traced


@dataclass(frozen=True, kw_only=True)
class LoRAFlags(lora_jax.LoRAConfig):
    """The settings of the adapter, with the flag `--lora-dtype`, because `--dtype` is the model's."""

    dtype: Annotated[str, tyro.conf.arg(name="lora-dtype")] = "float32"


LORA = LoRAFlags(rank=8, alpha=16)
LORA_EMBEDDED = LoRAFlags(rank=text_to_sql.DEFAULTS.rank, alpha=text_to_sql.DEFAULTS.alpha)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model."""

    model: str | None = None
    """Hugging Face folder, or the hub's owner/model; if not given, the model that the adapter names, or the embedded
    model"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub; that which the adapter names, or main, if not given"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the model's weights and activations; as in the files if not given (the embedded model: float32)"""
    adapter_folder: tyro.conf.Suppress[Path | None] = None
    """folder of the adapter, whose tokenizer takes precedence over the model's"""
    template_file: tyro.conf.Suppress[Path | None] = None
    """file of a chat template, which takes precedence over the tokenizer's"""

    def for_adapter(self, adapter: Path | None) -> "Base":
        """Return the base of this adapter: the model that was given, or else the one that the adapter names.

        Raises:
            OSError: The named model can't be found.
            ValueError: The adapter names no model and doesn't fit the embedded one.
        """
        if adapter is None:
            return self
        base = replace(self, adapter_folder=adapter)
        if self.model is None and (named := _named_base.base_of(adapter)) is None:
            model = base.abstract()
            if not _named_base.fits(adapter, model, kernel_axes(model)):
                raise ValueError(
                    f"{adapter}: its adapter_config.json names no base model (base_model_name_or_path), and it doesn't "
                    "fit the embedded model: give --model"
                )
        elif self.model is None and named != _named_base.EMBEDDED:
            at = None if Path(named).is_dir() else adapter_folder.revision(adapter)
            base = replace(base, model=named, revision=self.revision or at)
            _show.notes().print(f"model: {named}, which {adapter} names", markup=False, soft_wrap=True)
        if own := lora_jax.models.tokenizer_in(adapter):
            _show.notes().print(f"{own}: the one in {adapter}", markup=False, soft_wrap=True)
        elif _named_base.trains_tokens(adapter):
            note = f"tokenizer: {adapter} trained embeddings of tokens but holds none; the model's own is used"
            _show.notes().print(note, markup=False, soft_wrap=True)
        return base

    @property
    def folder(self) -> str | Path:
        """The model's folder, or its name on the hub."""
        return text_to_sql.BASE if self.model is None else self.model

    def _place(self, *, weights: bool) -> str | Path:
        """Return the folder, or the name on the hub, from which the model is read: of a revision, its local copy.

        Raises:
            ValueError: A revision is given without a name on the hub.
        """
        if self.revision is None:
            return self.folder
        return lora_jax.models.find(self.folder, weights=weights, revision=self.revision)

    @property
    def name(self) -> str:
        """The model's name, as an adapter's configuration has it."""
        return _named_base.EMBEDDED if self.model is None else self.model

    @property
    def loaded_dtype(self) -> str | None:
        """The dtype to load the weights in; None for the files' own."""
        # The embedded weights are stored in half precision only to make the package small.
        return self.dtype or ("float32" if self.model is None else None)

    @property
    def execution(self) -> dict[str, Any]:
        """Settings of the model's computation, for commands that compute with it."""
        return {}

    def devices(self, rows: int) -> Mesh | None:
        """Return the mesh to compute on, for batches of so many rows; None for one device."""
        return None

    def abstract(self, *, labels: Sequence[str] | None = None) -> Any:
        """Return the model without weights, so that errors in its configuration are found before weights are read."""
        return self._with_tokenizer(
            lora_jax.models.load_abstract(
                self._place(weights=False), self.loaded_dtype, labels=labels, **self.execution
            )
        )

    def load(
        self,
        dtype: str | None = None,
        *,
        labels: Sequence[str] | None = None,
        key: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> Any:
        """Return the model with its weights; `labels` and `key` make a head if it has none that
        predicts these labels.
        """
        with _show.working(f"reading {self.name}"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transform = self._transform(labels)
            model = lora_jax.models.load(
                self._place(weights=True),
                dtype or self.loaded_dtype,
                labels=labels,
                key=key,
                transform=transform,
                mesh=mesh,
                **self.execution,
            )
            if mesh is not None and transform is not None:  # the arrays of new leaves aren't on the mesh yet
                where = lora_jax.shardings(model.params, lora_jax.models.shardings(model))
                model = replace(model, params=jax.device_put(model.params, where))
        notes = [*([] if transform else _stay_in_few_bits(model)), *(str(warning.message) for warning in caught)]
        for message in dict.fromkeys(notes):
            _show.notes().print(message, markup=False, soft_wrap=True)
        return self._with_tokenizer(model)

    def _transform(self, labels: Sequence[str] | None) -> Callable[[Any], Any] | None:
        """Return the transform of the weights while they are read."""
        return None

    def load_streamed(self, labels: Sequence[str] | None = None, key: jax.Array | None = None) -> Any:
        """Return the model with its weights still in their files, from which they are read one tensor at a time."""
        return self._with_tokenizer(
            lora_jax.models.load_streamed(self._place(weights=True), self.loaded_dtype, labels=labels, key=key)
        )

    def _with_tokenizer(self, model: Any) -> Any:
        model = _new_tokens.fitted(model, self.adapter_folder)
        return replace(model, adapter=self.adapter_folder, template=self.template_file)


@dataclass(frozen=True, kw_only=True)
class EvaluatedBase(Base):
    """The base model, and how its outputs are computed."""

    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = "auto"
    """attention's implementation. auto: the fastest on this platform. cudnn (CUDA, 16-bit) and splash (TPU) are fused
    kernels; xla has the scores of all pairs of tokens in memory, blockwise a part of them"""
    mesh: str | None = None
    """devices to compute on, as sizes of the mesh's axes: data (batches are cut), fsdp (batches and weights) and model
    (heads and MLPs): data=2,fsdp=4. auto: all devices, fsdp as far as the batch divides. One device if not given"""

    def devices(self, rows: int) -> Mesh | None:
        return None if self.mesh is None else _mesh.parse(self.mesh, rows)

    quantize: Literal["nf4", "int4", "int8", "fp8"] | None = None
    """number format of the linear kernels, embeddings and heads excepted, to which they are rounded as they are read:
    nf4 (QLoRA's, 4.13 bits), int4 (4.5), int8, fp8; none if not given"""
    quantize_activations: Literal["int8"] | None = None
    """round the activations that meet kernels in int8 too, and multiply 8-bit integers, for which TPUs and GPUs have
    faster units; needs --quantize int8 or a model in bitsandbytes' int8. Kernels are dequantized if not given"""

    def __post_init__(self) -> None:
        if self.quantize_activations is not None and self.quantize not in (None, "int8"):
            raise ValueError(
                f"quantize_activations: {self.quantize_activations!r} given with --quantize {self.quantize}, expected"
                " --quantize int8; leave one of them out"
            )

    def load(self, *args: Any, **kwargs: Any) -> Any:
        rounds = self.quantize_activations is not None and self.quantize is None
        if rounds and not lora_jax.models.quant_method(self._place(weights=False)):  # before weights are read
            raise self._no_kernel_in_int8()
        model = super().load(*args, **kwargs)
        if not rounds:
            return model
        if not any(getattr(leaf, "scheme", "") == "int8" for leaf in lora_jax.models.flatten(model.params).values()):
            raise self._no_kernel_in_int8()
        return replace(model, params=round_activations(model.params, self.quantize_activations))

    def _no_kernel_in_int8(self) -> ValueError:
        return ValueError(
            f"quantize_activations: {self.quantize_activations!r} given, but {self.name} has no kernel in int8;"
            " give --quantize int8 too"
        )

    def _transform(self, labels: Sequence[str] | None) -> Callable[[Any], Any] | None:
        # The leaves that train in full stay as they are; which ones a new head has, the files alone show.
        in_full = () if labels is None or self.quantize is None else head_leaves(self.load_streamed(labels))
        if (config := self.quantize_config(in_full)) is None:
            return None
        axes = kernel_axes(self.abstract(labels=labels))
        return lambda params: lora_jax.quantize(params, config, axes=axes)

    def quantize_config(self, in_full: Sequence[str]) -> lora_jax.QuantizeConfig | None:
        """Return the settings of the kernels' rounding, which leaves out those that train in full."""
        if self.quantize is None:
            return None
        return lora_jax.QuantizeConfig(scheme=self.quantize, exclude=in_full, activations=self.quantize_activations)

    @property
    def rounding(self) -> dict[str, str]:
        """The flags of the kernels' and the activations' rounding that are given, by name."""
        given = {"quantize": self.quantize, "quantize_activations": self.quantize_activations}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def execution(self) -> dict[str, Any]:
        # Unrolled layers would compile longer than they save here.
        return {"attention": self.attention, "remat": "none", "layers": "scan"}


@dataclass(frozen=True, kw_only=True)
class DecodedBase(EvaluatedBase):
    """A base model that generates token by token."""

    @property
    def execution(self) -> dict[str, Any]:
        # Without a loop over the layers, XLA dequantizes all of them ahead of the loop over tokens.
        in_few_bits = self.quantize or lora_jax.models.quant_method(self._place(weights=False))
        return {"attention": self.attention, "remat": "none", "layers": "scan" if in_few_bits else "auto"}


@dataclass(frozen=True, kw_only=True)
class TrainedBase(EvaluatedBase):
    """The base model, and how its gradients are computed."""

    remat: Literal["auto", "none", "lean", "full"] = "auto"
    """activations that the backward pass recomputes to save memory. full: all inside a layer; lean: all but products
    with kernels and attention's output. auto: none on CPUs, else lean"""
    layers: Literal["auto", "scan", "unrolled"] = "auto"
    """scan: one loop over the layers. unrolled: no loop, which is 5 to 9 percent faster on GPUs and compiles longer.
    auto: unrolled on CUDA, else scan"""

    @property
    def execution(self) -> dict[str, Any]:
        return {"attention": self.attention, "remat": self.remat, "layers": self.layers}


def _stay_in_few_bits(model: Any) -> list[str]:
    """Return a line on the kernels that are in few bits in the model's folder and stay so."""
    leaves = lora_jax.models.flatten(model.params).values()
    schemes = sorted(leaf.scheme for leaf in leaves if isinstance(leaf, lora_jax.Quantized))
    named = ", ".join(f"{schemes.count(scheme)} in {scheme}" for scheme in dict.fromkeys(schemes))
    return [f"kernels that stay in few bits, as they are in {model.folder}: {named}"] if schemes else []


def head_leaves(model: Any) -> tuple[str, ...]:
    """Return patterns of the leaves that train in full on labels: the leaves of the head, and all
    newly initialised leaves.
    """
    if not model.head:
        return ()
    new = (path for path in model.newly_initialized if not path.startswith(f"{model.head}/"))
    return (f"/{model.head}/.*/", *new)


def kernel_axes(model: Any) -> lora_jax.KernelAxes:
    """Return the axes of the model's kernels, from an abstract trace."""
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, lora_jax.Quantized),
    )
    return lora_jax.kernel_axes(model.apply, params, jax.ShapeDtypeStruct((1, TRACED_TOKENS), jnp.int32))


def with_adapter(model: Any, adapter: Path | None) -> Any:
    """Return the model's parameters, with the adapter's nodes if an adapter is given.

    Raises:
        ValueError: The adapter doesn't fit, or lacks leaves that the model doesn't have either.
    """
    if adapter is None:
        return model.params
    params = lora_jax.peft.load(adapter, model.params, names=model.names, axes=kernel_axes(model))
    trained = trained_paths(params)
    if missing := [path for path in model.newly_initialized if path not in trained]:
        raise ValueError(
            f"{adapter}: {missing[0]} is neither in the adapter nor in the model; give the model of its training"
        )
    if model.mesh is None or not several():
        return params
    # Each process has read all of the factors, and the base's kernels in parts.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of axes that can't be divided: `load` has printed them
        return spread_over(model.mesh, params, lora_jax.models.flatten(lora_jax.models.shardings(model)))


def check_generates(model: Any) -> None:
    """Refuse rows of text for a model that predicts no next token."""
    if not model.generates:
        name = model.config.architectures[0] if model.config.architectures else model.config.model_type
        raise ValueError(
            f'{name} predicts no next token: give rows of {{"text", "label"}}; with --text-column, --label-column too'
        )


def check_prefix(length: int, model: Any) -> None:
    """Refuse a prefix that leaves fewer than two positions for an example."""
    if not 0 <= length <= model.max_length - 2:
        raise ValueError(
            f"prefix_length: {length} given, expected 0 to {model.max_length - 2} for {model.max_length} positions"
        )


def prefix_place(model: Any) -> int:
    """Return the number of an example's tokens before a prefix: 1 for an encoder, whose head pools the first token."""
    return 0 if model.generates or model.head == DECODERS_HEAD else 1


def check_free(folder: Path, overwrite: bool, *sources: str | Path | None) -> None:
    """Refuse an output folder that isn't empty or is one of the command's inputs; call this before reading them."""
    check_writable(folder)
    if any(source is not None and folder.resolve() == Path(source).resolve() for source in sources):
        raise FileExistsError(f"{folder}: is read by this command and would be lost; pass another --output")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; pass --overwrite or another --output")


def check_adapter_written_here(folder: Path) -> None:
    """Refuse to overwrite an adapter that wasn't written by this library."""
    if (folder / ADAPTER[0]).exists() and not adapter_folder.saved_here(folder):
        raise FileExistsError(
            f"{folder}: holds {ADAPTER[0]}, which was not written here and would be lost; pass another --output"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that can't be created or written to; call this before computing anything."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise FileExistsError(
            f"{folder}: {'' if existing == folder else f'{existing} is '}a file, expected a folder to write"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: {existing} can't be written to; give another --output")
