"""Names of leaves, and the one ordered matcher that picks leaves by name."""

import difflib
import re
from collections.abc import Collection, Sequence

ATTENTION = "attention"
ALL_LINEAR = "all-linear"

# Final names that say nothing about the layer: a pattern may leave them out.
LEAF_NAMES = frozenset({"kernel", "weight", "w", "embedding", "embeddings", "bias", "b", "scale", "offset"})
# Of these, the ones that hold a vector per layer even where stacking or heads give them more axes.
VECTOR_NAMES = frozenset({"bias", "b", "scale", "offset"})

_MOST_SHOWN = 60  # characters of a pattern in a message

# Projections of one attention layer: the names that must stand together, then the ones they bring along where they
# exist. Asking for the whole group keeps a policy's "value" head and a classifier's "out" layer from passing for one.
_ATTENTION_GROUPS = (
    (("query", "key", "value"), ("out", "linear", "attention/output/dense")),  # Linen, NNX, Haiku; BERT, RoBERTa, ViT
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj")),  # Llama, Mistral, Qwen, Gemma; OPT, BART, CLIP
    (("q", "k", "v"), ("o", "out")),  # T5
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),  # DistilBERT
    (("c_attn",), ("q_attn", "c_proj")),  # GPT-2
    (("query_key_value",), ("dense",)),  # GPT-NeoX, BLOOM, Falcon
    (("qkv_proj",), ("o_proj", "out_proj")),  # Phi-3, CodeGen
    (("Wqkv",), ("out_proj",)),  # MPT
    (("qkv",), ("proj",)),  # timm
    (("q_einsum", "kv_einsum"), ("attn_vec_einsum",)),  # Gemma, grouped-query
    (("qkv_einsum",), ("attn_vec_einsum",)),  # Gemma
)

# What a group's first names project to, by how many there are: one kernel for each, or several in one.
_ANCHOR_ROLES = {3: ("q", "k", "v"), 2: ("q", "kv"), 1: ("qkv",)}


def check_patterns(patterns: Sequence[str], what: str) -> None:
    """Raise ValueError for a pattern that no path could ever match: an empty one or a broken regular expression."""
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip("/"):
            raise ValueError(f"{what}: {pattern!r} is not a name; give a leaf's name, '/regex/' or a preset")
        if _is_regex(pattern):
            try:
                re.compile(pattern[1:-1])
            except re.error as error:
                raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None


def match(
    patterns: Sequence[str], paths: Collection[str], *, what: str, linear: Collection[str] | None = None
) -> dict[str, int]:
    """Which pattern each path matches; the first that does wins.

    A pattern is a suffix of whole components, with or without the final leaf name (`LEAF_NAMES`); a regular expression
    between slashes, which must match the whole path; or a preset, `"attention"` or `"all-linear"`.

    Args:
      patterns: In order of precedence.
      paths: All leaf paths of the tree, as `leaf_paths` gives them.
      what: Names the setting in error messages: `"targets"`.
      linear: The paths that `"all-linear"` stands for; None where they aren't known.

    Returns:
      For each path that matches, the index of its pattern.

    Raises:
      ValueError: A pattern matches no path at all (the nearest names are listed), or `"all-linear"` isn't known.

    >>> paths = ["layer_0/q_proj/kernel", "layer_0/q_proj/bias", "head/kernel"]
    >>> match(["layer_0/q_proj/bias", "q_proj"], paths, what="also_train")
    {'layer_0/q_proj/kernel': 1, 'layer_0/q_proj/bias': 0}
    >>> match(["/.*/kernel/"], paths, what="targets")
    {'layer_0/q_proj/kernel': 0, 'head/kernel': 0}
    >>> match(["q_prj"], paths, what="targets")
    Traceback (most recent call last):
    ValueError: targets: 'q_prj' matches no leaf; nearest: 'q_proj'
    """
    check_patterns(patterns, what)
    chosen: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        hits = _matches(pattern, paths, what, linear)
        if not hits:
            shown = repr(pattern) if len(pattern) <= _MOST_SHOWN else f"{pattern[:_MOST_SHOWN]!r}..."
            raise ValueError(f"{what}: {shown} matches no leaf; {_hint(pattern, paths)}")
        for path in hits:
            chosen.setdefault(path, index)
    return {path: chosen[path] for path in paths if path in chosen}


def is_vector(path: str) -> bool:
    """Whether the leaf is a bias or a norm's scale by its name."""
    return path.rpartition("/")[2] in VECTOR_NAMES


def _is_regex(pattern: str) -> bool:
    return len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/")


def _matches(pattern: str, paths: Collection[str], what: str, linear: Collection[str] | None) -> list[str]:
    if pattern == ATTENTION:
        wanted = _attention(paths)
    elif pattern == ALL_LINEAR:
        if linear is None:
            raise ValueError(
                f"{what}: 'all-linear' must know how each kernel is used;"
                " pass axes=lora_jax.kernel_axes(apply_fn, params, *inputs)"
            )
        wanted = set(linear)
    elif _is_regex(pattern):
        regex = re.compile(pattern[1:-1])
        return [path for path in paths if regex.fullmatch(path)]
    else:
        suffix = pattern.strip("/").split("/")
        return [path for path in paths if any(_ends_with(name, suffix) for name in _names(path))]
    return [path for path in paths if path in wanted]


def _names(path: str) -> list[list[str]]:
    """The components that a suffix is compared with: all, and without a final leaf name."""
    parts = path.split("/")
    return [parts, parts[:-1]] if parts[-1] in LEAF_NAMES and len(parts) > 1 else [parts]


def _ends_with(parts: list[str], suffix: list[str]) -> bool:
    return parts[-len(suffix) :] == suffix


def attention_roles(paths: Collection[str]) -> dict[str, list[str]]:
    """The modules of the attention layers by what they project to: `"q"`, `"k"`, `"v"`, `"o"`; `"qkv"` where fused.

    >>> attention_roles([f"attn/{name}/kernel" for name in ("query", "key", "value", "out", "norm")])
    {'q': ['attn/query'], 'k': ['attn/key'], 'v': ['attn/value'], 'o': ['attn/out']}
    """
    modules = _modules(paths)
    found: dict[str, list[str]] = {}
    for parent in dict.fromkeys(module[:-1] for module in modules):
        for anchors, others in _ATTENTION_GROUPS:
            if all((*parent, name) in modules for name in anchors):
                roles = (*_ANCHOR_ROLES[len(anchors)], *("o" if name != "q_attn" else "q" for name in others))
                for role, name in zip(roles, (*anchors, *others), strict=True):
                    module = _beside(parent, name)
                    if module in modules:
                        found.setdefault(role, []).append("/".join(module))
    return found


def _attention(paths: Collection[str]) -> set[str]:
    modules = _modules(paths)
    named = [module for group in attention_roles(paths).values() for module in group]
    return {path for module in named for path in modules[tuple(module.split("/"))]}


def _modules(paths: Collection[str]) -> dict[tuple[str, ...], list[str]]:
    """The leaves of each module, which goes by its path's components: ("layer_0", "attn", "query")."""
    modules: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        modules.setdefault(tuple(_names(path)[-1]), []).append(path)
    return modules


def _beside(parent: tuple[str, ...], name: str) -> tuple[str, ...]:
    """`name` in `parent`; with slashes, `name` beside it: `attention/self` to `attention/output/dense`."""
    above, *below = name.split("/")
    if not below:
        return (*parent, name)
    return (*parent[:-1], *below) if parent[-2:-1] == (above,) else ()


def _hint(pattern: str, paths: Collection[str]) -> str:
    if not paths:
        return "the tree has no leaves"
    if found := _from_elsewhere(pattern, paths):
        return found
    length = 2 if _is_regex(pattern) or pattern == ATTENTION else len(pattern.strip("/").split("/"))
    known = {"/".join(name[-length:]) for path in paths for name in _names(path)}
    close = difflib.get_close_matches(pattern.strip("/"), sorted(known), n=3, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(map(repr, close))
    layers = list(dict.fromkeys("/".join(_names(path)[-1][-length:]) for path in paths))
    return "the tree has " + ", ".join(map(repr, layers[:8])) + (", ..." if len(layers) > 8 else "")


# What makes a pattern one of PEFT's, with dots between names and regular expressions without slashes, or a shell's.
_FOREIGN = frozenset("*.^$|()[]+?\\, ")


def _from_elsewhere(pattern: str, paths: Collection[str]) -> str:
    """How a pattern that matches nothing is written here, if it is PEFT's or a shell's.

    >>> _from_elsewhere(".*q_proj", ["layers/q_proj/kernel"])
    "here it is 'q_proj'; regular expressions match whole paths and stand between slashes: '/.*q_proj/kernel/'"
    """
    if _is_regex(pattern):
        regex = _translated(pattern[1:-1], paths)
        return f"it must match whole paths, the name of the leaf included: {regex!r}" if regex else ""
    if not _FOREIGN & set(pattern):
        return ""
    several = [_suffix(name, paths) for name in re.split(r"[,|\s]+", pattern.strip("()[]^$ "))]
    if len(several) > 1 and all(several):
        return f"here these are several: {', '.join(map(repr, several))}"
    name = _suffix(pattern, paths)
    written = [f".*{re.escape(name)}"] if name else _rewritten(pattern)
    regex = next(filter(None, (_translated(one, paths) for one in (*written, ".*"))))
    rule = f"regular expressions match whole paths and stand between slashes: {regex!r}"
    return f"here it is {name!r}; {rule}" if name else rule


def _suffix(pattern: str, paths: Collection[str]) -> str:
    """The longest ending of whole names, dots or slashes between them, that is a suffix of a path; empty for none."""
    ending = re.search(r"(?:^|[.*^/])([\w-]+(?:[./][\w-]+)*)\$?$", pattern.replace("\\.", "."))
    parts = re.split("[./]", ending[1]) if ending else []
    for stop in (len(parts), len(parts) - 1) if parts[-1:] == ["weight"] else (len(parts),):
        for start in range(stop):
            name = parts[start:stop]
            if len(name) == 1 and name[0] in LEAF_NAMES:  # "kernel" would be every one
                continue
            if any(_ends_with(known, name) for path in paths for known in _names(path)):
                return "/".join(name)
    return ""


def _rewritten(pattern: str) -> list[str]:
    """A regular expression of dotted names, or a shell's pattern, as ones of names with slashes between them."""
    body = pattern.strip("/").removeprefix("^").removesuffix("$").replace("\\.", "/")
    body = re.sub(r"(?<=[\w)\]])\.(?=[\w(\[])", "/", body)
    body = re.sub(r"(?<![.)\]])\*", ".*", body)
    last = body[body.rfind("/") + 1 :].lstrip(".*")
    return [body, f".*/{body}", f".*{last}"] if last else [body]


def _translated(regex: str, paths: Collection[str]) -> str:
    """The regular expression between slashes, with a leaf's name where it lacks one; empty where it still fits none."""
    try:
        compiled = re.compile(regex)
    except re.error:
        return ""
    for path in sorted(paths, key=is_vector):
        if compiled.fullmatch(path):
            return f"/{regex}/"
        module, _, leaf = path.rpartition("/")
        if module and leaf in LEAF_NAMES and compiled.fullmatch(module):
            return f"/{regex}/{leaf}/"
    return ""
