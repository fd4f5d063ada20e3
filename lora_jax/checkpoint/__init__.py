"""Training state on disk, from which an interrupted run resumes.

A checkpoint holds what the base doesn't: the adapter, the best adapter so far, the optimizer's state and the random
key as arrays; the step, the data iterator's position, the axes and the scale of each adapted kernel and a fingerprint
of the base as JSON. Orbax's CheckpointManager writes to a temporary folder and renames it, so that a checkpoint is
either complete or absent. No pickle is written or read.
"""

from lora_jax._extras import require

require(__name__, train=("orbax.checkpoint",))

from lora_jax.checkpoint._adapter import Saved as Saved
from lora_jax.checkpoint._adapter import load_adapter as load_adapter
from lora_jax.checkpoint._checkpoints import Checkpoints as Checkpoints
from lora_jax.checkpoint._fingerprint import fingerprint as fingerprint
from lora_jax.checkpoint._folder import is_checkpoint as is_checkpoint
from lora_jax.checkpoint._folder import newest as newest
from lora_jax.checkpoint._state import BestAdapter as BestAdapter
from lora_jax.checkpoint._state import TrainState as TrainState
from lora_jax.checkpoint._state import shapes as shapes
