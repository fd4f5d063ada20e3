"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): encoders with a head for tokens, for texts, or none.

RoBERTa is BERT with positions that count real tokens and begin after the padding's id, and with other names of heads.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from transformers import BertConfig, RobertaConfig

from lora_jax.models import _attention
from lora_jax.models._attention_choice import Case, Choice, choose
from lora_jax.models._axis_rules import Layout
from lora_jax.models._execution import Execution, stacked
from lora_jax.models._family import Family, Weight
from lora_jax.models._layers import ACTIVATIONS, Embed, check_activation, dense, layer_norm, named
from lora_jax.models._settings import check_ratios


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The sizes and settings of a BERT or RoBERTa model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_positions: int
    token_types: int
    num_layers: int
    num_heads: int
    activation: str
    norm_eps: float
    first_position: int | None  # RoBERTa: the position of the first real token; None: positions count all tokens from 0
    head: str  # "none", "masked_lm" or "classification"
    num_labels: int
    init_std: float


def spec(config: Any, head: str) -> EncoderSpec:
    """Return the encoder that a `BertConfig` or `RobertaConfig` describes, with a head.

    Raises:
        ValueError: The variant isn't implemented; the message names it.
    """
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"{name} is not supported; only encoders are")
    if head == "masked_lm" and not config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings false is not supported for encoders; only a tied head is")
    check_activation(config.hidden_act)
    check_ratios(hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads)
    roberta, padding = config.model_type == "roberta", config.pad_token_id
    if roberta and (padding is None or not 0 <= padding < config.max_position_embeddings - 1):
        most = config.max_position_embeddings - 2
        raise ValueError(f"pad_token_id: {padding} given, expected 0 to {most}: positions begin after it")
    return EncoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        activation=config.hidden_act,
        norm_eps=config.layer_norm_eps,
        first_position=config.pad_token_id + 1 if roberta else None,
        head=head,
        num_labels=config.num_labels,
        init_std=config.initializer_range,
    )


class Embeddings(nn.Module):
    """The sum of the embeddings of words, positions and token types, normalised."""

    spec: EncoderSpec
    param_dtype: Any
    layout: Layout

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None,
        token_type_ids: Array | None,
        positions: Array | None,
        dtype: Any,
        more: Array | None,
    ) -> tuple[Array, Embed]:
        spec = self.spec

        def table(name, count):
            return Embed(count, spec.hidden_size, spec.init_std, self.param_dtype, self.layout, name=name)

        if positions is None and spec.first_position is not None:
            positions = _attention.positions_of(input_ids, attention_mask) + spec.first_position
        elif positions is None:
            positions = _attention.positions_of(input_ids, None)
        if token_type_ids is None:
            token_type_ids = jnp.zeros((1, 1), jnp.int32)
        words = table("word_embeddings", spec.vocab_size)
        x = words(input_ids, dtype, more) + table("position_embeddings", spec.max_positions)(positions, dtype)
        x = x + table("token_type_embeddings", spec.token_types)(token_type_ids, dtype)
        return layer_norm(self, "LayerNorm", x), words


class SelfAttention(nn.Module):
    """Attention in both directions, without the output projection."""

    spec: EncoderSpec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, lengths: Array | None) -> Array:
        heads = self.spec.num_heads

        def project(name):
            y = dense(self, name, self.spec.hidden_size, x, ("embed", "heads")).reshape(*x.shape[:2], heads, -1)
            return self.layout.constrain(y, "batch", "length", "heads", "head_dim")

        q, k, v = project("query"), project("key"), project("value")
        out = _attention.attend(
            self.choice, q, k, v, mask, lengths, layout=self.layout, causal=False, scale=q.shape[-1] ** -0.5
        )
        return out.reshape(x.shape)


class Output(nn.Module):
    """Projects `y`, whose last axis is named `inner`, to the width of `x`, adds it to `x` and normalises the sum."""

    spec: EncoderSpec
    param_dtype: Any
    layout: Layout
    inner: str

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        x = x + dense(self, "dense", self.spec.hidden_size, y, (self.inner, "embed"))
        return layer_norm(self, "LayerNorm", self.layout.constrain(x, "batch", "length", "embed"))


class Attention(nn.Module):
    """Self-attention, its projection, and the norm after it."""

    spec: EncoderSpec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, lengths: Array | None) -> Array:
        own = SelfAttention(self.spec, self.param_dtype, self.choice, self.layout, name="self")
        return Output(self.spec, self.param_dtype, self.layout, "heads", name="output")(own(x, mask, lengths), x)


class Intermediate(nn.Module):
    """The first half of the MLP."""

    spec: EncoderSpec
    param_dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = dense(self, "dense", self.spec.intermediate_size, x, ("embed", "mlp"))
        return ACTIVATIONS[self.spec.activation](self.layout.constrain(x, "batch", "length", "mlp"))


class Layer(nn.Module):
    """One post-norm block."""

    spec: EncoderSpec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, own: None, context: tuple[Array | None, Array | None]) -> tuple[Array, None]:
        x = Attention(self.spec, self.param_dtype, self.choice, self.layout, name="attention")(x, *context)
        hidden = Intermediate(self.spec, self.param_dtype, self.layout, name="intermediate")(x)
        return Output(self.spec, self.param_dtype, self.layout, "mlp", name="output")(hidden, x), None


class Pooler(nn.Module):
    """The tanh of a projection of the first token."""

    spec: EncoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.tanh(dense(self, "dense", self.spec.hidden_size, x[:, 0], ("embed", "mlp")))


class MaskedLMHead(nn.Module):
    """A projection, its norm, and the word embeddings as the kernel of the last product."""

    spec: EncoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array, words: Embed) -> Array:
        spec = self.spec
        x = layer_norm(
            self, "LayerNorm", ACTIVATIONS[self.activation](dense(self, "dense", spec.hidden_size, x, ("embed", "mlp")))
        )
        bias = self.param("bias", named(nn.initializers.zeros, "vocab"), (spec.vocab_size,), self.param_dtype)
        # The tree may have a kernel of its own here, if an adapter that changes one of the two has untied them.
        if self.has_variable("params", "decoder"):
            logits = dense(self, "decoder", spec.vocab_size, x, ("embed", "vocab"), bias=False)
        else:
            logits = words.attend(x)
        return logits + bias.astype(x.dtype)

    @property
    def activation(self) -> str:
        """The name of the activation between the two products."""
        return "gelu" if self.spec.first_position is not None else self.spec.activation  # RoBERTa always uses gelu


class ClassificationHead(nn.Module):
    """RoBERTa's head: a projection of the tanh of a projection of the first token."""

    spec: EncoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.tanh(dense(self, "dense", self.spec.hidden_size, x[:, 0], ("embed", "mlp")))
        return dense(self, "out_proj", self.spec.num_labels, x, ("mlp", None))


class Encoder(nn.Module):
    """Token ids to the logits of the head, or to the last hidden states [B, T, D] without a head.

    The logits are [B, T, V] for tokens, [B, num_labels] for texts.
    """

    spec: EncoderSpec
    dtype: Any = None
    param_dtype: Any = jnp.float32
    execution: Execution = Execution()

    @property
    def counts(self) -> dict[str, int]:
        """The number of units of each named axis, if it isn't the size: heads, not their channels."""
        return {"heads": self.spec.num_heads}

    def attention(self, rows: int, length: int, dtype: Any, **call: bool) -> Choice:
        """Return the form of attention of a call."""
        heads = self.spec.num_heads
        return choose(self.execution, Case(rows, length, heads, self.spec.hidden_size // heads, dtype, **call))

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        token_type_ids: Array | None = None,
        positions: Array | None = None,
        more_embeddings: Array | None = None,
    ) -> Array:
        spec, roberta, layout = self.spec, self.spec.first_position is not None, self.execution.layout
        embeddings = Embeddings(spec, self.param_dtype, layout, name="embeddings")
        x, words = embeddings(input_ids, attention_mask, token_type_ids, positions, self.dtype, more_embeddings)
        choice = self.attention(x.shape[0], x.shape[1], x.dtype)
        packs = choice.packs(attention_mask, causal=False)
        order, lengths = _attention.real_first(attention_mask) if packs else (None, None)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        layers = stacked(Layer, spec.num_layers, self.execution)(spec, self.param_dtype, choice, layout, name="layer")
        x, _ = layers(_attention.ordered(order, x), None, (mask, lengths))
        x = _attention.put_back(order, x)
        if spec.head == "masked_lm":
            logits = MaskedLMHead(spec, self.param_dtype, name="lm_head")(x, words)
            return layout.constrain(logits, "batch", "length", "vocab")
        if spec.head == "classification" and roberta:
            return ClassificationHead(spec, self.param_dtype, name="classifier")(x)
        pooled = Pooler(spec, self.param_dtype, name="pooler")(x)
        return dense(self, "classifier", spec.num_labels, pooled, ("mlp", None)) if spec.head == "classification" else x


# --- names -----------------------------------------------------------------------------------------------------------


def weights(config: Any, head: str) -> dict[str, Weight]:
    """Return the leaves of the tree and their names in a Hugging Face file."""
    base = "" if head == "none" else f"{config.model_type}."
    table = {}
    for name in ("word", "position", "token_type"):
        table[f"embeddings/{name}_embeddings/embedding"] = Weight(f"{base}embeddings.{name}_embeddings.weight")
    norms = {"embeddings/LayerNorm": f"{base}embeddings.LayerNorm"}
    projections = {}
    for path in ("attention/self/query", "attention/self/key", "attention/self/value"):
        projections[f"layer/{path}"] = f"{base}encoder.layer.{{}}.{path.replace('/', '.')}"
    for path in ("attention/output", "intermediate", "output"):
        name = f"{base}encoder.layer.{{}}.{path.replace('/', '.')}"
        projections[f"layer/{path}/dense"] = f"{name}.dense"
        if path != "intermediate":
            norms[f"layer/{path}/LayerNorm"] = f"{name}.LayerNorm"
    roberta = config.model_type == "roberta"
    if head == "masked_lm":
        of_head = "lm_head" if roberta else "cls.predictions"
        projections["lm_head/dense"] = f"{of_head}.dense" if roberta else f"{of_head}.transform.dense"
        norms["lm_head/LayerNorm"] = f"{of_head}.layer_norm" if roberta else f"{of_head}.transform.LayerNorm"
        table["lm_head/bias"] = Weight(f"{of_head}.bias")
    elif head == "classification" and roberta:
        projections |= {f"classifier/{name}": f"classifier.{name}" for name in ("dense", "out_proj")}
    else:
        projections["pooler/dense"] = f"{base}pooler.dense"
        if head == "classification":
            projections["classifier"] = "classifier"
    for path, name in projections.items():
        table[f"{path}/kernel"] = Weight(f"{name}.weight", transpose=True)
        table[f"{path}/bias"] = Weight(f"{name}.bias")
    for path, name in norms.items():
        table[f"{path}/scale"] = Weight(f"{name}.weight")
        table[f"{path}/bias"] = Weight(f"{name}.bias")
    return table


def _copies(config: Any) -> dict[str, str]:
    """Return the tensors of a tied head, which are in some files as copies."""
    of_head = "lm_head" if config.model_type == "roberta" else "cls.predictions"
    return {
        f"{of_head}.decoder.weight": f"{config.model_type}.embeddings.word_embeddings.weight",
        f"{of_head}.decoder.bias": f"{of_head}.bias",
    }


def _positions(config: Any) -> int:
    """Return the most tokens of a row: RoBERTa's positions begin after the padding's id."""
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def _family(config_class: Any, architecture: str, head: str) -> Family:
    # Buffers of old files, and tensors of further heads that the model was trained with.
    unused = [r"(.*\.)?embeddings\.position_ids"]
    unused += [r"cls\.seq_relationship\..*", r".*\.pooler\..*"] if head == "masked_lm" else []
    return Family(
        config_class=config_class,
        architecture=architecture,
        module=lambda config, dtype, param_dtype, execution: Encoder(spec(config, head), dtype, param_dtype, execution),
        weights=lambda config: weights(config, head),
        ignored=tuple(unused),
        copies=_copies if head == "masked_lm" else lambda config: {},
        heads={f"{of_head}.decoder.weight": "lm_head/decoder/kernel" for of_head in ("cls.predictions", "lm_head")},
        prefix="" if head == "none" else f"{config_class.model_type}.",
        head="classifier" if head == "classification" else "",
        before_head=("pooler",) if head == "classification" and config_class is BertConfig else (),
        other_heads=(r"cls\..*", r"lm_head\..*", r"(.*\.)?pooler\..*", r"classifier\..*"),
        positions=_positions,
    )


FAMILIES = tuple(
    _family(config_class, name + suffix, head)
    for config_class, name in ((BertConfig, "Bert"), (RobertaConfig, "Roberta"))
    for suffix, head in (
        ("ForMaskedLM", "masked_lm"),
        ("ForSequenceClassification", "classification"),
        ("Model", "none"),
    )
)
