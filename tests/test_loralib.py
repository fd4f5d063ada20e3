"""loralib's checkpoints (tests/golden/make_loralib.py made them): the ΔW that loralib merges, and nothing executed."""

import os
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_trees import nodes_of

import lora_jax
from lora_jax import loralib, peft
from lora_jax.loralib._load import blocks_of

GOLDEN = Path(__file__).parent / "golden" / "loralib"
ALPHA, ENABLED = 6, (True, False, True)


class Weight(NamedTuple):
    name: str
    transpose: bool = False


NAMES = {
    "embed/embedding": Weight("embed.weight"),
    **{f"layers/{name}/bias": Weight(f"layers.{{}}.{name}.bias") for name in ("query", "c_attn", "qkv")},
    "layers/query/kernel": Weight("layers.{}.query.weight", True),
    "layers/c_attn/kernel": Weight("layers.{}.c_attn.weight"),  # stored (in, out), as GPT-2's
    "layers/qkv/kernel": Weight("layers.{}.qkv.weight", True),
}


def base():
    widths = {"query": 4, "c_attn": 12, "qkv": 12}
    layers = {
        name: {"kernel": jnp.zeros((2, 6, width)), "bias": jnp.zeros((2, width))} for name, width in widths.items()
    }
    return {"embed": {"embedding": jnp.zeros((10, 6))}, "layers": layers}


def load(path=GOLDEN / "adapter.bin", **options):
    return loralib.load(path, base(), **({"names": NAMES, "alpha": ALPHA, "enable_lora": ENABLED} | options))


def test_updates_are_those_that_loralib_merges():
    updates = lora_jax.delta(load())
    with np.load(GOLDEN / "updates.npz") as expected:
        assert len(expected) == 7
        for name, update in expected.items():
            *parents, module = name.split(".")
            ours = updates["layers"][module]["kernel"][int(parents[1])] if parents else updates["embed"]["embedding"]
            theirs = update.T if ours.shape != update.shape else update
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_biases_are_replaced_and_alpha_is_over_the_rank_of_a_group():
    params = load()
    with_bias = loralib.read(GOLDEN / "adapter.bin")
    np.testing.assert_array_equal(params["layers"]["query"]["bias"].value[1], with_bias["layers.1.query.bias"])
    nodes = nodes_of(params)
    assert nodes["layers/c_attn/kernel"].a.shape == (2, 6, 6)  # two groups of rank 3
    np.testing.assert_array_equal(nodes["layers/c_attn/kernel"].scale, [2, 2])


def test_it_becomes_a_peft_adapter(tmp_path):
    params = load()
    peft.save(tmp_path / "a", params, names=NAMES)
    again = peft.load(tmp_path / "a", base(), names=NAMES)
    for path, node in nodes_of(params).items():
        for field in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(nodes_of(again)[path], field), getattr(node, field))
    np.testing.assert_array_equal(again["layers"]["qkv"]["bias"].value, params["layers"]["qkv"]["bias"].value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"enable_lora": None}, "adapts 2 of 3 projections: give them"),
        ({"enable_lora": (True, False, False)}, "adapts 2 of 3 projections"),
        (
            {"names": {path: name for path, name in NAMES.items() if "query" not in path}},
            "layers.0.query: no such kernel",
        ),
        (
            {"names": {path: name for path, name in NAMES.items() if "qkv/bias" not in path}},
            "'layers.0.qkv.bias' is unexp",
        ),
    ],
)
def test_what_does_not_fit_is_said(options, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        load(**options)
    assert "\n" not in str(caught.value)
    assert "adapter.bin" in str(caught.value)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16", None, True, 10**400])
def test_alpha_is_a_number(alpha):
    with pytest.raises(ValueError, match=r"^alpha: .* given, expected a number"):
        load(alpha=alpha)
    with pytest.raises(ValueError, match=r"^alpha: .* given, expected a number"):
        loralib.updates(GOLDEN / "adapter.bin", alpha=alpha, enable_lora=ENABLED)


def test_where_all_projections_are_adapted_others_may_not_be():
    """Factors of three groups, each of four outputs, and a kernel of three times four: of one layer among others."""
    for enable_lora in (None, ENABLED, (True, True, True), (True, False)):
        assert blocks_of(6, (12, 2), 12, enable_lora).adapted == (0, 1, 2)


def test_flags_of_any_kind():
    as_array = load(enable_lora=np.array(ENABLED))
    jax.tree.map(np.testing.assert_array_equal, as_array, load())
    for given in (True, (), (False, False), "yes"):
        with pytest.raises(ValueError, match=r"^enable_lora: .* given, expected a flag for each projection"):
            load(enable_lora=given)


def test_tensors_that_share_a_storage_may_not_fill_the_memory(tmp_path):
    """Three hundred views of one storage: a file of a megabyte would take three hundred."""
    path, side = tmp_path / "adapter.bin", 512
    number, text = (lambda n: b"J" + struct.pack("<i", n)), (lambda word: b"X" + struct.pack("<i", len(word)) + word)
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(side**2) + b"tQ"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + number(side) * 2 + b"\x86"
    view += number(side) + number(1) + b"\x86\x89ccollections\nOrderedDict\n)RtR"
    program = b"\x80\x02}(" + b"".join(text(b"module%d.lora_A" % i) + view for i in range(300)) + b"u."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter/data.pkl", program)
        archive.writestr("adapter/data/0", bytes(4 * side**2))
    assert path.stat().st_size < 2_000_000
    with pytest.raises(ValueError, match="its tensors take 314,572,800 bytes, in a file of"):
        loralib.read(path)


def member(name: bytes, size: int, start: int) -> tuple[bytes, bytes]:
    """A stored member's header in the file, and its entry in the directory at the end, which says where that is."""
    crc = zlib.crc32(bytes(size))
    common = struct.pack("<HHHHIIIHH", 0, 0, 0, 0, crc, size, size, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + common + name
    return local, b"PK\x01\x02" + struct.pack("<HH", 20, 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, start) + name


def test_members_that_overlap_may_not_fill_the_memory(tmp_path):
    """Each member's data hold the headers of the next ones, and all end in the same zeros: quoted whole by each."""
    path, side, count = tmp_path / "adapter.bin", 2**16, 64
    file, directory = b"", b""
    for i in range(count):
        local, entry = member(b"adapter/data/%d" % i, side, len(file))
        file, directory = file + local, directory + entry
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(file) + side, 0)
    path.write_bytes(file + bytes(side) + directory + b"PK\x05\x06" + end)
    with zipfile.ZipFile(path) as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > 30 * path.stat().st_size
    with pytest.raises(ValueError, match=r"its members take 4,194,304 bytes, in a file of .*: they overlap"):
        loralib.read(path)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (b"\x80\x02}(" + b"N" * 2**21 + b"u.", "too long for a table of tensors"),
        (b"\x80\x02" + b"N" * (2**24 + 1) + b".", "too large for a table of tensors"),
    ],
)
def test_a_long_pickle_is_refused_soon(tmp_path, program, problem):
    started = time.process_time()
    with pytest.raises(ValueError, match=problem):
        loralib.read(repacked(tmp_path / "x.bin", lambda members: members | {"adapter/data.pkl": program}))
    assert time.process_time() - started < 5


def test_a_storage_is_held_once_however_often_it_is_named(tmp_path):
    text = lambda word: b"X" + struct.pack("<i", len(word)) + word
    views = b""
    for number, (kind, size) in enumerate(
        [(b"Float", 4), (b"Int", 4), (b"Short", 2), (b"Half", 2), (b"Double", 8)] * 3
    ):
        count = b"J" + struct.pack("<i", 2**20 // size)
        storage = (
            b"(" + text(b"storage") + b"ctorch\n" + kind + b"Storage\n" + text(b"0") + text(b"cpu") + count + b"tQ"
        )
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85\x89"
        views += text(b"t%d" % number) + tensor + b"ccollections\nOrderedDict\n)RtR"
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter/data.pkl", b"\x80\x02}(" + views + b"u.")
        archive.writestr("adapter/data/0", bytes(2**20))
    tracemalloc.start()
    assert len(loralib.read(path)) == 15
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pointer.bin").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    for name, problem in (("pipe", "a pipe; expected a file"), ("pointer.bin", "a Git LFS pointer to 9 bytes")):
        with pytest.raises(ValueError, match=problem):
            loralib.read(tmp_path / name)


def test_a_shape_of_many_axes_is_refused_soon(tmp_path):
    """The product of thirty thousand large numbers would take minutes."""
    size = b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 30_000 + b"t"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    program = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + size
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("adapter/data.pkl", program + b"\x89ccollections\nOrderedDict\n)RtRs.")
        archive.writestr("adapter/data/0", bytes(4))
    started = time.process_time()
    with pytest.raises(ValueError, match="without a shape"):
        loralib.read(tmp_path / "x.bin")
    assert time.process_time() - started < 5


@pytest.mark.parametrize("key", [b"\x85" * 500_000, b"q\x00h\x00\x86" + b"q\x01h\x01\x86" * 40], ids=["deep", "shared"])
def test_a_key_of_nested_tuples_is_refused_before_it_is_hashed(tmp_path, key):
    """Python's own unpickler ends the process with a stack overflow at the first, and takes hours for the second."""
    program = b"\x80\x02})" + key + b"Ns."
    path = repacked(tmp_path / "x.bin", lambda members: members | {"adapter/data.pkl": program})
    with pytest.raises(ValueError, match="a key that is no name: 'tuple'"):
        loralib.read(path)


def test_another_width_is_another_model():
    params = base()
    params["layers"]["query"]["kernel"] = jnp.zeros((2, 8, 4))
    with pytest.raises(ValueError, match=r"lora_A has shape \(2, 6\), expected \(rank, 8\)"):
        loralib.load(GOLDEN / "adapter.bin", params, names=NAMES, alpha=1, enable_lora=ENABLED)


# The reader ---------------------------------------------------------------------------------------------------------


def test_views_parameters_and_dtypes():
    found = loralib.read(GOLDEN / "views.bin")
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(found["transposed"], whole.T)
    np.testing.assert_array_equal(found["part"], whole[1:3, ::2])
    np.testing.assert_array_equal(found["half"].astype(np.float32), whole)
    assert (found["half"].dtype, found["one"].shape) == (jnp.bfloat16, ())
    assert loralib.read(GOLDEN / "module.bin").keys() == {"weight", "bias"}


@pytest.mark.parametrize(("file", "problem"), [("whole_module.bin", "other than tensors"), ("legacy.bin", "not a zip")])
def test_what_holds_more_than_tensors_is_refused(file, problem):
    with pytest.raises(ValueError, match=problem):
        loralib.read(GOLDEN / file)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Malice()}, protocol=protocol))
    with pytest.raises(ValueError, match="other than tensors"):
        loralib.read(tmp_path / "x.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def repacked(path, change, method=zipfile.ZIP_STORED):
    """The adapter's zip, its members changed."""
    with zipfile.ZipFile(GOLDEN / "adapter.bin") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)
    return path


def test_the_repacked_file_is_read(tmp_path):
    assert loralib.read(repacked(tmp_path / "x.bin", dict)).keys() == loralib.read(GOLDEN / "adapter.bin").keys()


@pytest.mark.parametrize(
    ("change", "method", "problem"),
    [
        (dict, zipfile.ZIP_DEFLATED, "compressed"),
        (lambda members: {"x/y": b"1"}, zipfile.ZIP_STORED, "no data.pkl"),
        (lambda members: members | {"adapter/data/0": b"1234"}, zipfile.ZIP_STORED, "cut short or damaged"),
        (lambda members: members | {"adapter/byteorder": b"big"}, zipfile.ZIP_STORED, "little-endian"),
        (
            lambda members: members | {"adapter/data.pkl": pickle.dumps([1], 2)},
            zipfile.ZIP_STORED,
            "other than tensors",
        ),
        (lambda members: members | {"adapter/data.pkl": pickle.dumps((1,), 2)}, zipfile.ZIP_STORED, "holds a tuple"),
        (
            lambda members: members | {"adapter/data.pkl": pickle.dumps({"a": 1}, 2)},
            zipfile.ZIP_STORED,
            "'a' is no tensor",
        ),
    ],
)
def test_other_zips_are_refused(tmp_path, change, method, problem):
    with pytest.raises(ValueError, match=problem):
        loralib.read(repacked(tmp_path / "x.bin", change, method))


def attempt(path):
    """The tensors, or the message of the ValueError: no other error may come."""
    try:
        return loralib.read(path), ""
    except ValueError as error:
        return None, str(error)


def test_damage_is_refused_or_harmless(tmp_path):
    """Bits flipped anywhere; zip has a checksum for each member, so that most are noticed before they are looked at."""
    whole = loralib.read(GOLDEN / "adapter.bin")
    for seed in range(200):
        data = bytearray((GOLDEN / "adapter.bin").read_bytes())
        random = np.random.default_rng(seed)
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        (tmp_path / "x.bin").write_bytes(data[: random.integers(len(data))] if seed % 4 == 0 else data)
        started = time.process_time()
        found, refusal = attempt(tmp_path / "x.bin")
        assert refusal.isprintable()
        assert refusal or found.keys() == whole.keys()
        assert refusal or all(np.array_equal(found[name], whole[name]) for name in whole)
        assert time.process_time() - started < 2


def test_damaged_programs_are_refused_or_give_tensors(tmp_path):
    """The pickle itself damaged, with the zip's checksum made good: no error but ours."""
    random = np.random.default_rng(0)
    for _ in range(300):

        def damage(members):
            program = bytearray(members["adapter/data.pkl"])
            for _ in range(int(random.integers(1, 4))):
                program[random.integers(len(program))] = random.integers(256)
            return members | {"adapter/data.pkl": bytes(program)}

        found, refusal = attempt(repacked(tmp_path / "x.bin", damage))
        assert refusal.isprintable()
        assert refusal or all(isinstance(array, np.ndarray) for array in found.values())
