"""Reading a program before it runs: the matrix products in its trace, and the collectives in its compiled text."""

from lora_jax._program.cost import Cost as Cost
from lora_jax._program.cost import cost_of as cost_of
from lora_jax._program.hlo import Collective as Collective
from lora_jax._program.hlo import collectives as collectives
