"""The forward: `adapt` runs a function with low-rank updates, `kernel_axes` finds out how it uses its kernels."""

from lora_jax._forward.find_axes import kernel_axes as kernel_axes
from lora_jax._forward.transform import MaterializeWarning as MaterializeWarning
from lora_jax._forward.transform import adapt as adapt
from lora_jax._forward.transform import dropout_of as dropout_of
from lora_jax._forward.transform import ensure_adapted as ensure_adapted
from lora_jax._forward.transform import quantized as quantized
from lora_jax._forward.transform import with_raw as with_raw
