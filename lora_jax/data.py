"""Rows of a jsonl file as batches of token ids, with a weight for every token that counts in the loss.

    rows = load("data/", "train")                          # what the file says, checked line by line
    encoded = encode(rows, tokenizer, max_length=512)      # token ids, and which of them are targets
    for batch in batches(encoded.examples, 16, seed=0):    # numpy arrays [16, length], few lengths
        ...

A file holds rows of one kind: `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class Text(NamedTuple):
    """A row whose every token is a target."""

    text: str


class Completion(NamedTuple):
    """A prompt, and the completion that the model is to give: only the completion's tokens are targets."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation `[{"role": ..., "content": ...}, ...]`: only the assistant's turns are targets."""

    messages: tuple[Mapping[str, str], ...]


_Pieces = list[tuple[str, bool]]  # text, and whether its tokens are targets
Row = Text | Completion | Chat
KINDS: tuple[type[Row], ...] = (Text, Completion, Chat)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer. `chat_template` and `apply_chat_template` only for `Chat` rows."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


class Example(NamedTuple):
    """One tokenised row: `input_ids` int32 [length], and `targets` bool [length], true where the loss counts."""

    input_ids: np.ndarray
    targets: np.ndarray


class Encoded(NamedTuple):
    """What `encode` made of the rows."""

    examples: list[Example]
    left_out: int  # rows with no target left within max_length
    truncated: int  # rows that lost tokens to max_length (the ones left out among them)


# --- files -----------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, split: str | None = None, *, valid_share: float = 0.1, max_valid: int = 500, seed: int = 0
) -> list[Row]:
    """The rows of a jsonl file, or of `{split}.jsonl` in a folder.

    Where there is no `valid.jsonl` (a lone file, or a folder that lacks it), a share of the training rows is held out:
    `valid_share` of them, at least 1 and at most `max_valid`, drawn with `seed`. `"train"` and `"valid"` then never
    overlap, and together are the whole file, each in the file's order. A single row is all for training.

    Args:
      path: a jsonl file, or a folder with `train.jsonl` and, where wanted, `valid.jsonl` and `test.jsonl`.
      split: `"train"`, `"valid"` or `"test"`; None for all rows of a lone file.
      valid_share: share of the training rows held out for validation where no file gives them.
      max_valid: the most rows held out.
      seed: of the draw.

    Raises:
      FileNotFoundError: the file, the folder or the split's file is not there.
      ValueError: a line that is not JSON, has unknown keys or a value of the wrong type, or is of another kind than
        the lines before; an empty file. The message starts with `file:line`.
    """
    if split not in (None, "train", "valid", "test"):
        raise ValueError(f"split: {split!r} given, expected train, valid or test")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data file or folder")
    if path.is_dir():
        if split is None:
            raise ValueError(f"{path}: is a folder, name the split to read: train, valid or test")
        file = path / f"{split}.jsonl"
        if file.exists():
            if split != "train" or (path / "valid.jsonl").exists():
                return read_jsonl(file)
        elif split != "valid" or not (path / "train.jsonl").exists():
            raise FileNotFoundError(f"{file}: no such file; the folder must hold {split}.jsonl")
        path = path / "train.jsonl"
    elif split == "test":
        raise ValueError(f"{path}: is a lone file and has no test split; give a folder with test.jsonl")
    rows = read_jsonl(path)
    if split is None:
        return rows
    held_out = _held_out(len(rows), valid_share, max_valid, seed)
    return [row for i, row in enumerate(rows) if (i in held_out) == (split == "valid")]


def _held_out(count: int, share: float, most: int, seed: int) -> set[int]:
    size = min(max(1, round(share * count)), most, count - 1)
    return set(np.random.default_rng(seed).permutation(count)[:size].tolist())


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of one jsonl file; blank lines are passed over. Raises as `load` does."""
    path = Path(path)
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some Windows programs put at the start
            if not line.strip():
                continue
            where = f"{path}:{number}"
            row = _parse(line, where)
            if rows and type(row) is not type(rows[0]):
                first, this = _keys(type(rows[0])), _keys(type(row))
                raise ValueError(f"{where}: a row of {this} in a file of {first}; all rows must be of one kind")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file holds no rows, expected one JSON object a line: {_accepted()}")
    return rows


def _keys(kind: type[Row]) -> str:
    return "{" + ", ".join(f'"{name}"' for name in kind._fields) + "}"


def _accepted() -> str:
    return " or ".join(_keys(kind) for kind in KINDS)


def _parse(line: bytes, where: str) -> Row:
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # of decoding, of JSON, of a number too long to convert
        raise ValueError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a JSON {type(fields).__name__}, expected an object: {_accepted()}")
    for kind in KINDS:
        if set(fields) == set(kind._fields):
            return _parse_chat(fields["messages"], where) if kind is Chat else _parse_strings(kind, fields, where)
    raise ValueError(f"{where}: keys {', '.join(map(str, fields)) or '(none)'}; accepted are {_accepted()}")


def _parse_strings(kind: type[Row], fields: dict[str, Any], where: str) -> Row:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f'{where}: "{name}" is a {type(value).__name__}, expected a string')
    return kind(**fields)


def _parse_chat(messages: Any, where: str) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of {{"role", "content"}} and hold at least one')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{where}: messages[{number}] must be an object with the strings "role" and "content"')
    return Chat(tuple(messages))


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Token ids of the rows, cut to `max_length`, and which of the tokens are targets.

    A row is tokenised in pieces that begin and end where the targets do: the prompt as generation will give it (with
    the special tokens that the tokenizer puts in front), then the completion on its own. So no token straddles the
    boundary, and what the model sees before the first target is exactly what it sees when it generates. A space
    between the two belongs to whichever string it is written in. The end-of-sequence token is appended, as a target,
    unless it is there already (a chat template may close a turn with it).

    The first token of a row is never a target, because nothing predicts it. What lies beyond `max_length` is cut off;
    a row with no target left is counted in `left_out` and is not among the examples.

    Args:
      rows: as `load` gives them.
      tokenizer: a Hugging Face tokenizer, or anything that does as much (`Tokenizer`).
      max_length: the most tokens of a row, at least 2.

    Raises:
      ValueError: the tokenizer has no end-of-sequence token, or no chat template for `Chat` rows; the template doesn't
        let the assistant's turns be found; every row was left out.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} given, expected at least 2 (a token and the one it predicts)")
    if not rows:
        raise ValueError("no rows to encode")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set it in tokenizer_config.json, or generation never stops")
    pieces = [_pieces(row, tokenizer, number) for number, row in enumerate(rows, 1)]
    examples = [_join(parts, tokenizer.eos_token_id) for parts in _tokenize(pieces, tokenizer, rows)]
    truncated = sum(len(example.input_ids) > max_length for example in examples)
    examples = [Example(example.input_ids[:max_length], example.targets[:max_length]) for example in examples]
    kept = [example for example in examples if example.targets.any()]
    if not kept:
        raise ValueError(
            f"max_length {max_length}: none of {len(rows)} rows has a target left within it; "
            f"prompts alone are longer, or there are no assistant turns"
        )
    return Encoded(kept, len(examples) - len(kept), truncated)


def _tokenize(pieces: list[_Pieces], tokenizer: Tokenizer, rows: Sequence[Row]) -> Iterator[list[tuple[Any, bool]]]:
    """The pieces with token ids for text, from two calls to the tokenizer (it works on several threads)."""
    # The first piece of a row gets the tokenizer's special tokens; a chat template has written them itself.
    special = not isinstance(rows[0], Chat)
    first = [piece[0][0] for piece in pieces]
    later = [text for piece in pieces for text, _ in piece[1:]]
    first_ids = tokenizer(first, add_special_tokens=special)["input_ids"]
    later_ids = iter(tokenizer(later, add_special_tokens=False)["input_ids"] if later else [])
    for piece, ids in zip(pieces, first_ids, strict=True):
        if len(piece) > 1 and ids[-1:] == [tokenizer.eos_token_id] and special:
            ids = ids[:-1]  # some tokenizers close whatever they are given, but a prompt is not the end
        yield [(ids, piece[0][1])] + [(next(later_ids), is_target) for _, is_target in piece[1:]]


def _join(parts: list[tuple[list[int], bool]], eos: int) -> Example:
    ids = [token for part, _ in parts for token in part]
    targets = [is_target for part, is_target in parts for _ in part]
    last, is_target = parts[-1]
    if is_target and eos not in last[-3:]:  # a chat template may close with the token and a line break
        ids.append(eos)
        targets.append(True)
    targets[:1] = [False] * len(targets[:1])
    return Example(np.array(ids, np.int32), np.array(targets, bool))


def _pieces(row: Row, tokenizer: Any, number: int) -> _Pieces:
    match row:
        case Text(text):
            return [(text, True)]
        case Completion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Chat(messages):
            return _chat_pieces(messages, tokenizer, number)


def _chat_pieces(messages: Sequence[Mapping[str, str]], tokenizer: Any, number: int) -> _Pieces:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            'the tokenizer has no chat template, which rows of {"messages"} need: '
            'add one to it, or give rows of {"prompt", "completion"}'
        )

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"row {number}: the tokenizer's chat template refuses it ({error})") from error

    whole, pieces, end = render(len(messages), False), [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, True), render(turn + 1, False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= end):
            raise ValueError(
                f"row {number}: the tokenizer's chat template rewrites earlier turns, so turn {turn + 1} can't be "
                "found in it; give conversations with one assistant turn, the last"
            )
        pieces += [(whole[end : len(before)], False), (after[len(before) :], True)]
        end = len(after)
    if end < len(whole):
        pieces.append((whole[end:], False))
    return pieces


# --- batches ---------------------------------------------------------------------------------------------------------

# Batches are cut from this many batches' worth of rows sorted by length, so that a batch needs little padding.
WINDOW = 16


def bucket(length: int, longest: int) -> int:
    """The padded length of a batch: the smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds it, `longest` at most.

    Few lengths, because each is a compilation; two between powers of two, because padding is computed too.

    >>> [bucket(length, 300) for length in (5, 17, 70, 130, 290)]
    [16, 24, 96, 192, 300]
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def pad(examples: Sequence[Example], batch_size: int, length: int) -> Batch:
    """One batch of up to `batch_size` examples, padded on the right; missing rows have no weight.

    Returns:
      `input_ids` int32, `attention_mask` int32 and `loss_weights` float32, each [batch_size, length]. A weight belongs
      to the token that is predicted, so it is compared with the logits one position earlier.
    """
    shape = (batch_size, length)
    batch = {
        "input_ids": np.zeros(shape, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
        "loss_weights": np.zeros(shape, np.float32),
    }
    # A row without a token to attend to would be a softmax over nothing.
    batch["attention_mask"][len(examples) :, 0] = 1
    for i, (ids, targets) in enumerate(examples):
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["loss_weights"][i, : len(ids)] = targets
    return batch


def batches(
    examples: Sequence[Example], batch_size: int, *, seed: int | None = None, epochs: int = 1
) -> grain.MapDataset[Batch]:
    """The examples as padded batches: a grain dataset, of which `len` is known and any batch can be read on its own.

    Every epoch holds each example once, in an order of its own; its last batch is filled up with rows of no weight.
    Batches are cut from windows of the shuffled rows sorted by length, and shuffled again, which saves most padding.
    Iterate over `.to_iter_dataset()` for an iterator with `get_state()` and `set_state()`.

    Args:
      examples: tokenised rows, at least one.
      batch_size: rows of a batch.
      seed: of the shuffles, 0 or more; None for one fixed order by length, as evaluation wants.
      epochs: passes over the examples.

    Example:
      >>> rows = [Example(np.arange(n), np.arange(n) > 0) for n in (3, 20, 7)]
      >>> [batch["input_ids"].shape for batch in batches(rows, 2)]
      [(2, 16), (2, 20)]
    """
    if not examples:
        raise ValueError("no examples to make batches of")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} given, expected at least 1")
    lengths = np.array([len(example.input_ids) for example in examples])
    longest = int(lengths.max())
    order = grain.MapDataset.range(len(examples))
    if seed is None:
        by_length = np.argsort(lengths, kind="stable")
        order = order.map(lambda i: by_length[i])
    else:
        # grain adds the epoch to the seed, so seed 1 would begin with the second epoch of seed 0: spread them first.
        order = order.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    per_epoch = -(-len(examples) // batch_size)

    @functools.lru_cache(maxsize=2)
    def window(epoch: int, number: int) -> list[np.ndarray]:
        """Batches of rows of similar length, in random order: a function of seed and place, so any is readable."""
        start, stop = number * WINDOW * batch_size, min((number + 1) * WINDOW * batch_size, len(examples))
        rows = np.array([order[epoch * len(examples) + i] for i in range(start, stop)])
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = np.split(rows, range(batch_size, len(rows), batch_size))
        if seed is None:
            return cut
        return [cut[i] for i in np.random.default_rng([seed, epoch, number]).permutation(len(cut))]

    def batch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        chosen = [examples[i] for i in window(epoch, position // WINDOW)[position % WINDOW]]
        return pad(chosen, batch_size, bucket(max(len(example.input_ids) for example in chosen), longest))

    return grain.MapDataset.range(epochs * per_epoch).map(batch)
