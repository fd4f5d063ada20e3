"""Patterns of leaf names, presets such as `"attention"`, and the ordered matcher that selects leaves by them."""

import difflib
import re
from collections.abc import Collection, Sequence

ATTENTION = "attention"
ALL_LINEAR = "all-linear"

# Final names that are the same in all layers: a pattern may leave them out.
LEAF_NAMES = frozenset({"kernel", "weight", "w", "embedding", "embeddings", "bias", "b", "scale", "offset"})
# Names of leaves that are a vector in each layer, even where stacking or heads give them more axes.
EMBEDDING_NAMES = frozenset({"embedding", "embeddings"})
VECTOR_NAMES = frozenset({"bias", "b", "scale", "offset"})

_MOST_SHOWN = 60  # characters of a pattern in a message

# Projections of one attention layer: names that must all be in one module, and then names that are selected with them
# where they exist. The first condition leaves out a policy's "value" head and a classifier's "out" layer.
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

# The projections of a group's first names, by their number: one kernel for each, or several in one kernel.
_ANCHOR_ROLES = {3: ("q", "k", "v"), 2: ("q", "kv"), 1: ("qkv",)}


def check_patterns(patterns: Sequence[str], what: str) -> None:
    """Raise ValueError for a pattern that can't match any path: an empty one or a broken regular expression."""
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
    """Match paths with patterns; where several patterns match a path, the first counts.

    A pattern is a suffix of whole components, with or without the final leaf name (`LEAF_NAMES`); a regular expression
    between slashes, which must match the whole path; or a preset, `"attention"` or `"all-linear"`.

    Args:
        patterns: In order of precedence.
        paths: All leaf paths of the tree, as `leaf_paths` gives them.
        what: The setting's name for error messages, such as `"targets"`.
        linear: The paths that `"all-linear"` selects; None where they aren't known.

    Returns:
        The index of the pattern that matches, for each path that one matches.

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
    """Return whether a leaf of this name is a bias or a norm's scale."""
    return path.rpartition("/")[2] in VECTOR_NAMES


def is_embedding(path: str) -> bool:
    """Return whether a leaf of this name is an embedding."""
    return path.rpartition("/")[2] in EMBEDDING_NAMES


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
    """Return the components that a suffix is compared with: all of them, and all without a final leaf name."""
    parts = path.split("/")
    return [parts, parts[:-1]] if parts[-1] in LEAF_NAMES and len(parts) > 1 else [parts]


def _ends_with(parts: list[str], suffix: list[str]) -> bool:
    return parts[-len(suffix) :] == suffix


def attention_roles(paths: Collection[str]) -> dict[str, list[str]]:
    """Return the modules of the attention layers by their projection: `"q"`, `"k"`, `"v"`, `"o"`; `"qkv"` where fused.

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
    """Return the leaves of each module by the components of its path, such as ("layer_0", "attn", "query")."""
    modules: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        modules.setdefault(tuple(_names(path)[-1]), []).append(path)
    return modules


def _beside(parent: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return the module `name` in `parent`; a name with slashes is beside it:
    `attention/output/dense` of `attention/self`.
    """
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


# Characters of a pattern in PEFT's syntax (dots between names, regular expressions without slashes) or in a shell's.
_FOREIGN = frozenset("*.^$|()[]+?\\, ")


def _from_elsewhere(pattern: str, paths: Collection[str]) -> str:
    """Return a hint how to write a pattern of PEFT's or a shell's in this library; empty for any other pattern.

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
    """Return the longest ending of a pattern, in whole names, that is a suffix of a path; empty if there is none."""
    ending = re.search(r"(?:^|[.*^/])([\w-]+(?:[./][\w-]+)*)\$?$", pattern.replace("\\.", "."))
    parts = re.split("[./]", ending[1]) if ending else []
    for stop in (len(parts), len(parts) - 1) if parts[-1:] == ["weight"] else (len(parts),):
        for start in range(stop):
            name = parts[start:stop]
            if len(name) == 1 and name[0] in LEAF_NAMES:  # "kernel" would select every kernel
                continue
            if any(_ends_with(known, name) for path in paths for known in _names(path)):
                return "/".join(name)
    return ""


def _rewritten(pattern: str) -> list[str]:
    """Return regular expressions for paths with slashes, from one for dotted names or from a shell's pattern."""
    body = pattern.strip("/").removeprefix("^").removesuffix("$").replace("\\.", "/")
    body = re.sub(r"(?<=[\w)\]])\.(?=[\w(\[])", "/", body)
    body = re.sub(r"(?<![.)\]])\*", ".*", body)
    last = body[body.rfind("/") + 1 :].lstrip(".*")
    return [body, f".*/{body}", f".*{last}"] if last else [body]


def _translated(regex: str, paths: Collection[str]) -> str:
    """Return the regular expression between slashes, with a leaf's name if it lacks one; empty if
    it matches no path.
    """
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
