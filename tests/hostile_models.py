"""Three hundred damaged or hostile model folders, and what comes of opening them one after the other.

Each is opened by `models.load` and `models.load_abstract`. A folder may be accepted where its model is still one; else
it must be refused in one line that names it, within seconds and without memory beyond the model's own.
`tests/test_models_hostile.py` opens some, `benchmarks/hostile_models.py` all.
"""

import faulthandler
import itertools
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from model_cases import CASES
from safetensors.numpy import load_file, save_file
from test_peft_hostile import add, flip_a_bit, remove, rename, reshape, retype, spoil_a_number, truncate

from lora_jax import models

SECONDS, BYTES, LONGEST = 5, 2**30, 1500
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1049\n"
WORLDS = ("llama_yarn", "qwen3_moe", "gemma3", "gpt2", "roberta_classification")
SHARDED = ("llama_yarn", "gemma3")
Damage = Callable[[Path, np.random.Generator], None]

WHOLE = [0, -1, 1, 3, 7, 10**5, 10**9, 10**18, 2**63, 10**400, 1.5, 1e308]
ABSURD = [*WHOLE, True, "", "x", "1", [], [1], {}, {"a": 1}, None, "x" * 10**5, [0] * 10**5, [[[]]]]
FIELDS = [
    *("vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "moe_intermediate_size"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "n_positions", "type_vocab_size", "num_experts", "num_experts_per_tok"),
    *("num_labels", "sliding_window", "max_window_layers", "pad_token_id", "rms_norm_eps", "layer_norm_eps"),
    *("layer_norm_epsilon", "initializer_range", "attn_logit_softcapping", "query_pre_attn_scalar", "hidden_act"),
    *("tie_word_embeddings", "attention_bias", "use_sliding_window", "layer_types", "mlp_only_layers", "eos_token_id"),
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "id2label", "label2id", "problem_type"),
    *("dtype", "torch_dtype", "architectures", "model_type", "quantization_config", "per_layer_config", "is_decoder"),
    *("attn_implementation", "_attn_implementation", "auto_map", "attribute_map", "__class__", "__dict__", "to_dict"),
    *(
        "get_text_config",
        "from_dict",
        "name_or_path",
        "transformers_version",
        "sub_configs_defaults",
        "output_attentions",
    ),
]
CHOSEN = [
    {"num_attention_heads": 0, "n_head": 0},
    {"num_attention_heads": -1, "n_head": -1},
    {"num_key_value_heads": 3},
    {"vocab_size": 10**18},
    {"num_hidden_layers": 10**9, "n_layer": 10**9},
    {"num_hidden_layers": 2**14, "n_layer": 2**14},
    {"num_experts": 2**16, "num_hidden_layers": 2**14},
    {"vocab_size": 2**31 - 1, "hidden_size": 2**20, "n_embd": 2**20, "intermediate_size": 2**24},
    {"hidden_size": 2**20, "intermediate_size": 2**24, "num_experts": 2**16, "num_hidden_layers": 2**14},
    {"dtype": 5},
    {"dtype": "float8_e4m3fn"},
    {"dtype": "int8"},
    {"torch_dtype": "__class__"},
    {"dtype": {"a": "b"}},
    {"num_labels": 10**9},
    {"id2label": {str(i): "x" for i in range(50_000)}},
    {"id2label": {"x": "y"}},
    {"id2label": {"0": 1}},
    {"layer_types": ["sliding_attention"] * 10**5},
    {"layer_types": ["x", 1, None]},
    {"architectures": ["x" * 10**5]},
    {"architectures": ["a\nb"]},
    {"model_type": ["llama"]},
    {"hidden_act": "__import__('os')"},
]
ROPE = [
    *({"rope_type": kind} for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")),
    *({"rope_type": "linear", "factor": value} for value in ("a", 0, -1, 1e400, [], None, True, 10**400)),
    *({"rope_type": "yarn", "factor": 2.0, "beta_fast": value} for value in ("a", -1, [], 1e300)),
    *({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": value} for value in ("a", 0, 10**400)),
    *({"rope_type": "dynamic", "factor": 2.0, "rope_theta": value} for value in ("a", 0, -1.0, 10**400, None)),
    {"rope_type": "longrope", "short_factor": "abc", "long_factor": [1]},
    {"rope_type": "longrope", "short_factor": [1.0] * 10**5, "long_factor": [1.0] * 10**5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1", "high_freq_factor": []},
    {"rope_type": {"a": 1}},
    {"rope_type": "to_dict"},
    {"full_attention": None},
    {"full_attention": "x", "sliding_attention": []},
    {"sliding_attention": {"rope_type": "yarn", "factor": "x"}},
]
TEXTS = [
    *("", "{", "[1]", "null", "true", '"llama"', "\0", "{}", "7", '{"vocab_size": ' + "9" * 10**5 + "}"),
    *("[" * 10**6, '{"a":' * 10**5, '{"model_type": "llama", "rms_norm_eps": NaN}', '{"model_type": "llama"}'),
    '{"model_type": "llama", "x": [' + ",".join(["{}"] * 1_300_000) + "]}",
    '{"model_type": "gpt2", ' + ",".join(f'"k{i}": {{}}' for i in range(250_000)) + "}",
    '{"model_type": "llama", "x": "' + "x" * 2**25 + '"}',
]


def settings(fields: dict[str, Any]) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def absurd_field(folder: Path, random: np.random.Generator) -> None:
    """A setting that the configuration has, or another one."""
    own = sorted(json.loads((folder / CONFIG).read_text()))
    names = own if random.integers(2) else FIELDS
    settings({names[random.integers(len(names))]: ABSURD[random.integers(len(ABSURD))]})(folder, random)


def text(file: str, content: str) -> Damage:
    return lambda folder, random: (folder / file).write_text(content) and None


def put(kind: str) -> Damage:
    """No file, or none that can be read, in the place of one of the folder's."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        files = sorted(path for path in folder.iterdir() if path.name == CONFIG or ".safetensors" in path.name)
        path = files[random.integers(len(files))]
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pointer":
            path.write_text(POINTER)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(folder)  # the name of a socket is short
                server.bind(path.name)
                os.chdir(here)
        elif kind != "nothing":
            path.symlink_to({"loop": path, "nowhere": folder / "nowhere", "device": Path("/dev/zero")}[kind])

    return damage


def index(change: Callable[[dict[str, Any], np.random.Generator], Any]) -> Damage:
    """The index changed; of a folder without one, one is made."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        path = folder / INDEX
        if not path.exists():
            names = list(load_file(folder / SINGLE))
            (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
            path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
        path.write_text(json.dumps(change(json.loads(path.read_text()), random)))

    return damage


INDICES: list[Callable[[dict[str, Any], np.random.Generator], Any]] = [
    *((lambda found, random, value=value: {"weight_map": value}) for value in (None, [], {}, "x", 3, {"a": None})),
    *(
        (lambda found, random, name=name: {"weight_map": {"a": name}})
        for name in ("../x.safetensors", "/dev/zero", "..", "a/b")
    ),
    *(
        (lambda found, random, name=name: {"weight_map": {"a": name}})
        for name in (7, [], {}, "x.bin", "x.safetensors", "\0.safetensors")
    ),
    lambda found, random: [found],
    lambda found, random: {"weight_map": {f"x{i}": f"{i}.safetensors" for i in range(200_000)}},
    lambda found, random: found | {"x": "x" * 2**26},
    lambda found, random: {"weight_map": dict.fromkeys(found["weight_map"], min(found["weight_map"].values()))},
]


def tensors(change: Callable) -> Damage:
    def damage(folder: Path, random: np.random.Generator) -> None:
        files = sorted(folder.glob("*.safetensors"))
        path = files[random.integers(len(files))]
        held = load_file(path)
        change(held, sorted(held)[random.integers(len(held))], random)
        save_file(held, path)

    return damage


def header(folder: Path, random: np.random.Generator) -> None:
    """A header that lies about its length, about offsets and shapes, or isn't JSON."""
    claim = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
    claims = [
        *({"a": claim | {"shape": shape}} for shape in ([2**40, 2**40], [2, -8], "x", [], [[2, 8]], [1] * 10**5)),
        *({"a": claim | {"data_offsets": span}} for span in ([0, 2**62], [64, 0], [-64, 0], [0], "x")),
        *({"a": claim | {"dtype": kind}} for kind in ("PICKLE", "F8_E4M3", 5, None)),
        {"a": claim, "b": claim},
        {"a": None},
        ["a"],
        {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(600_000)},
    ]
    contents = [json.dumps(one).encode() for one in claims]
    contents += [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"", b"{}"]
    content = contents[random.integers(len(contents))]
    lengths = [len(content)] * 6 + [2**63, 2**32, 0, len(content) + 10**6]
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(lengths[random.integers(len(lengths))].to_bytes(8, "little") + content + b"\0" * 64)


def swapped(folder: Path, random: np.random.Generator) -> None:
    """One of the folder's files in the place of another."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    one, other = random.choice(len(files), 2, replace=False)
    shutil.copyfile(files[one], files[other])


def another(world: str) -> Damage:
    """Another model's configuration, with this one's weights."""

    def damage(folder: Path, random: np.random.Generator) -> None:
        shutil.copyfile(folder.parent / world / CONFIG, folder / CONFIG)

    return damage


def everywhere(damage: Callable[[str], Damage]) -> Damage:
    """A damage of a file, to any of the folder's."""

    def chosen(folder: Path, random: np.random.Generator) -> None:
        files = sorted(path.name for path in folder.iterdir() if path.is_file())
        damage(files[random.integers(len(files))])(folder, random)

    return chosen


def cases() -> Iterator[tuple[str, str, Damage]]:
    """World, what is done to it, and the damage: about three hundred, of every kind early."""
    kinds: dict[str, list[Damage]] = {
        "field": [absurd_field] * 75,
        "setting": [settings(fields) for fields in CHOSEN],
        "rope": [settings({"rope_parameters": fields, "rope_scaling": None}) for fields in ROPE],
        "JSON": [text(CONFIG, content) for content in TEXTS],
        "index text": [text(INDEX, content) for content in ("", "{", "[" * 10**6, "\0", "null")],
        "index": [index(change) for change in INDICES],
        "no file": [
            put(kind) for kind in ("pipe", "pointer", "loop", "folder", "nowhere", "device", "socket", "nothing") * 4
        ],
        "a bit": [everywhere(flip_a_bit)] * 20,
        "cut short": [everywhere(truncate)] * 20,
        "tensors": [tensors(change) for change in (reshape, retype, remove, add, rename, spoil_a_number) * 4],
        "header": [header] * 26,
        "swapped": [swapped] * 10,
        "another's": [another(world) for world in WORLDS],
    }
    drawn = [
        (number / len(damages), kind, damage)
        for kind, damages in kinds.items()
        for number, damage in enumerate(damages)
    ]
    for place, (_, kind, damage) in enumerate(sorted(drawn, key=lambda entry: entry[0])):
        of_decoders = kind in ("rope",)
        yield (WORLDS[place % 3] if of_decoders else WORLDS[place % len(WORLDS)]), kind, damage


class Found(NamedTuple):
    """What came of one folder."""

    what: str
    outcome: str  # "loaded", or the message of the refusal
    faults: list[str]
    seconds: float


def write_worlds(folder: Path) -> None:
    """An honest folder of each family, some in several files."""
    random = np.random.default_rng(0)
    for world in WORLDS:
        target = folder / world
        target.mkdir()
        (target / CONFIG).write_text(json.dumps(CASES[world] | {"dtype": "float32"}))
        model = models.load_abstract(target)
        params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), model.params)
        models.save(target, model, params, overwrite=True, shard_bytes=20_000 if world in SHARDED else 10**9)


def open_it(folder: Path) -> tuple[str, list[str]]:
    """How it is taken by both functions, the weights first."""
    outcomes, faults = [], []
    for function in (models.load, models.load_abstract):
        began = time.process_time()
        try:
            model = function(folder)
            assert models.flatten(model.params).keys() == model.names.keys()
            outcomes.append("loaded")
        except (ValueError, OSError) as error:
            message = str(error)
            outcomes.append(message)
            if not message.isprintable() or len(message) > LONGEST or str(folder) not in message:
                faults.append(f"{function.__name__}: {type(error).__name__} with {message!r:.2000}")
        except BaseException as error:
            outcomes.append(repr(error)[:200])
            faults.append(f"{function.__name__}: {type(error).__name__}: {error!s:.2000}")
        if (seconds := time.process_time() - began) > SECONDS:
            faults.append(f"{function.__name__}: {seconds:.1f} s")
    return outcomes[0], faults


def run(count: int | None = None) -> Iterator[Found]:
    """Opens the first `count` folders, or all, one at a time."""
    with tempfile.TemporaryDirectory() as name:
        whole, hostile = Path(name), Path(name) / "hostile"
        write_worlds(whole)
        for world in WORLDS:
            assert open_it(whole / world) == ("loaded", []), world
        for number, (world, kind, damage) in enumerate(itertools.islice(cases(), count)):
            shutil.copytree(whole / world, hostile)
            damage(hostile, np.random.default_rng(number))
            peak, began = peak_bytes(), time.monotonic()
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # nothing else ends a read that never returns
            outcome, faults = open_it(hostile)
            faulthandler.cancel_dump_traceback_later()
            if (grown := peak_bytes() - peak) > BYTES:
                faults.append(f"{grown / 2**20:.0f} MiB")
            yield Found(f"{number} {world}: {kind}", outcome, faults, time.monotonic() - began)
            shutil.rmtree(hostile)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
