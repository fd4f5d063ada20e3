"""Pieces of a row tokenised as the one text that they are, and where each piece begins among the tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_jax.data._rows import check_text

NEAR = 200  # characters before a boundary that decide which tokens are next to it, and many more
RUN = 8  # equal tokens that show where one tokenisation is found in another
DRIFT = 16  # tokens by which the two may be apart at the beginning


class Joint(NamedTuple):
    """A row's tokens."""

    ids: list[int]
    starts: list[int]  # of each piece, its first token
    crossings: int  # tokens that hold the end of one piece and the beginning of the next; they belong to the next


class Boundaries:
    """Tokens of rows in pieces.

    A tokenizer need not give the same tokens for a part of a text as for the whole: it may put a mark in front, or join
    letters across the boundary. So the whole is tokenised, and what its parts are alone only says where they end.

    Args:
      tokenizer: called with lists of texts and `add_special_tokens`, and for pieces that aren't tokenised alike alone
        and together, `decode`.
      special: whether the tokenizer's special tokens belong to a row.
    """

    def __init__(self, tokenizer: Any, special: bool):
        self._tokenizer, self._special = tokenizer, special
        self._closing: int | None = None

    def join(self, rows: Sequence[Sequence[str]]) -> Iterator[Joint]:
        """Each row's tokens."""
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
        known = [True]  # of each piece, whether its text begins where its first token does
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
        """The last tokens of the pieces' text, as it is alone, and the place of the first of them among `ids`.

        Tokens depend on text nearby, so only its end is tokenised, from the first run of tokens on that `ids` have in
        the same place of the text; of what precedes, `ids` are the tokens. Where it is short, or there is no such run,
        all of it is.
        """
        back = len(pieces) - 1
        while back and not (known[back] and sum(map(len, pieces[back:])) >= NEAR):
            back -= 1
        if back and hasattr(self._tokenizer, "decode"):
            spelled = self._tokenizer.decode
            (part,) = self._ids(["".join(pieces[back:])], False)
            near = ids[starts[back] : starts[back] + 2 * DRIFT + RUN]
            for skipped in range(min(DRIFT, len(part) - RUN)):
                run = part[skipped : skipped + RUN]
                found = [place for place in range(len(near) - RUN + 1) if near[place : place + RUN] == run]
                # The same place: the same text is before it, but for the spaces that a tokenizer puts in front.
                if found and spelled(run).strip():
                    text = spelled(part[:skipped]).strip()
                    found = [place for place in found if spelled(near[:place]).strip() == text]
                    if len(found) == 1:
                        return starts[back] + found[0], part[skipped:]
        return 0, self._open(["".join(pieces)])[0]

    def _end(self, ids: list[int], part: list[int]) -> tuple[int, bool]:
        """How many `ids` spell no more than the text whose own tokens are `part`, and whether the next spans its end.

        Both are decoded, with their special tokens: whatever the decoder does to a text, it does to both. With a
        tokenizer that can't, all from the first token that differs counts as what follows.
        """
        shared = next((i for i, (one, other) in enumerate(zip(ids, part, strict=False)) if one != other), len(part))
        shared = min(shared, len(ids))
        if shared == len(part) or not hasattr(self._tokenizer, "decode"):
            return shared, shared < len(part)

        def spelled(count: int, tokens: list[int]) -> str:
            return self._tokenizer.decode(tokens[:count], skip_special_tokens=False)

        text, end, last = spelled(len(part), part), shared, None
        for count in range(shared, len(ids) + 1):
            found = spelled(count, ids)
            if text.startswith(found):
                end, last = count, found
            # What isn't only a character whose bytes aren't all there yet.
            elif len(found) - found.count("\ufffd") > len(text):
                break
        return end, last != text

    def _open(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that go on: without what some tokenizers close whatever they are given with."""
        found = self._ids(texts, self._special)
        if not self._special or not found:
            return found
        if self._closing is None:
            (alone,), (closed,) = self._ids(["a"], False), self._ids(["a"], True)
            before = next((i for i in range(len(closed)) if alone and closed[i : i + len(alone)] == alone), None)
            self._closing = 0 if before is None else len(closed) - before - len(alone)
        return [ids[: len(ids) - self._closing] for ids in found]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        # One call for all texts: a tokenizer works on several threads.
        return self._tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
