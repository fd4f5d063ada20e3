"""The embedded default: a small pretrained Llama and a text-to-SQL task, both made by this repository."""

from lora_jax.text_to_sql._pretraining import documents as pretraining_documents
from lora_jax.text_to_sql._score import Database, execute, is_right, same_answer
from lora_jax.text_to_sql._task import Example, examples, rows
