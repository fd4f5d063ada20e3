"""LoRA for JAX as a pure parameter-tree transform."""

import importlib
import importlib.util
from typing import Any

from lora_jax._config import LoRAConfig as LoRAConfig
from lora_jax._config import Override as Override
from lora_jax._describe import describe as describe
from lora_jax._describe import merge_report as merge_report
from lora_jax._forward import MaterializeWarning as MaterializeWarning
from lora_jax._forward import adapt as adapt
from lora_jax._forward import kernel_axes as kernel_axes
from lora_jax._init import init as init
from lora_jax._merge import delta as delta
from lora_jax._merge import merge as merge
from lora_jax._merge import unmerge as unmerge
from lora_jax._node import Axes as Axes
from lora_jax._node import KernelAxes as KernelAxes
from lora_jax._node import LoRA as LoRA
from lora_jax._optim import check_padding as check_padding
from lora_jax._optim import mask as mask
from lora_jax._optim import masked as masked
from lora_jax._sharding import shardings as shardings
from lora_jax._stack import stack as stack
from lora_jax._stack import unstack as unstack
from lora_jax._tree import combine as combine
from lora_jax._tree import split as split

# Loaded when first used: they bring in flax, transformers, grain and the like.
_NAMESPACES = (
    "analysis",
    "checkpoint",
    "data",
    "generate",
    "loralib",
    "models",
    "peft",
    "plan",
    "prefix",
    "report",
    "sweep",
    "testing",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
