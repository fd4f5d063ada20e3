"""Checks for tests and for the start of an expensive run: they raise where a training step costs more than LoRA should.

lora_jax.testing.certify(step, adapter, opt_state, base, batch, plain=loss_fn)
"""

from lora_jax.testing._claims import Certificate as Certificate
from lora_jax.testing._claims import certify as certify
