"""Tokenising the pieces of a row as one text, and finding where each piece begins among the tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.data._rows import check_text
from lora_jax.data._shared import shared_length

NEAR = 200  # characters before a boundary that are tokenised again: far more than decide which tokens are next to it
RUN = 8  # equal tokens that align one tokenisation with another
DRIFT = 16  # tokens by which the two may differ before that


class Joint(NamedTuple):
    """The tokens of a row."""

    ids: list[int]
    starts: list[int]  # for each piece, the index of its first token
    crossings: int  # tokens with the end of one piece and the beginning of the next; they belong to the next


class Boundaries:
    """Tokenises rows and finds the boundaries of their pieces among the tokens.

    A part of a text may have other tokens alone than in the whole: a tokenizer may put a mark in front, or join letters
    across the boundary, as " 2" + "5" → " 25". So the whole text is tokenised, and the tokens of its parts alone are
    used only to find where they end.

    Args:
        tokenizer: Called with lists of texts and `add_special_tokens`. Its `decode` is called if the tokens of a piece
            alone differ from its tokens in the row.
        special: Whether the tokenizer adds its special tokens to a row.
    """

    def __init__(self, tokenizer: Any, special: bool):
        self._tokenizer, self._special = tokenizer, special
        self._closing: int | None = None

    def join(self, rows: Sequence[Sequence[str]]) -> Iterator[Joint]:
        """Yield the tokens of each row."""
        texts = ["".join(pieces) for pieces in rows]
        for number, text in enumerate(texts, 1):
            check_text(text, f"row {number}")
        whole = self._ids(texts, self._special)
        first = iter(self._open([pieces[0] for pieces in rows if len(pieces) > 1]))
        later = iter(self._ids([piece for pieces in rows for piece in pieces[1:-1]], False))
        for pieces, ids in zip(rows, whole, strict=True):
            alone = [next(later if number else first) for number in range(len(pieces) - 1)]
            yield self._joint(pieces, ids, alone)

    def _joint(self, pieces: Sequence[str], ids: list[int], alone: Sequence[list[int]]) -> Joint:
        starts, crossings, crossed = [0], 0, False
        known = [True]  # for each piece, whether its text begins where its first token does
        for number, part in enumerate(alone, 1):
            start = starts[-1] + len(part)
            if crossed or ids[starts[-1] : start] != part:
                begin, part = self._before(pieces[:number], ids, starts, known)
                start, crossed = self._end(ids[begin:], part)
                start += begin
                start, crossings = max(start, starts[-1]), crossings + crossed
            starts.append(start)
            known.append(not crossed)
        return Joint(ids, starts, crossings)

    def _before(
        self, pieces: Sequence[str], ids: list[int], starts: Sequence[int], known: Sequence[bool]
    ) -> tuple[int, list[int]]:
        """Return the last tokens of the pieces' text, tokenised alone, and the index among `ids` of the first of them.

        Tokens depend on nearby text only, so it is enough to tokenise the end of the text, and to align it with `ids`
        at the first run of equal tokens in the same place of the text. If the text is short, or there is no such run,
        all of it is tokenised.
        """
        back = len(pieces) - 1
        while back and not (known[back] and sum(map(len, pieces[back:])) >= NEAR):
            back -= 1
        if back and hasattr(self._tokenizer, "decode"):
            decode = self._tokenizer.decode
            (part,) = self._ids(["".join(pieces[back:])], False)
            near = ids[starts[back] : starts[back] + 2 * DRIFT + RUN]
            for skipped in range(min(DRIFT, len(part) - RUN)):
                run = part[skipped : skipped + RUN]
                found = [place for place in range(len(near) - RUN + 1) if near[place : place + RUN] == run]
                # In the same place the text before it is the same, except for spaces that a tokenizer puts in front.
                if found and decode(run).strip():
                    text = decode(part[:skipped]).strip()
                    found = [place for place in found if decode(near[:place]).strip() == text]
                    if len(found) == 1:
                        return starts[back] + found[0], part[skipped:]
        return 0, self._open(["".join(pieces)])[0]

    def _end(self, ids: list[int], part: list[int]) -> tuple[int, bool]:
        """Count the first `ids` that are in the text whose tokens are `part`, and check if the next crosses its end.

        Both are decoded, with their special tokens, so that any change that the decoder makes to a text is the same in
        both. Without a decoder, all tokens from the first difference on count as the text that follows.
        """
        shared = shared_length(ids, part)
        if shared == len(part) or not hasattr(self._tokenizer, "decode"):
            return shared, shared < len(part)

        def decoded(count: int, tokens: list[int]) -> str:
            return self._tokenizer.decode(tokens[:count], skip_special_tokens=False)

        text, end, last = decoded(len(part), part), shared, None
        for count in range(shared, len(ids) + 1):
            found = decoded(count, ids)
            if text.startswith(found):
                end, last = count, found
            # Longer than the text, not counting characters of which the last bytes are in the next tokens.
            elif len(found) - found.count("\ufffd") > len(text):
                break
        return end, last != text

    def _open(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts that continue: without the special tokens that some tokenizers
        append to every text.
        """
        found = self._ids(texts, self._special)
        if not self._special or not found:
            return found
        if self._closing is None:
            (alone,), (closed,) = self._ids(["a"], False), self._ids(["a"], True)
            before = next((i for i in range(len(closed)) if alone and closed[i : i + len(alone)] == alone), None)
            self._closing = 0 if before is None else len(closed) - before - len(alone)
        return [ids[: len(ids) - self._closing] for ids in found]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        # One call for all texts, because a tokenizer then uses several threads.
        found = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        if not special:
            return found
        return [without_second_start(text, ids, self._tokenizer) for text, ids in zip(texts, found, strict=True)]


def without_second_start(text: str, ids: list[int], tokenizer: Any) -> list[int]:
    """Return the tokens of a text without the start token that the tokenizer has put in front of the text's own.

    The text of a chat template may begin with that token already, and a model has never seen two.
    """
    start, token = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if start and text.startswith(start) and ids[:2] == [token, token] and not text.startswith(2 * start):
        return ids[1:]
    return ids
