"""Generating text: greedy or sampled, in one compiled loop over a cache of keys and values.

    texts = generate_text(model, params, ["Once upon a time"], GenerateConfig(max_tokens=32))

    question = chat_prompt(model.tokenizer, [{"role": "user", "content": "Who are you?"}])
    for piece in stream_text(model, params, question, GenerateConfig(max_tokens=256)):
        print(piece, end="", flush=True)

`params` may have an adapter and a prefix in it.
"""

from lora_jax.generate._config import GenerateConfig as GenerateConfig
from lora_jax.generate._loop import generate as generate
from lora_jax.generate._loop import stream as stream
from lora_jax.generate._prompt import _prompt_ids as _prompt_ids
from lora_jax.generate._prompt import chat_prompt as chat_prompt
from lora_jax.generate._text import continuation as continuation
from lora_jax.generate._text import generate_text as generate_text
from lora_jax.generate._text import stream_text as stream_text
