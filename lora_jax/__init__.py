"""LoRA for JAX as a pure parameter-tree transform."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_jax._axes import Axes, KernelAxes
from lora_jax._config import LoRAConfig, Override
from lora_jax._describe import describe, merge_report
from lora_jax._forward import MaterializeWarning, adapt, kernel_axes, quantized
from lora_jax._init import init
from lora_jax._merge import delta, merge, unmerge
from lora_jax._node import LoRA
from lora_jax._optim import check_padding, mask, masked, state_shardings
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.report import quantize_report
from lora_jax._quantize.transform import dequantize, quantize
from lora_jax._sharding import shardings
from lora_jax._stack import stack, unstack
from lora_jax._trained import Prefix, Trained, TrainedRows
from lora_jax._trained_rows import init_rows
from lora_jax._tree import combine, split

__all__ = [
    "Axes",
    "KernelAxes",
    "LoRA",
    "LoRAConfig",
    "MaterializeWarning",
    "Override",
    "Prefix",
    "QuantizeConfig",
    "Quantized",
    "Trained",
    "TrainedRows",
    "adapt",
    "check_padding",
    "combine",
    "delta",
    "dequantize",
    "describe",
    "init",
    "init_rows",
    "kernel_axes",
    "mask",
    "masked",
    "merge",
    "merge_report",
    "quantize",
    "quantize_report",
    "quantized",
    "shardings",
    "split",
    "stack",
    "state_shardings",
    "unmerge",
    "unstack",
]

# Imported when first used: most of them import flax, transformers, grain and the like, which may not be installed.
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

if TYPE_CHECKING:  # so that type checkers report a misspelt name in one of them
    from lora_jax import analysis as analysis
    from lora_jax import checkpoint as checkpoint
    from lora_jax import data as data
    from lora_jax import generate as generate
    from lora_jax import loralib as loralib
    from lora_jax import models as models
    from lora_jax import peft as peft
    from lora_jax import plan as plan
    from lora_jax import prefix as prefix
    from lora_jax import report as report
    from lora_jax import sweep as sweep
    from lora_jax import testing as testing
    from lora_jax import train as train

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        if name in _NAMESPACES:
            return importlib.import_module(f"{__name__}.{name}")
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version(__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_NAMESPACES, "__version__"])
