"""The settings of `lora_jax.init`: which kernels to adapt, and how."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax.numpy as jnp

from lora_jax._paths import ATTENTION, check_patterns

MOST_RANK = 2**16  # above the full rank of today's kernels
Scaling = Literal["standard", "rank_stabilized"]
Initializer = Literal["kaiming_normal", "kaiming_uniform", "gaussian", "pissa", "loftq"]
CHANGES_KERNELS = ("pissa", "loftq")  # the initialisations that take A B out of W

# The names of PEFT's settings, and of some trainers', in this library.
PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_r": "rank",
    "target_modules": "targets",
    "target_parameters": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "also_train",
    "bias": "also_train=['q_proj/bias', ...]",
    "rank_pattern": "overrides=[Override(target=..., rank=...)]",
    "alpha_pattern": "overrides=[Override(target=..., alpha=...)]",
    "layers_to_transform": "overrides, with rank 0 for a layer to leave alone",
    "use_rslora": "scaling='rank_stabilized'",
    "init_lora_weights": "init",
    "use_dora": "dora",
    "dropout": "adapt's: adapt(fn, dropout=...)",
    "lora_dropout": "adapt's: adapt(fn, dropout=...)",
    "task_type": "peft.save's",
    "base_model_name_or_path": "peft.save's base_model",
    "trainable_token_indices": "peft.save's tokens",
    "fan_in_fan_out": "what init's axes say",
    "ensure_weight_tying": "always so: a tied kernel is one leaf",
    "peft_type": "not needed",
    "inference_mode": "not needed",
}
_MOST_NAMED = 130  # characters of such names in one message

Config = TypeVar("Config")


def _knows_peft(config: type[Config]) -> type[Config]:
    """Make a dataclass answer settings under PEFT's names with an error that has our names."""
    made: Any = config.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        if args:
            raise ValueError(f"{config.__name__}: {args[0]!r:.40} given by position; settings go by name, as in rank=8")
        own = {field.name for field in dataclasses.fields(self)}
        if theirs := [name for name in settings if name not in own and name in PEFT_NAMES]:
            raise ValueError(f"{config.__name__}: {_renamed(theirs)}")
        made(self, **settings)

    config.__init__ = __init__
    return config


def _renamed(theirs: Sequence[str]) -> str:
    """Translate PEFT's names into ours, as many as fit into a line.

    >>> _renamed(["r", "lora_alpha"])
    "r is here rank; lora_alpha is alpha (these are PEFT's names)"
    """
    words = [f"{name} is {'here ' if name == theirs[0] else ''}{PEFT_NAMES[name]}" for name in theirs]
    shown = [word for at, word in enumerate(words) if at == 0 or len("; ".join(words[: at + 1])) <= _MOST_NAMED]
    rest = f"; and {len(words) - len(shown)} more" if len(shown) < len(words) else ""
    return f"{'; '.join(shown)}{rest} (these are PEFT's names)"


@_knows_peft
@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """Another rank or alpha for some of the targets.

    Attributes:
        target: A pattern, as in `LoRAConfig.targets`.
        rank: The rank of these kernels; for a stacked kernel also one for each stack index, 0 where it isn't adapted.
        alpha: The alpha of these kernels; for a stacked kernel also one for each stack index.

    >>> LoRAConfig(rank=8, alpha=16, targets=("q", "v"), overrides=[Override(target="v", rank=2)]).overrides
    (Override(target='v', rank=2, alpha=None),)
    >>> Override(target="layers/q", rank=[8, 0, 4]).rank  # of three stacked layers, the second isn't adapted
    (8, 0, 4)
    """

    target: str
    rank: int | tuple[int, ...] | None = None
    alpha: float | tuple[float, ...] | None = None

    if TYPE_CHECKING:  # the types that may be given; __post_init__ converts them to the fields' types

        def __init__(
            self,
            *,
            target: str,
            rank: int | Sequence[int] | None = None,
            alpha: float | Sequence[float] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_patterns([self.target], "overrides")
        object.__setattr__(self, "rank", _tuple_if_sequence(self.rank))
        object.__setattr__(self, "alpha", _tuple_if_sequence(self.alpha))
        each = isinstance(self.rank, tuple)
        for rank in _as_tuple(self.rank):
            _check_rank(rank, f"overrides: {self.target!r}: rank", least=0 if each else 1)
        for alpha in _as_tuple(self.alpha):
            _check_alpha(alpha, f"overrides: {self.target!r}: alpha")
        if each and not any(_as_tuple(self.rank)):
            raise ValueError(f"overrides: {self.target!r}: rank is 0 everywhere; use exclude to leave a kernel alone")


@_knows_peft
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Settings of `init`: the kernels to adapt, and how.

        y = x W + scale · (x A) B,    scale = alpha / rank  ("standard")  or  alpha / √rank  ("rank_stabilized")

    Patterns name leaves by a suffix of whole path components, with or without the final leaf name (`"q_proj"`,
    `"attn/out"`); by a regular expression between slashes that must match the whole path; or by a preset:

    - `"attention"`: the query, key, value and output projections, under the names `query key value out` (Linen, NNX;
      the output is `linear` in Haiku, `attention/output/dense` in BERT, RoBERTa and ViT), `q_proj k_proj v_proj` with
      `o_proj` or `out_proj` (Llama, Mistral, Qwen, Gemma, OPT, BART, CLIP), `q k v o` (T5), `q_lin k_lin v_lin out_lin`
      (DistilBERT), `c_attn c_proj` (GPT-2), `query_key_value dense` (GPT-NeoX, BLOOM, Falcon), `qkv_proj` with `o_proj`
      or `out_proj` (Phi-3, CodeGen), `Wqkv out_proj` (MPT), `qkv proj` (timm), and `q_einsum kv_einsum` or `qkv_einsum`
      with `attn_vec_einsum` (Gemma).
    - `"all-linear"`: every kernel that `lora_jax.kernel_axes` sees contracted with activations, output heads and
      embeddings left out.

    Where several patterns match, the first wins.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: Numerator of the scale.
        targets: Patterns of the kernels to adapt.
        exclude: Patterns of kernels to leave alone.
        overrides: Other ranks and alphas for some of the targets; the first that matches a kernel counts.
        scaling: `"standard"` as in the paper, or `"rank_stabilized"` (Kalajdzievski 2023, arXiv 2312.03732).
        init: Distribution of A at the start, where B is zero. `"kaiming_normal"` is N(0, 1/(3·inputs)): Gaussian as in
            the paper (section 4.1; it gives no size), with the variance of `"kaiming_uniform"`, U(±1/√inputs), the
            default of loralib and PEFT (Kaiming's with a = √5). `"gaussian"` is N(0, 1/rank²), PEFT's option of that
            name. An embedding starts with A = 0 and B from N(0, 1) under all three, as in loralib and PEFT. Two more
            start with the largest part of a kernel in A B, and with W less that part: `"pissa"`, of W (Meng et al.
            2024, arXiv
                2404.02948); `"loftq"`, of what quantization loses (Li et al. 2023, arXiv 2310.08659), with `init`'s
                `quantize`.
        dtype: Dtype of A and B. In bfloat16 small updates of Adam's are rounded away. In float16 its eps of 1e-8 is 0,
            and the second step gives nan: `init` refuses it. A base in float16, and an adapter that was saved in it,
            are fine.
        also_train: Patterns of leaves trained in full: heads, biases, norms.
        dora: Whether to train the norm of each output's kernel as a parameter of its own, the node's magnitude (DoRA,
            Liu et al. 2024, arXiv 2402.09353): W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, with m = ‖W‖ at the start.

    Raises:
        ValueError: A setting is out of range or unknown, or has PEFT's name for it.

    >>> LoRAConfig(rank=8, alpha=16, targets=["q_proj", "v_proj"]).targets
    ('q_proj', 'v_proj')
    >>> LoRAConfig(rank=0, alpha=16)
    Traceback (most recent call last):
    ValueError: rank: 0 given, expected a whole number of 1 or more
    >>> LoRAConfig(r=8, lora_alpha=16)
    Traceback (most recent call last):
    ValueError: LoRAConfig: r is here rank; lora_alpha is alpha (these are PEFT's names)
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ATTENTION,)
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    scaling: Scaling = "standard"
    init: Initializer = "kaiming_normal"
    dtype: str = "float32"
    also_train: tuple[str, ...] = ()
    dora: bool = False

    if TYPE_CHECKING:  # the types that may be given; __post_init__ converts them to the fields' types

        def __init__(
            self,
            *,
            rank: int,
            alpha: float,
            targets: str | Sequence[str] = ...,
            exclude: str | Sequence[str] = ...,
            overrides: Sequence[Override] = ...,
            scaling: Scaling = ...,
            init: Initializer = ...,
            dtype: str | Any = ...,
            also_train: str | Sequence[str] = ...,
            dora: bool = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        for field in ("targets", "exclude", "also_train"):
            object.__setattr__(self, field, _as_tuple(getattr(self, field)))
            check_patterns(getattr(self, field), field)
        object.__setattr__(self, "overrides", tuple(self.overrides))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        _check_rank(self.rank, "rank", least=1)
        _check_alpha(self.alpha, "alpha")
        for field, known in (("scaling", Scaling), ("init", Initializer)):
            _check_choice(getattr(self, field), field, known.__args__)
        if not self.targets and not self.also_train:
            raise ValueError("targets: none given, and also_train is empty too; nothing would train")
        if not self.targets and (self.exclude or self.overrides):
            raise ValueError("targets: none given, but exclude or overrides are; they choose among the targets")

    def scale(self, rank: int, alpha: float) -> float:
        """Return the scale of a kernel with this rank and alpha, alpha / rank or alpha / √rank; 0 for rank 0.

        >>> LoRAConfig(rank=8, alpha=16, scaling="rank_stabilized").scale(4, 16)
        8.0
        """
        if rank == 0:
            return 0.0
        return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))


def _as_tuple(x: Any) -> tuple:
    if x is None:
        return ()
    return (x,) if isinstance(x, str) or not isinstance(x, Sequence) else tuple(x)


def _tuple_if_sequence(x: Any) -> Any:
    return tuple(x) if isinstance(x, Sequence) else x


def _check_rank(rank: Any, what: str, *, least: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < least:
        raise ValueError(f"{what}: {rank!r} given, expected a whole number of {least} or more")
    if int(rank) > MOST_RANK:
        raise ValueError(f"{what}: {rank!r} given, expected at most {MOST_RANK}")


def _check_alpha(alpha: Any, what: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not 0 < float(alpha) < math.inf:
        raise ValueError(f"{what}: {alpha!r} given, expected a finite number above 0")


def _check_choice(given: Any, what: str, known: Sequence[str]) -> None:
    if given not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{what}: {given!r} given, expected {', '.join(others)} or {last}")


def _dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name is None or not jnp.issubdtype(name, jnp.floating):
        raise ValueError(f"dtype: {dtype!r} given, expected a floating-point type such as 'float32'") from None
    return name
