"""The settings of `lora_jax.quantize`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lora_jax._paths import ALL_LINEAR, check_patterns
from lora_jax._quantize.schemes import SCHEMES

SchemeName = Literal["int8", "int4", "nf4", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Settings of what to quantize and how.

    Attributes:
        scheme: `"nf4"`, 16 quantiles of the normal distribution, with a scale for each 64 inputs and these in 8 bits
            (QLoRA, Dettmers et al. 2023, arXiv 2305.14314; as bitsandbytes has it): 4.13 bits a number. `"int4"`, 15
            equal steps, with a scale for each 64 inputs: 4.5 bits. `"int8"` and `"fp8"` (e4m3), a scale for each
            output: 8
                bits.
        targets: Patterns of the kernels to quantize, as `LoRAConfig` has them. Embeddings and output heads are
            quantized only where they are named.
        exclude: Patterns of kernels to leave alone.
        group_size: Inputs of an output that share a scale; None for the scheme's own, 64 of 4-bit schemes. The 8-bit
            ones have one scale for each output, and take none.
        activations: `"int8"` rounds the activations x too, each row by its largest, where they meet a kernel of the
            scheme int8, and multiplies integers (dynamic quantization; LLM.int8(), Dettmers et al. 2022, arXiv
            2208.07339, without its outliers). None dequantizes the kernel instead. A and B see x as it is.

    Raises:
        ValueError: A setting is out of range or unknown.

    >>> QuantizeConfig(scheme="nf4").targets
    ('all-linear',)
    >>> QuantizeConfig(scheme="fp4")
    Traceback (most recent call last):
    ValueError: scheme: 'fp4' given, expected 'int8', 'int4', 'nf4' or 'fp8'
    """

    scheme: SchemeName
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    group_size: int | None = None
    activations: Literal["int8"] | None = None

    if TYPE_CHECKING:  # what may be given; it is kept as the fields say

        def __init__(
            self,
            *,
            scheme: SchemeName,
            targets: str | Sequence[str] = ...,
            exclude: str | Sequence[str] = ...,
            group_size: int | None = ...,
            activations: Literal["int8"] | None = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        for field in ("targets", "exclude"):
            given = getattr(self, field)
            object.__setattr__(self, field, (given,) if isinstance(given, str) else tuple(given))
            check_patterns(getattr(self, field), field)
        if self.scheme not in SCHEMES:
            *others, last = map(repr, SCHEMES)
            raise ValueError(f"scheme: {self.scheme!r} given, expected {', '.join(others)} or {last}")
        if not self.targets:
            raise ValueError("targets: none given; nothing would be quantized")
        self._check_group_size()
        if self.activations not in (None, "int8"):
            raise ValueError(f"activations: {self.activations!r} given, expected 'int8' or None")
        if self.activations is not None and self.scheme != "int8":
            raise ValueError(
                f"activations: {self.activations!r} given with scheme {self.scheme!r}, expected scheme 'int8', the one"
                " whose products are of integers; leave it out"
            )

    def _check_group_size(self) -> None:
        size = self.group_size
        if size is None:
            return
        if not SCHEMES[self.scheme].group_size:
            raise ValueError(
                f"group_size: {size!r} given, but {self.scheme} has one scale for each output; leave it out"
            )
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"group_size: {size!r} given, expected a whole number of 1 or more")

    @property
    def inputs_in_a_group(self) -> int:
        """Inputs that share a scale; 0 for all of an output's."""
        return SCHEMES[self.scheme].group_size if self.group_size is None else self.group_size
