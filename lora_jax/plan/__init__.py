"""Planning: the memory and the traffic of each chip in a training step, found by compiling it without weights.

found = plan("path/to/folder", LoRAConfig(rank=8, alpha=16), TrainConfig(batch_size=8), topology="v6e:2x4")
print(found)
found.fits, found.per_chip["total"], found.per_chip["collectives"]
"""

from lora_jax._extras import require

require(
    __name__,
    hf=("flax", "huggingface_hub", "safetensors", "transformers"),
    train=("grain", "orbax.checkpoint", "rich", "sklearn", "tensorboardX"),
)

from lora_jax.plan._chips import GENERATIONS as GENERATIONS
from lora_jax.plan._result import Plan as Plan
from lora_jax.plan._run import plan as plan
from lora_jax.plan._search import search as search
