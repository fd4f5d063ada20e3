"""The forms of rows: which columns each has, how it is recognised by them, and how its values are checked."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lora_jax.data._messages import chat, completed_chat, sharegpt, tools_of
from lora_jax.data._preferences import preference
from lora_jax.data._rows import Completion, Labelled, Preference, Row, Text, listed, quoted, string_in

Format = Literal["alpaca", "sharegpt", "preference"]
Fields = Mapping[str, Any]
Names = Mapping[str, str]  # the column of each field

# The prompts of train.py of Stanford Alpaca (Taori et al. 2023), which models trained on its files know: nothing
# follows the last colon, not even a line break.
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
ALPACA_PAIRED = ", paired with an input that provides further context"


class Form(NamedTuple):
    """One form of rows."""

    fields: tuple[str, ...]
    parse: Callable[[Fields, Names, str], Row]
    optional: tuple[str, ...] = ()
    name: str = ""  # for forms that have one


def _text(fields: Fields, names: Names, where: str) -> Text:
    return Text(string_in(fields, names["text"], where))


def _completion(fields: Fields, names: Names, where: str) -> Row:
    prompt, completion = names["prompt"], names["completion"]
    if isinstance(fields[prompt], list) and isinstance(fields[completion], list):
        found = completed_chat(fields[prompt], fields[completion], (prompt, completion), where)
        return found._replace(tools=tools_of(fields.get("tools"), where))
    return Completion(string_in(fields, prompt, where), string_in(fields, completion, where))


def _chat(fields: Fields, names: Names, where: str) -> Row:
    found = chat(fields[names["messages"]], names["messages"], where)
    return found._replace(tools=tools_of(fields.get("tools"), where))


def _sharegpt(fields: Fields, names: Names, where: str) -> Row:
    found = sharegpt(fields[names["conversations"]], names["conversations"], where)
    return found._replace(tools=tools_of(fields.get("tools"), where))


def _alpaca(fields: Fields, names: Names, where: str) -> Row:
    given = string_in(fields, "input", where) if fields.get("input") is not None else ""
    prompt = ALPACA.format(
        paired=ALPACA_PAIRED if given else "",
        instruction=string_in(fields, "instruction", where),
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return Completion(prompt, string_in(fields, "output", where))


def _labelled(fields: Fields, names: Names, where: str) -> Labelled:
    name, pair = names["label"], names.get("text_pair")
    label = fields[name]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f'{where}: "{name}" is a {type(label).__name__}, expected a string, an integer or a float')
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f'{where}: "{name}" is {label}, expected a finite number')
    second = None if pair is None else string_in(fields, pair, where)
    return Labelled(string_in(fields, names["text"], where), label, second, where)


TEXT = Form(("text",), _text)
COMPLETION = Form(("prompt", "completion"), _completion, ("tools",))
CHAT = Form(("messages",), _chat, ("tools",))
LABELLED = Form(("text", "label"), _labelled)
PAIR = Form(("text", "text_pair", "label"), _labelled)
PREFERENCE = Form(("chosen", "rejected"), preference, ("prompt", "tools"))
NAMED = {
    "alpaca": Form(("instruction", "output"), _alpaca, ("input",), "Alpaca"),
    "sharegpt": Form(("conversations",), _sharegpt, ("tools",), "ShareGPT"),
    "preference": PREFERENCE,
}
PLAIN = (TEXT, COMPLETION, CHAT, LABELLED, PAIR, PREFERENCE)
# For each named form its fields whose columns may have other names, by what they are called in `columns`.
RENAMED = {
    "alpaca": {},
    "sharegpt": {"messages": "conversations"},
    "preference": {name: name for name in ("prompt", "chosen", "rejected")},
}
# A row has the first form whose columns it has: files often hold the same row in a second form too.
RECOGNISED = (CHAT, NAMED["sharegpt"], PREFERENCE, COMPLETION, NAMED["alpaca"], PAIR, LABELLED, TEXT)
FIELDS = tuple(dict.fromkeys(field for form in PLAIN for field in form.fields))


def accepted() -> str:
    """Return the columns of all forms, for messages."""
    return _forms(dict.fromkeys((*PLAIN, *NAMED.values())))


class Parser:
    """Makes rows of one file's records, which must all have the same form.

    Args:
        format: The name of the form; None: the form whose columns the records have, or that `columns` names.
        columns: The columns of a form's fields, where they have other names: `{"prompt": "question"}`.
        separator: Text put in front of each completion.

    Raises:
        ValueError: The format is unknown, or no form has these fields.
    """

    def __init__(self, format: Format | None = None, columns: Names | None = None, separator: str = ""):
        self._given = _given(format, dict(columns or {}))
        self._separator = separator
        self._first: Form | None = None
        self._kind: type[Row] | None = None
        self._left_out: dict[str, None] = {}
        self._optional: set[str] = set()
        self._known: dict[frozenset[str], Form | None] = {}

    def row(self, fields: Fields, where: str) -> Row:
        """Check one record.

        Raises:
            ValueError: It lacks a column, a value has the wrong type, or its form isn't that of the records before it;
                the message starts with `where`.
        """
        form, names = self._form_of(fields, where)
        if self._first is None:
            self._first = form
        elif form != self._first:
            raise ValueError(
                f"{where}: a row with {_shown(form.fields)} in a file with {_shown(self._first.fields)}; "
                "all rows must have the same keys"
            )
        row = form.parse(fields, names, where)
        kind = type(row.chosen if isinstance(row, Preference) else row)
        self._kind = self._kind or kind
        if kind is not self._kind:
            what, name = "a string" if kind is Completion else "a list of messages", names[form.fields[0]]
            raise ValueError(f'{where}: "{name}" is {what}, unlike that of the rows before it')
        # Text has no tools, and a column has one use.
        optional = [name for name in form.optional if not (name in names or (name == "tools" and kind is Completion))]
        used = {*names.values(), *optional}
        self._optional |= {name for name in optional if name in fields}
        self._left_out |= dict.fromkeys(name for name in fields if name not in used)
        if self._separator and isinstance(row, Preference) and ("prompt" in names or "prompt" in self._optional):
            return Preference(*(self._separated(answer, where) for answer in row))
        return self._separated(row, where) if self._separator else row

    def _separated(self, row: Any, where: str) -> Any:
        if not isinstance(row, Completion):
            raise ValueError(f"{where}: a separator is given, but the row has no prompt and completion of text")
        return row._replace(completion=self._separator + row.completion)

    def note(self, path: Path) -> str | None:
        """Return a line on how the records were read; None if they have the columns of a form and no others."""
        form = self._first
        if form is None or not (form.name or self._left_out):
            return None
        read = f"read as {form.name} " if form.name else "read "
        names = [*(form.fields if self._given is None else self._given[1].values())]
        names += [name for name in form.optional if name in self._optional]
        rest = f"; columns left out: {listed(self._left_out)}" if self._left_out else ""
        return f"{path}: {read}({', '.join(names)}){rest}"

    def _form_of(self, fields: Fields, where: str) -> tuple[Form, Names]:
        if self._given is not None:
            form, names = self._given
            missing = [name for name in names.values() if name not in fields]
            if missing:
                raise ValueError(f"{where}: no column {quoted(missing[0])}; the columns are {listed(fields)}")
            return form, names
        keys = frozenset(fields)
        if keys not in self._known:
            self._known[keys] = _recognised(keys)
        form = self._known[keys]
        if form is None:
            if keys.issuperset(COMPLETION.fields):
                raise ValueError(
                    f'{where}: a "label" beside "prompt" and "completion", which may mark bad completions; to learn all'
                    " alike, name the columns (--prompt-column prompt --completion-column completion)"
                )
            raise ValueError(f"{where}: keys {listed(fields)}; accepted are {accepted()}; or name the columns")
        return form, {field: field for field in form.fields}


def _recognised(keys: frozenset[str]) -> Form | None:
    form = next((form for form in RECOGNISED if keys.issuperset(form.fields)), None)
    # The label of a completion says whether it is a good one: to learn all alike must be asked for.
    return None if form is COMPLETION and "label" in keys else form


def _given(format: str | None, columns: dict[str, str]) -> tuple[Form, Names] | None:
    """Return the form and the columns that arguments select; None if they select none."""
    if unknown := [field for field in columns if field not in FIELDS]:
        raise ValueError(f"columns: {quoted(unknown[0])} given, expected {listed(FIELDS, len(FIELDS))}")
    if format is None:
        if not columns:
            return None
        form = next((form for form in PLAIN if columns.keys() <= {*form.fields, *form.optional}), None)
        if form is None:
            raise ValueError(f"columns: {listed(columns)} given together, expected those of one form: {_forms(PLAIN)}")
    elif format not in NAMED:
        raise ValueError(f"format: {quoted(format)} given, expected {' or '.join(get_args(Format))}")
    else:
        form, renamed = NAMED[format], RENAMED[format]
        if other := columns.keys() - renamed.keys():
            raise ValueError(f"columns: {listed(sorted(other))} given with the format {format}, which has its own")
        columns = {renamed[field]: name for field, name in columns.items()}
    return form, {field: field for field in form.fields} | columns


def _forms(forms: Iterable[Form]) -> str:
    return " or ".join(_shown(form.fields) for form in forms)


def _shown(keys: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{key}"' for key in keys) + "}"
