"""Five hundred damaged or hostile adapter folders: each is refused in one line, soon, and nothing is written anywhere.

A folder may be accepted only if it still says the same, as when a bit flips in the name of the base model.
"""

import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_peft_parameters as experts
from peft_trees import EMBEDDING, HEAD, NAMES, QUERY, TIED, adapted, base, config_in, node, same, tensors_in
from public_trees import attach
from safetensors.numpy import save_file
from test_peft_options import with_magnitudes

from lora_jax import peft, prefix

NODES = {QUERY: node(QUERY, [2, 1, 2], [2.0, 0.5, 2.0]), HEAD: node(HEAD, 3, 1.0)}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.attn.query.lora_A.weight"
SECONDS = 5  # for one folder; honest ones take a few hundredths


def flip_a_bit(file: str) -> Callable:
    def damage(folder: Path, random: np.random.Generator) -> None:
        data = bytearray((folder / file).read_bytes())
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        (folder / file).write_bytes(data)

    return damage


def truncate(file: str) -> Callable:
    def damage(folder: Path, random: np.random.Generator) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: random.integers(len(data))])

    return damage


def with_tensors(change: Callable) -> Callable:
    """The tensors changed, in a file that is well-formed and, as PEFT's, without a checksum."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        tensors = tensors_in(folder)
        change(tensors, sorted(tensors)[random.integers(len(tensors))], random)
        save_file(tensors, folder / TENSORS)

    return damage


def reshape(tensors, name, random):
    shape = list(tensors[name].shape)
    choices = [
        shape[::-1] + [1],
        [shape[0] + 1, *shape[1:]],
        [*shape[:-1], shape[-1] + 1],
        [0, *shape[1:]],
        shape[:-1],
        [],
        [1] * 9,
    ]
    tensors[name] = np.ones(choices[random.integers(len(choices))], np.float32)


def retype(tensors, name, random):
    dtypes = [np.uint16, np.int32, np.int8, np.uint8, np.bool_, np.int64, np.complex64]
    tensors[name] = tensors[name].astype(dtypes[random.integers(len(dtypes))])


def remove(tensors, name, random):
    del tensors[name]


def spoil_a_number(tensors, name, random):
    tensors[name].flat[random.integers(tensors[name].size)] = [np.nan, np.inf, -np.inf][random.integers(3)]


NAMES_OF_STRANGERS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows",
    "C:\\x",
    "a\0b",
    "a\nb",
    "",
    ".",
    "x" * 10_000,
    "‮evil",
    "__proto__",
    "${HOME}",
    "%s%s%n",
    "base_model.model.../../lora_A.weight",
    "base_model.model.lm_head.lora_A.default.weight",
    "base_model.model.lm_head.lora_C.weight",
    "base_model.model.model.layers.99.attn.query.lora_A.weight",
    "base_model.model.model.layers.-1.attn.query.lora_A.weight",
    "base_model.model.model.layers.{}.attn.query.weight",
    "base_model.model.lm_head.lora_magnitude_vector",
    "base_model.model.lm_head.weight",
]


def add(tensors, name, random):
    tensors[NAMES_OF_STRANGERS[random.integers(len(NAMES_OF_STRANGERS))]] = np.ones((2, 2), np.float32)


def rename(tensors, name, random):
    tensors[name + NAMES_OF_STRANGERS[random.integers(len(NAMES_OF_STRANGERS))] + "x"] = tensors.pop(name)


def hostile_header(folder: Path, random: np.random.Generator) -> None:
    """A file whose header lies: about its length, about offsets and shapes, or isn't JSON."""
    claimed = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
    claims = [
        {A: claimed | {"shape": [2**40, 2**40]}},
        {A: claimed | {"shape": [2, -8]}},
        {A: claimed | {"data_offsets": [0, 2**62]}},
        {A: claimed | {"data_offsets": [64, 0]}},
        {A: claimed | {"data_offsets": [-64, 0]}},
        {A: claimed | {"dtype": "PICKLE"}},
        {A: claimed, "the same bytes": claimed},
        {A: None},
        [A],
        {"__metadata__": {"format": ["pt"]}},
    ]
    headers = [json.dumps(claim).encode() for claim in claims]
    headers += [b"[" * 100_000, b"{" + b'"a":' * 50_000, b"\xff\xfe", b"", b"{}"]
    header = headers[random.integers(len(headers))]
    lengths = [len(header), len(header), 2**63, 2**32, 0, len(header) + 10**6]
    (folder / TENSORS).write_bytes(struct.pack("<Q", lengths[random.integers(len(lengths))]) + header + b"\0" * 64)


HOSTILE_FIELDS = [
    {"r": 10**9},
    {"r": -1},
    {"r": 10**400},
    {"r": 65_536},
    {"r": "8"},
    {"r": 1e300},
    {"rank_pattern": {"lm_head": 10**6}},
    {"rank_pattern": {"lm_head": 65_536}},
    {"rank_pattern": {".*": 60_000}},
    {"rank_pattern": [["lm_head", 2]]},
    {"rank_pattern": {"(" * 500: 2}},
    {"lora_alpha": 1e308},
    {"lora_alpha": [1]},
    {"alpha_pattern": {"lm_head": 10**300}},
    {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*x"},
    {"target_modules": "(a|a)*" * 50 + "$"},
    {"target_modules": "(" * 5000},
    {"target_modules": "x" * 10**6},
    {"target_modules": {"a": "b"}},
    {"target_modules": [["query"]]},
    {"target_modules": []},
    {"target_modules": None},
    {"exclude_modules": "((((.*)+)+)+)+"},
    {"modules_to_save": ["(.*)*"]},
    {"modules_to_save": ["../../model"] * 3 + ["norm"]},
    {"layers_to_transform": [10**30]},
    {"layers_pattern": "(.*)*", "layers_to_transform": [0]},
    {"peft_type": "../LORA"},
    {"peft_type": None},
    {"auto_mapping": None, "trust_remote_code": True},
    {"megatron_config": {"__reduce__": "os.system"}},
    {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"},
    {"init_lora_weights": "pissa_niter_1000000000"},
    {"init_lora_weights": {"x": []}},
    {"bias": ["all"]},
    {"bias": "all"},
    {"use_dora": True},
    {"use_rslora": True},
    {"fan_in_fan_out": "yes"},
    {"ensure_weight_tying": 1},
    {"trainable_token_indices": {"model.embed": [10**9]}},
    {"trainable_token_indices": {"../model.embed": [1]}},
    {"trainable_token_indices": [-1]},
    {"trainable_token_indices": list(range(12)) * 1000},
    {"target_parameters": ["../../lm_head.weight"]},
    {"target_parameters": ["(.*)*"]},
    {"lora_jax_prefix": {"length": 10**12, "after": 0}},
    {"lora_jax_prefix": {"length": 3, "after": -1}},
    {"lora_jax_prefix": "../../prefix"},
    {"target_modules": ".*" * 9999 + "x"},
    {"exclude_modules": "(" + "|".join(f".*{i}.*" for i in range(1500)) + ")"},
    {"rank_pattern": {f"x{i}": 2 for i in range(100_000)}},
    {"rank_pattern": {f".*x{i}.*": 2 for i in range(2000)}},
    {"alpha_pattern": {".*" * 500 + str(i): 2 for i in range(300)}},
    {"modules_to_save": [".*" * 500 + str(i) for i in range(300)]},
]


def hostile_field(folder: Path, random: np.random.Generator) -> None:
    honest = config_in(folder)
    changes = [fields for fields in HOSTILE_FIELDS if honest | fields != honest]
    (folder / CONFIG).write_text(json.dumps(honest | changes[random.integers(len(changes))]))


def hostile_json(folder: Path, random: np.random.Generator) -> None:
    texts = [
        "[" * 10**6,
        '{"a":' * 10**5,
        '{"r": ' + "9" * 10**5 + "}",
        "null",
        "true",
        '"LORA"',
        "{}",
        '{"r": Infinity}',
        "\0",
    ]
    (folder / CONFIG).write_text(texts[random.integers(len(texts))])


def not_a_file(folder: Path, random: np.random.Generator) -> None:
    """A folder, a dangling link or a device where a file should be."""
    path = folder / [CONFIG, TENSORS][random.integers(2)]
    path.unlink()
    kind = random.integers(3)
    if kind == 0:
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == 1 else folder / "nowhere")


def pickle_instead(folder: Path, random: np.random.Generator) -> None:
    """Names that torch.load would open; this one would write a file if it were unpickled."""
    code = b"cbuiltins\nopen\n(V" + str(folder.parent / "pwned").encode() + b"\nVw\ntR."
    (folder / TENSORS).unlink()
    (folder / ["adapter_model.bin", "adapter_model.pt", TENSORS][random.integers(3)]).write_bytes(code)


KINDS: dict[str, tuple[Callable, int]] = {
    "a bit in the tensors' file": (flip_a_bit(TENSORS), 110),
    "a bit in the config": (flip_a_bit(CONFIG), 60),
    "tensors cut short": (truncate(TENSORS), 40),
    "config cut short": (truncate(CONFIG), 40),
    "shape": (with_tensors(reshape), 30),
    "dtype": (with_tensors(retype), 25),
    "missing": (with_tensors(remove), 20),
    "not a number": (with_tensors(spoil_a_number), 25),
    "a stranger's name": (with_tensors(add), 30),
    "another name": (with_tensors(rename), 20),
    "header": (hostile_header, 35),
    "field": (hostile_field, 45),
    "JSON": (hostile_json, 8),
    "no file": (not_a_file, 6),
    "pickle": (pickle_instead, 6),
}


class World(NamedTuple):
    """An honest adapter, to be damaged."""

    params: Any
    base: Any
    names: Any
    options: dict[str, Any]  # of how it is saved


def with_every_option() -> World:
    """DoRA, a module that was trained in full, rows of an embedding, and a prefix."""
    params = adapted(with_magnitudes(QUERY, HEAD))
    params["norm"] = {name: leaf + 1 for name, leaf in params["norm"].items()}
    params["embed"]["embedding"] = params["embed"]["embedding"].at[jnp.array([3, 7])].set(0.5)
    params = prefix.put(params, np.ones((3, 8), np.float32), after=1)
    return World(params, base(), NAMES, {"also_train": ("/norm",), "tokens": {EMBEDDING: [3, 7]}})


def untied() -> World:
    """Of a tied model: the head adapted, and the embedding trained in full by itself."""
    plain = base(tied=True)
    tree = plain | {"lm_head": {"kernel": plain["embed"]["embedding"].T}}
    params = attach(tree, {HEAD: node(HEAD, 3, 1.0)}, {EMBEDDING: plain["embed"]["embedding"] + 1})
    return World(params, plain, TIED, {"also_train": (f"/{EMBEDDING}/",)})


WORLDS = {
    "factors": lambda: World(adapted(NODES), base(), NAMES, {}),
    "every option": with_every_option,
    "untied": untied,
    "parameters": lambda: World(experts.adapted(**experts.EVERYTHING), experts.base(), experts.NAMES, {"fused": True}),
}
PREFIX_KINDS: dict[str, tuple[Callable, int]] = {
    "a bit in the prefix": (flip_a_bit(f"prefix/{TENSORS}"), 60),
    "a bit in the prefix's config": (flip_a_bit(f"prefix/{CONFIG}"), 40),
    "a prefix cut short": (truncate(f"prefix/{TENSORS}"), 20),
    "a prefix's config cut short": (truncate(f"prefix/{CONFIG}"), 20),
}


# What a damage may leave as it was: a name or a description in a config, the order of what a file holds.
LEAST = {
    "a bit in the config": 0.7,
    "field": 0.9,
    "a bit in the tensors' file": 0.98,
    "a bit in the prefix": 0.8,
    "a bit in the prefix's config": 0.3,
}


@pytest.mark.parametrize("number", range(len(HOSTILE_FIELDS)))
def test_every_hostile_field_is_refused_soon(number, tmp_path):
    params, fields = adapted(NODES), HOSTILE_FIELDS[number]
    peft.save(tmp_path / "a", params, names=NAMES)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config_in(tmp_path / "a") | fields))
    started = time.process_time()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a"))) as caught:
        peft.load(tmp_path / "a", base(), names=NAMES)
    assert str(caught.value).isprintable()
    assert time.process_time() - started < SECONDS


def test_there_are_five_hundred():
    assert sum(count for _, count in KINDS.values()) == 500


@pytest.mark.parametrize(
    ("world", "kind"),
    [(world, kind) for world in WORLDS for kind in KINDS] + [("every option", kind) for kind in PREFIX_KINDS],
)
def test_each_is_refused_or_still_says_the_same(world, kind, tmp_path):
    whole, hostile = tmp_path / "whole", tmp_path / "hostile"
    params, plain, names, options = WORLDS[world]()
    peft.save(whole, params, names=names, **options)
    damage, count = (KINDS | PREFIX_KINDS)[kind]
    count = count if world == "factors" or kind in PREFIX_KINDS else -(-count // 4)
    honest = peft.load(whole, plain, names=names)
    assert same(honest, params)
    refused = 0
    for seed in range(count):
        shutil.copytree(whole, hostile)
        damage(hostile, np.random.default_rng(seed))
        started = time.process_time()
        try:
            loaded = peft.load(hostile, plain, names=names)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert str(hostile) in message
            assert message.isprintable()
            assert len(message) < 4000
            refused += 1
        else:
            assert jax.tree.structure(loaded) == jax.tree.structure(honest), seed
            assert same(loaded, params)
        assert time.process_time() - started < SECONDS
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile", "whole"]
        shutil.rmtree(hostile)
    # The untied one is the smallest, so that more of its bits are of names, and of the header's `"format": "pt"`, whose
    # place changes from one writing to the next: neither harms anything.
    spared = 2 if world == "untied" and kind in ("a bit in the tensors' file", "a bit in the config") else 0
    assert refused >= LEAST.get(kind, 1) * count - spared
