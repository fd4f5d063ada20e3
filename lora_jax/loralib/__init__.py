"""Checkpoints of loralib, the code of the LoRA paper: read without executing anything in them.

    params = lora_jax.loralib.load("roberta_base_lora_mnli.bin", params, names=names, alpha=16)

loralib saves with `torch.save`: a zip of tensors and a pickle that says how to put them together. Unpickling runs
whatever the file says; here the pickle is only looked at, and a file that holds more than tensors is refused.
"""

from lora_jax.loralib._load import load as load
from lora_jax.loralib._torch_zip import read as read
from lora_jax.loralib._updates import updates as updates
