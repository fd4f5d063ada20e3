"""What type checkers accept of the public names, and what they refuse; checked by pyright, never run.

Where a line that is refused would pass, its comment is unnecessary, and that is an error here.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error, reportAttributeAccessIssue=error

from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax

lora_jax.LoRAConfig(rank=8, alpha=16, targets="all-linear")
lora_jax.LoRAConfig(rank=8, alpha=16, targets=["q_proj", "v_proj"], exclude=("lm_head",), init="kaiming_uniform")
lora_jax.LoRAConfig(rank=8, alpha=16, overrides=[lora_jax.Override(target="q_proj", rank=[4, 0])])
lora_jax.LoRAConfig(rank=8, alpha=16, init="normal")  # pyright: ignore[reportArgumentType]
lora_jax.LoRAConfig(rank=8, alpha=16, target="q_proj")  # pyright: ignore[reportCallIssue]
lora_jax.adapt(jnp.dot, on_materialize="error")
lora_jax.adapt(jnp.dot, on_materialize="raise")  # pyright: ignore[reportArgumentType]

params: dict[str, Any] = {"query": {"kernel": jnp.ones((4, 4))}}
params = lora_jax.init(jax.random.key(0), params, lora_jax.LoRAConfig(rank=2, alpha=4))
node: lora_jax.LoRA = params["query"]["kernel_lora"]
factors: tuple[jax.Array, jax.Array] = node.a, node.b
base, adapter = lora_jax.split(params)
tx: optax.GradientTransformation = lora_jax.masked(optax.adam(1e-3))
version: str = lora_jax.__version__

lora_jax.peft.load("adapter", base, names={})
lora_jax.peft.laod("adapter", base, names={})  # pyright: ignore[reportAttributeAccessIssue]
lora_jax.plans  # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
lora_jax.models.load("folder", layers="unrolled", platform="tpu")
lora_jax.models.load("folder", layers="rolled")  # pyright: ignore[reportArgumentType]
lora_jax.data.load("folder", "valid")
lora_jax.data.load("folder", "dev")  # pyright: ignore[reportArgumentType]
lora_jax.train.TrainConfig(num_train_epochs=2, learning_rate=1e-3, report_to=("tensorboard", "wandb"))
lora_jax.train.TrainConfig(report_to=("none",))
lora_jax.train.TrainConfig(report_to=("mlflow",))  # pyright: ignore[reportArgumentType]
