"""Prompts as token ids, as training has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.data import render_chat
from lora_jax.data._joint import without_second_start


def chat_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Render and tokenise a conversation up to where the assistant's next turn begins.

    The tokens are those that training has in front of the turn: the template's text, to which the tokenizer adds no
    special tokens of its own.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        messages: The messages so far, each with `role` and `content`.
        tools: JSON schemas of the functions that the assistant may call.

    Returns:
        The token ids, a prompt of `generate_text` and `stream_text`.

    Raises:
        ValueError: There is no chat template, or it refuses the messages.

    >>> class Marks:
    ...     chat_template, eos_token_id, bos_token_id = "in Python", 0, None
    ...     def apply_chat_template(self, messages, *, add_generation_prompt=False, **options):
    ...         return "".join(m["role"][0] + m["content"] for m in messages) + "a" * add_generation_prompt
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
    >>> chat_prompt(Marks(), [{"role": "user", "content": "hi"}])  # u, h, i, and a for the assistant
    [21, 8, 9, 1]
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, by which messages become a prompt: set tokenizer.chat_template "
            "(--chat-template FILE), or give prompts of text"
        )
    text = render_chat(messages, tokenizer, add_generation_prompt=True, tools=tools)
    return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])


def _prompt_ids(prompt: str | Sequence[int], tokenizer: Any) -> list[int]:
    """Tokenise a prompt as training does: with special tokens in front, but without the end token that some add.

    A text that begins with the start token, as what a chat template has rendered, gets no second one.
    """
    if isinstance(prompt, str):
        ids, eos = tokenizer(prompt)["input_ids"], [tokenizer.eos_token_id]
        if ids[-1:] == eos and tokenizer("a")["input_ids"][-1:] == eos:
            ids = ids[:-1]
        ids = without_second_start(prompt, ids, tokenizer)
    else:
        ids = list(prompt)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start]
