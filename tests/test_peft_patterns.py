"""PEFT's regular expressions: the same answers as `re`, and always soon."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.peft import _module_patterns as _patterns
from lora_jax.peft._module_patterns import Budget, fullmatch, layer, names_end, names_part

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-b.]", r"\d", "1", r"\w", r"\S", "^", "$", r"\b", r"\B", r"\A", r"\Z"]
ATOMS += ["{", "{e<=1}", "{}", "[{]", "B", r"(?<=a)", r"(?<!b1)", "(?#{)", "]", "}"]
ATOMS += [
    r"\N{DIGIT ONE}",
    "[[]",
    "[^[]",
    "[a||b]",
    "[a-z&&x]",
    "[[:alpha:]]",
    "[!--]",
    "[a~~b]",
    r"[\N{DIGIT ONE}[]",
    r"\(",
]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{2,}", "{,2}", "{,}", "*?", "+?", "??", "*+", "{2}?", "{1,2}+"]


def larger(inner):
    return st.one_of(
        st.builds(str.__add__, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(REPEATS)),
        st.builds("(?{}{}){}".format, st.sampled_from("=!"), inner, inner),
        st.builds("(?P<name>{})".format, inner),
        st.builds("(?i:{})".format, inner),
        st.builds("(?>{})".format, inner),
        st.builds(r"({})\1".format, inner),
        st.builds("({})?(?(1){}|a)".format, inner, inner),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), larger, max_leaves=6)
SPACED = st.recursive(st.sampled_from([*ATOMS, " a", " ", "\n", "#[(\n", r"\ ", "[ #]", " {2}"]), larger, max_leaves=6)


@settings(max_examples=1000)
@given(st.one_of(PATTERNS, st.builds("(?x){}".format, SPACED)), st.text("ab1.x{B}[&|", min_size=1, max_size=6))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_same_answer_as_re(pattern, name):
    try:
        expected = re.fullmatch(pattern, name) is not None
    except re.error:  # the one name twice, a group that is still open
        with pytest.raises(ValueError, match="pattern"):
            fullmatch(pattern, name)
        return
    assert fullmatch(pattern, name) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*vision).*(?:q_proj|k_proj).*$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)"
        r"\.(?:(?:q_proj|k_proj)))",
        r"(?i)MODEL\.layers.*",
        r".*\.(?i:Q_PROJ|k_proj)",
        r".*(?<!k)_proj",
        r".*\.(\d)\1\..*",
        "(?x) .* \\. # [all (layers\n(q|k) _proj",
        r"\(?maxpool|lm\_head",
        r".*[[:alpha:]|&&.]_proj",
        r".*\N{LOW LINE}head",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["model.layers.11.self_attn.q_proj", "vision.layers.1.self_attn.k_proj", "lm_head"])
def test_patterns_as_adapters_have_them(pattern, name):
    assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1.q_proj", "model.layers.1.q_proj", True),
        ("ayers.1.q_proj", "model.layers.1.q_proj", False),
        ("^layers.1.q_proj", "model.layers.1.q_proj", False),
        ("(q|v)_proj", "model.layers.1.q_proj", True),
        ("q_proj|v_proj", "model.layers.1.q_proj", True),
        (r"(?i:Q)_proj", "model.layers.1.q_proj", True),
        (r"\2_proj", "a_proj", False),  # the second group is PEFT's own, around the pattern
    ],
)
def test_endings_as_peft_finds_them(pattern, name, expected):
    try:
        theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        with pytest.raises(ValueError, match="pattern"):
            names_end(pattern, name)
        return
    assert names_end(pattern, name) == theirs == expected


@pytest.mark.parametrize("pattern", ["norm", "(norm|q)", "norm|self", "q_.*", "attn.q_proj", r"^model"])
@pytest.mark.parametrize("name", ["model.layers.11.self_attn.q_proj", "model.norm", "self.norms"])
def test_parts_as_peft_finds_them(pattern, name):
    assert names_part(pattern, name) == (re.match(rf"(^|.*\.){pattern}($|\..*)", name) is not None)


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ((), "model.layers.3.experts.7.up", 3),
        ((), "layers.3.up", None),
        ((), "model.norm", None),
        (("h", "layers"), "model.layers.3.experts.7.up", 3),
        (("experts",), "model.layers.3.experts.7.up", 7),
        ((r"(?:text|vision)\.\w+",), "m.text.layers.12.up", 12),
    ],
)
def test_layers(patterns, name, expected):
    assert layer(patterns, name) == expected


@pytest.mark.parametrize("pattern", ["(a+)+x", "((((((a*)*)*)*)*)*)*x", ".*" * 30 + "x", "(a|a|aa)*x", "(a|aa)+b?c"])
def test_no_pattern_takes_long(pattern, monkeypatch):
    """An answer or a refusal, within the time that is there for all."""
    monkeypatch.setattr(_patterns, "SECONDS", 0.1)
    budget, started = Budget(), time.process_time()
    with contextlib.suppress(ValueError):
        for _ in range(3):
            assert not fullmatch(pattern, "a" * 60, budget)
    assert time.process_time() - started < 1


def test_a_pattern_without_end_is_refused_and_so_is_all_after_it(monkeypatch):
    monkeypatch.setattr(_patterns, "SECONDS", 0.05)
    budget = Budget()
    with pytest.raises(ValueError, match="take too long"):
        fullmatch("(a|aa)+b?c", "a" * 60, budget)
    with pytest.raises(ValueError, match="take too long"):
        fullmatch("a.*", "abc", budget)
    budget.add_time_for(1000)
    assert fullmatch("a.*", "abc", budget)


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a**", "*a", "[a", "[b-a]", "\\", "(?<=a+)b", r"\1(a)", "a(?i)", "a{3,2}", "a{99999999999}", r"\p{L}"]
    + ["(?P<1>a)", "(?x:a b)", "(?i-x:a)", "a(?x)b", "[a--b]", "a" * 20_001, "(" * 5000 + "a" + ")" * 5000]
    + ["(ab){4000000}", "(((a{100}){100}){100}){100}", "((a{0,99999}){0,99999}){99999}x", "(a{1000})(?#){1000}"]
    + ["(?#()(a{1000}(?#))){1000}", "([(]a{1000}[)]){1000}", r"(\(a{1000}\)){1000}", "(?R)", "a{" + "9" * 5000 + "}"],
)
def test_what_cannot_be_read_is_said_soon(pattern):
    started = time.process_time()
    with pytest.raises(ValueError, match="pattern") as caught:
        fullmatch(pattern, "a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 1
