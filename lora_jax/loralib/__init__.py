"""Checkpoints of loralib, the code of the LoRA paper: read without executing anything in them.

    params = lora_jax.loralib.load("roberta_base_lora_mnli.bin", params, names=names, alpha=16)

loralib saves with `torch.save`: a zip of tensors and a pickle that describes how to put them together. Unpickling can
run any code that the file names. Here the pickle is only read, and a file that holds more than tensors is refused.
"""

from lora_jax.loralib._load import load as load
from lora_jax.loralib._torch_zip import read as read
from lora_jax.loralib._updates import updates as updates
