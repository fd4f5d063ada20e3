"""A certificate for a training step: what it doesn't compute, copy, capture or send."""

from lora_jax._certify.claims import Certificate as Certificate
from lora_jax._certify.claims import certify as certify
