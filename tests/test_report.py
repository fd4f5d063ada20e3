"""The report: planted truth comes back, files appear whole, and names from files are only ever text."""

import errno
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from report_cases import FEATURES, LAYERS, NAMES, OUTPUTS, Planted, node

from lora_jax import report
from lora_jax.analysis import Amplification, spectrum
from lora_jax.report._summary import amplification_sentence


@pytest.fixture(scope="module")
def planted():
    return Planted()


@pytest.fixture(scope="module")
def measured(planted):
    return list(report.measure(planted.updates, weight=planted.weights.__getitem__, against=planted.others))


def test_planted_truth_comes_back(measured):
    assert sorted(one.name for one in measured) == sorted(NAMES)
    for one in measured:
        np.testing.assert_allclose(one.update.singular_values, [4, 3], rtol=1e-5)
        assert one.amplification.factor == pytest.approx(5 / np.sqrt(0.5), rel=1e-5)
        assert one.amplification.projected == pytest.approx(np.sqrt(0.5), rel=1e-5)
        assert one.weight.energy_rank(1.0) == OUTPUTS
        np.testing.assert_allclose(one.right.phi, [[1, 1, 1, 1], [1, 0.5, 0.5, 0.5]], atol=1e-5)
        np.testing.assert_allclose(one.left.phi, 0, atol=1e-5)
        assert one.right.random.shape == one.left.random.shape == (2, 4)


def test_kernels_are_named_by_layer_and_kind(measured):
    assert {(one.layer, one.kind) for one in measured} == {
        (layer, kind) for layer in range(LAYERS) for kind in ("self_attn.q_proj", "self_attn.v_proj")
    }
    two_stacks = report.positions_of(dict.fromkeys(("encoder.layers.0.q", "decoder.layers.0.q")))
    assert [place.kind for place in two_stacks.values()] == ["encoder.layers.q", "decoder.layers.q"]


def test_baselines_depend_on_the_kernel_and_the_seed_alone(planted, measured):
    name = NAMES[-1]
    alone = next(report.measure({name: planted.updates[name]}, weight=planted.weights.__getitem__))
    again = next(one for one in measured if one.name == name)
    assert alone.amplification.projected_random == again.amplification.projected_random
    other = next(report.measure({name: planted.updates[name]}, weight=planted.weights.__getitem__, seed=1))
    assert other.amplification.projected_random != alone.amplification.projected_random


@pytest.mark.slow
def test_files(measured, tmp_path):
    report.write(tmp_path / "r", measured, title="planted", sources={"adapter": "a"})
    assert sorted(os.listdir(tmp_path / "r")) == [
        "amplification.png",
        "overlap_A.png",
        "overlap_A_by_layer_1.png",
        "overlap_A_by_layer_2.png",
        "overlap_B.png",
        "overlap_B_by_layer_1.png",
        "overlap_B_by_layer_2.png",
        "projections.png",
        "report.html",
        "report.json",
        "spectra_update.png",
        "spectra_weight.png",
    ]
    values = json.loads((tmp_path / "r" / "report.json").read_text())
    first = values["kernels"][0]
    assert (first["name"], first["shape"], first["rank"]) == (NAMES[0], [FEATURES, OUTPUTS], 2)
    assert first["amplification"]["factor"] == pytest.approx(7.07107)
    assert first["similarity"]["a"]["phi"][1] == pytest.approx([1, 0.5, 0.5, 0.5], abs=1e-5)
    report.write(tmp_path / "again", measured, title="planted", sources={"adapter": "a"})
    assert (tmp_path / "r" / "report.html").read_text() == (tmp_path / "again" / "report.html").read_text()


class Seen(HTMLParser):
    """Which elements a page has, its ids, and what its attributes point to."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


HOSTILE = "model.layers.0.<script>alert(1)</script>\"'$\\frac{{$&\u202e{{ 7 * 7 }}"


def test_names_from_files_are_text(tmp_path):
    updates = {HOSTILE: node(np.eye(4, 2), np.eye(2, 3), 1.0)}
    found = list(report.measure(updates, weight=lambda name: np.eye(4, 3), against=updates))
    report.write(tmp_path / "r", found, title="<img src=x>", sources={"adapter": "<b>&"})
    html = (tmp_path / "r" / "report.html").read_text()
    seen = Seen(html)
    assert not {"script", "img", "b", "iframe", "object", "foreignobject"} & set(seen.tags)
    assert "&lt;script&gt;" in html
    assert "{{ 7 * 7 }}" in html
    assert len(seen.ids) == len(set(seen.ids))
    assert all(link.startswith(("#", "data:")) for link in seen.links)


def test_an_adapter_that_moved_nothing(tmp_path):
    updates = {"model.layers.0.q_proj": node(np.ones((5, 2)), np.zeros((2, 4)), 2.0)}
    found = list(report.measure(updates, weight=lambda name: np.eye(5, 4)))
    report.write(tmp_path / "r", found, title="untrained")
    assert "every update is zero" in (tmp_path / "r" / "report.html").read_text()
    assert json.loads((tmp_path / "r" / "report.json").read_text())["kernels"][0]["amplification"]["factor"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda updates: dict(list(updates.items())[:-1]), "1 only in --adapter"),
        (lambda updates: updates | {"lm_head": updates[NAMES[0]]}, r"1 only in --against \(lm_head\)"),
        (lambda updates: updates | {NAMES[0]: node(np.ones((7, 2)), np.ones((2, 3)), 1.0)}, r"\(7, 3\) in --against"),
    ],
)
def test_adapters_that_cannot_be_compared(planted, change, message):
    with pytest.raises(ValueError, match=message):
        next(report.measure(planted.updates, against=change(planted.updates)))


@pytest.mark.slow
def test_what_is_there_stays_whole(measured, tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and isn't empty"):
        report.write(tmp_path / "r", measured[:1], title="x")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(tmp_path / "r", measured[:1], title="x", overwrite=True)
    assert os.listdir(tmp_path) == ["r"]
    assert os.listdir(tmp_path / "r") == ["report.json"]
    assert (tmp_path / "r" / "report.json").read_text() == "kept"
    monkeypatch.undo()
    report.write(tmp_path / "r", measured[:1], title="x", overwrite=True)
    assert "report.html" in os.listdir(tmp_path / "r")


def test_the_current_folder_is_not_replaced(measured, tmp_path, monkeypatch):
    (tmp_path / "within").mkdir()
    monkeypatch.chdir(tmp_path / "within")
    for folder in (".", tmp_path / "within"):
        with pytest.raises(FileExistsError, match="the current folder can't be replaced"):
            report.write(folder, measured[:1], title="x")
    assert os.listdir(tmp_path) == ["within"]


def test_a_kernel_of_zeros_has_no_share():
    found = Amplification(*(np.float32(x) for x in (0.0, 0.0, 0.0, 0.0, 2.0)))
    real = Amplification(*(np.float32(x) for x in (1.0, 2.0, 0.5, 4.0, 2.0)))
    update = spectrum(np.eye(3))
    both = [
        report.KernelMeasurements(
            name=str(i), layer=i, kind="q", shape=(3, 3), rank=3, scale=1.0, update=update, amplification=one
        )
        for i, one in enumerate((found, real))
    ]
    (row,) = report.by_kind(both)
    assert row.relative == pytest.approx(0.5)
    assert "hold 25 % of ‖W‖ on average, W's own top directions 50 %, random ones 12 %" in amplification_sentence(both)


@pytest.mark.parametrize(
    "held", [["adapter_model.safetensors"], ["report.json", "notes.txt"], ["report.json", "photo.png"], ["report.html"]]
)
def test_nothing_but_a_report_is_overwritten(measured, tmp_path, held):
    for name in held:
        (tmp_path / name).write_text("kept")
    with pytest.raises(FileExistsError, match=f"has {held[-1]}, which is no part of a report and would be lost"):
        report.write(tmp_path, measured[:1], title="x", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted(held)
    assert all((tmp_path / name).read_text() == "kept" for name in held)
