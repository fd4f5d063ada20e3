"""Laws of sweeps: each adapter as from a run alone, none touched by another, one program for all."""

import collections
import csv
import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
import scipy.stats
import tiny
from marks import few
from public_trees import leaves_of
from test_cli import compiled_once

import lora_jax
from lora_jax import LoRAConfig, Override, sweep
from lora_jax.data import LabelledExample
from lora_jax.sweep import Point, _memory, _program, _round
from lora_jax.sweep._batches import ShuffledBatches
from lora_jax.sweep._start import AdapterFactory
from lora_jax.train import LANGUAGE_MODELLING, TrainConfig, make_optimizer, make_step, train

pytestmark = pytest.mark.usefixtures(compiled_once.__name__)

PARAMS = tiny.small_init(jax.random.key(0))
IDS = jax.ShapeDtypeStruct((1, 8), "int32")
AXES = lora_jax.kernel_axes(tiny.small_apply, PARAMS, IDS, IDS)
ROWS, VALID = tiny.examples(24), tiny.examples(8, seed=1)
CONFIG = TrainConfig(batch_size=4, max_steps=12, learning_rate=1e-2, max_grad_norm=0.5)
POINTS = [
    Point(rank=1, alpha=2, targets=("head",)),
    Point(rank=4, alpha=8, targets=("embed", "head"), learning_rate=3e-2, weight_decay=0.5, seed=1),
    Point(rank=2, alpha=8, targets=("head",), dropout=0.3, seed=2),
    Point(rank=2, alpha=1, targets=("embed",), seed=2, data_seed=0),
]


def swept(points, config=CONFIG, **settings):
    return sweep.run(tiny.small_apply, PARAMS, points, ROWS, VALID, config, axes=AXES, **{"memory": 10**9} | settings)


def solo(point, config=CONFIG, lora=None):
    """The run alone that a point stands for, with every step's loss in its history."""
    lora, config = point.settings(lora, config, list(leaves_of(PARAMS)))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    params = lora_jax.init(key, PARAMS, lora, axes=AXES)
    return train(
        tiny.small_apply, params, ROWS, VALID, dataclasses.replace(config, logging_steps=1), also_train=lora.also_train
    )


@pytest.fixture(scope="module")
def together():
    return swept(POINTS)


# --- each as alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", few(range(len(POINTS)), [1, 2]))
def test_each_is_its_run_alone(together, index):
    result, alone = together.results[index], solo(POINTS[index])
    losses = [line["loss"] for line in alone.history if "loss" in line]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.valid.loss, alone.after.loss, rtol=1e-5)
    expected = lora_jax.split(alone.params)[1]
    assert jax.tree.structure(result.adapter) == jax.tree.structure(expected)
    for mine, other in zip(jax.tree.leaves(result.adapter), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())
    whole = lora_jax.describe(alone.params)
    assert result.trainable == whole.trainable


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["lion", "sgd", "rmsprop", "adagrad"])
def test_each_optimizer_leaves_padded_ranks_alone(optim):
    config = dataclasses.replace(CONFIG, optim=optim, lr_scheduler_type="linear", max_steps=4)
    for result, point in zip(swept(POINTS[:2], config).results, POINTS[:2], strict=True):
        expected = lora_jax.split(solo(point, config).params)[1]
        for mine, other in zip(jax.tree.leaves(result.adapter), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())


@pytest.mark.slow
def test_leaves_that_train_whole_train_beside_each():
    lora = LoRAConfig(rank=1, alpha=1, also_train=("embed",))
    points = [Point(rank=r, alpha=r, targets=("head",), seed=r) for r in (1, 2)]
    for result, point in list(zip(swept(points, lora=lora).results, points, strict=True))[1:]:
        alone = solo(point, lora=lora)
        np.testing.assert_allclose(result.valid.loss, alone.after.loss, rtol=1e-5)
        np.testing.assert_allclose(
            result.adapter["embed"]["kernel"].value, alone.params["embed"]["kernel"].value, rtol=0, atol=1e-5
        )
        assert result.trainable == PARAMS["embed"]["kernel"].size + point.rank * (tiny.VOCABULARY + tiny.WIDTH)


@pytest.mark.slow
def test_magnitudes_train_beside_each():
    """DoRA, of several ranks and targets: where a point has no target, its gain stays 1."""
    lora = LoRAConfig(rank=1, alpha=1, dora=True)
    for result, point in zip(swept(POINTS[:3], lora=lora).results, POINTS[:3], strict=True):
        alone = solo(point, lora=lora)
        np.testing.assert_allclose(result.valid.loss, alone.after.loss, rtol=1e-5)
        expected = lora_jax.split(alone.params)[1]
        assert jax.tree.structure(result.adapter) == jax.tree.structure(expected)
        for mine, other in zip(jax.tree.leaves(result.adapter), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())
        assert result.trainable == lora_jax.describe(alone.params).trainable


@pytest.mark.slow
def test_rounds_change_nothing(together, monkeypatch):
    asked, measure = [], _round.bytes_needed

    def measured(*arguments):
        asked.append(measure(*arguments))
        return asked[-1]

    monkeypatch.setattr(_round, "bytes_needed", measured)
    swept(POINTS)
    split_up = swept(POINTS, memory=asked[0] - 1)
    assert split_up.rounds == 2
    for mine, other in zip(split_up.results, together.results, strict=True):
        np.testing.assert_allclose(mine.losses, other.losses, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^memory: 1e-06 GB may be taken, and one adapter alone needs"):
        swept(POINTS, memory=1000)


# --- none touched by another -----------------------------------------------------------------------------------------


@pytest.mark.optimized
def test_a_nan_stays_where_it_arises():
    points = [Point(rank=2, alpha=4, targets=("head",), seed=seed) for seed in range(8)]
    spoilt = [dataclasses.replace(p, learning_rate=1e38) if p.seed == 3 else p for p in points]
    whole, broken = swept(points).results, swept(spoilt).results
    assert [result.failed_at is not None for result in broken] == [seed == 3 for seed in range(8)]
    assert 1 < broken[3].failed_at <= 3
    assert (broken[3].train_loss, broken[3].valid, broken[3].adapter) == (None, None, None)
    for mine, other in zip(broken, whole, strict=True):
        if mine is not broken[3]:
            np.testing.assert_array_equal(mine.losses, other.losses)
            jax.tree.map(np.testing.assert_array_equal, mine.adapter, other.adapter)


def test_what_only_the_last_update_broke_has_failed(tmp_path):
    """Of one step: its loss and gradient are finite, the validation loss is not."""
    points = [Point(rank=2, alpha=4, targets=("head",), learning_rate=rate) for rate in (1e-2, 1e38)]
    results = swept(points, dataclasses.replace(CONFIG, max_steps=1))
    assert [result.failed_at for result in results.results] == [None, 1]
    assert (results.results[1].valid, results.results[1].adapter) == (None, None)
    results.write(tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["points"]) == 2


def test_a_large_loss_is_written_without_its_perplexity(together, tmp_path):
    """exp(loss) isn't finite from about 709 on; the loss is."""
    large = together.results[0].valid._replace(loss=800.0, metrics={"perplexity": math.inf})
    changed = dataclasses.replace(together.results[0], valid=large)
    results = dataclasses.replace(together, results=(changed, *together.results[1:]))
    results.write(tmp_path)
    point = json.loads((tmp_path / "results.json").read_text())["points"][0]
    assert (point["valid_loss"], point["valid_perplexity"], point["failed_at"]) == (800, None, None)
    (line, *_) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert (line["valid_loss"], line["valid_perplexity"]) == ("800.0", "")
    assert results.summary()[0]["valid_perplexity"] is None


@pytest.mark.slow
def test_patterns_are_shown_as_they_are():
    points = [Point(rank=1, alpha=1, targets=(target,)) for target in ("/[a-z]*d.kernel/", "/h[a-z]+.kernel/")]
    shown = str(swept(points, dataclasses.replace(CONFIG, max_steps=1)))
    for point in points:
        assert point.targets[0] in shown


def test_a_device_needs_memory_for_its_part_of_the_base():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    base = {"w": jax.device_put(np.ones((64, 4), np.float32), cut), "b": np.ones(4, np.float32)}
    assert _memory.size_of(base) == 64 * 4 * 4 / 8 + 16
    product = jax.jit(lambda tree, x: x @ tree["w"])
    alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    whole, part = (_memory.bytes_needed(product, tree, np.ones((1, 64))) for tree in (alone, _memory.shapes(base)))
    assert part < whole - 800


def test_memory_is_known_on_every_system(monkeypatch):
    assert 2**28 < _memory.free_memory() < 2**45

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(_memory.pathlib.Path, "exists", lambda self: False)
    monkeypatch.setattr(_memory.os, "sysconf", unknown)
    assert _memory._available() == _memory.SMALL_MACHINE


def test_padding_and_what_isnt_targeted_stay_zero(monkeypatch):
    stacks = []
    unstacked = _round.unstacked

    def recorded(stacked, *rest):
        stacks.append(stacked)
        return unstacked(stacked, *rest)

    monkeypatch.setattr(_round, "unstacked", recorded)
    swept(POINTS)
    for name in ("embed", "head"):
        node = stacks[0][name]["kernel_lora"]
        for index, point in enumerate(POINTS):
            rank = point.rank if name in point.targets else 0
            assert not node.a[index, :, rank:].any()
            assert not node.b[index, rank:].any()
            assert (node.scale[index] != 0) == (rank > 0)


# --- one program -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_grid_is_traced_once():
    def traces(points):
        count = collections.Counter()

        def counted(*arguments):
            count["apply"] += 1
            return tiny.small_apply(*arguments)

        sweep.run(counted, PARAMS, points, ROWS, VALID, CONFIG, axes=AXES, memory=10**9)
        return count["apply"]

    assert traces(POINTS[:1]) == traces([*POINTS, *(dataclasses.replace(POINTS[1], seed=s) for s in (7, 8))])


@pytest.mark.slow
def test_one_base_meets_the_rows_of_all():
    """K adapters cost K runs' arithmetic; nothing of K times a kernel's size is made, nor a gradient of a kernel."""
    count, params = 5, tiny.init(jax.random.key(0))
    points = [Point(rank=2, alpha=4, targets=("q", "v"), seed=seed) for seed in range(count)]
    axes = lora_jax.kernel_axes(tiny.apply, params, IDS, IDS)
    lora, _ = points[0].settings(None, None, list(leaves_of(params)))
    factory = AdapterFactory(params, points, LoRAConfig(rank=1, alpha=1), axes)
    alone = jax.eval_shape(lambda: factory.alone(points[0], 0))
    batch = {name: jax.ShapeDtypeStruct((4, 16), "int32") for name in ("input_ids", "attention_mask")}
    batch["loss_weights"] = jax.ShapeDtypeStruct((4, 16), "float32")
    base, _ = lora_jax.split(params)
    program = _program.make_program(tiny.apply, CONFIG, 10, task=LANGUAGE_MODELLING, dropout=False, own_batches=True)
    adapters = _memory.shapes(alone, (count,))
    settings = _program.point_settings([CONFIG] * count)
    states = jax.eval_shape(program.init, adapters)
    together = program.step.lower(adapters, states, settings, base, _memory.shapes(batch, (count,)), np.int32(1))
    tx = make_optimizer(CONFIG, 10)
    step = jax.jit(make_step(lora_jax.adapt(tiny.apply), tx))
    one = step.lower(alone, jax.eval_shape(tx.init, alone), base, batch)
    assert together.cost_analysis()["flops"] == pytest.approx(count * one.cost_analysis()["flops"], rel=0.02)
    shapes = set(re.findall(r"tensor<([0-9x]+)xf32>", together.as_text()))
    kernels = {"24x24", "24x40", "40x24", "24x32"}
    assert not {
        shape
        for shape in shapes
        for kernel in kernels
        if shape.endswith(f"5x{kernel}") or (shape.startswith("5x3x") and shape.endswith(kernel))
    }
    assert lora.targets == ("layers/q_proj", "layers/v_proj")


# --- grids -----------------------------------------------------------------------------------------------------------

ATTENTION = {
    f"{name}_proj": {"kernel": jax.ShapeDtypeStruct((12, out), "float32")}
    for name, out in zip("qkvo", (12, 6, 6, 12), strict=True)
}
ALL = {"targets": [("q",), ("v",), ("q", "v"), ("q", "k", "v", "o")]}


def labels(specs, **settings):
    return [point.label for point in sweep.grid(specs, {"attn": ATTENTION}, **settings)]


def test_a_grid_is_every_combination():
    assert labels({"rank": [1, 2], "targets": ["q", ("k", "v")], "alpha": [3, "2r"]}) == [
        "q rank 1 alpha 3", "q rank 1 alpha 2", "k,v rank 1 alpha 3", "k,v rank 1 alpha 2",
        "q rank 2 alpha 3", "q rank 2 alpha 4", "k,v rank 2 alpha 3", "k,v rank 2 alpha 4",
    ]  # fmt: skip
    assert labels({}, seeds=2) == [f"attention rank 8 alpha 16 seed {seed}" for seed in (0, 1)]
    assert labels({"rank": [2, 2]}) == ["attention rank 2 alpha 16"]


def test_a_budget_keeps_what_uses_it():
    # At rank 1: q and o 24, k and v 18 numbers each.
    ranks = {"rank": [1, 2, 4, 5]}
    assert labels(ALL | ranks, budget=96) == ["q rank 4 alpha 16", "v rank 5 alpha 16"]
    assert labels(ALL | {"rank": ["auto"]}, budget=96) == [
        "q rank 4 alpha 16", "v rank 5 alpha 16", "q,v rank 2 alpha 16", "q,k,v,o rank 1 alpha 16",
    ]  # fmt: skip


def test_words_are_read_as_a_grid():
    words = ["targets=q;v;q,v;q,k,v,o", "rank=1,2,auto", "alpha=16;2r", "learning-rate=1e-3", "seed=3"]
    assert sweep.parse(words) == {
        "targets": [("q",), ("v",), ("q", "v"), ("q", "k", "v", "o")],
        "rank": [1, 2, "auto"],
        "alpha": [16.0, "2r"],
        "learning_rate": [1e-3],
        "seed": [3],
    }


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["rang=1"], {}, "grid: no setting 'rang'; the settings are rank, alpha, targets, learning_rate,"),
        (["rank"], {}, "grid: 'rank' given, expected NAME=VALUES"),
        (["rank=1", "rank=2"], {}, "grid: rank is given twice"),
        (["rank=1.5"], {}, "grid: rank: '1.5' given, expected a whole number, or 'auto'"),
        (["alpha=xr"], {}, "grid: alpha: 'xr' given, expected a number, or a multiple of the rank"),
        (["rank=0"], {}, "rank: 0 given, expected a whole number of 1 or more"),
        (["dropout=1"], {}, "dropout: 1.0 given, expected at least 0 and less than 1"),
        (["targets=q;nope"], {}, "targets: 'nope' matches no leaf"),
        (["targets=q;"], {}, "targets: none given"),
        (["rank=auto"], {}, "rank: 'auto' given, which is the highest rank within a budget; give a budget"),
        (["rank=1", "targets=q"], {"budget": 96}, "budget: no point has 86 to 96 parameters; at rank 1 the smallest"),
        (["rank=auto"], {"budget": 10}, "budget: no point has 9 to 10 parameters"),
        (["seed=1"], {"seeds": 3}, "seeds: given together with seed in the grid"),
        ([], {"seeds": 0}, "seeds: 0 given, expected at least 1"),
    ],
)  # fmt: skip
def test_a_grid_that_cant_be_is_refused(words, settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        labels(sweep.parse(words), **settings)


def test_roles_are_found_under_any_name():
    bert = [f"layer/attention/self/{name}/kernel" for name in ("query", "key", "value")]
    bert += ["layer/attention/output/dense/kernel", "layer/output/dense/kernel", "layer/attention/self/query/bias"]
    point = Point(rank=1, alpha=1, targets=("o", "q"))
    assert point.settings(None, None, bert)[0].targets == ("layer/attention/output/dense", "layer/attention/self/query")
    fused = ["h/attn/c_attn/kernel", "h/attn/c_proj/kernel"]
    assert Point(rank=1, alpha=1, targets=("o",)).settings(None, None, fused)[0].targets == ("h/attn/c_proj",)
    with pytest.raises(ValueError, match=r"^targets: 'k' is a part of h/attn/c_attn, .* name 'c_attn'"):
        Point(rank=1, alpha=1, targets=("k",)).settings(None, None, fused)


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_are_summed_up_and_written(tmp_path):
    points = [Point(rank=r, alpha=4, targets=("head",), seed=s) for r in (1, 2) for s in (0, 1)]
    points.append(dataclasses.replace(points[0], seed=2, learning_rate=1e38))
    seen = []
    results = swept(points, on_result=seen.append)
    assert tuple(seen) == results.results
    first, second, third = results.summary()
    assert (first["rank"], first["repeats"], first["failed"], second["rank"], third["failed"]) == (1, 2, 0, 2, 1)
    pair = [result.valid.loss for result in results.results[:2]]
    assert first["valid_loss"] == pytest.approx(np.mean(pair))
    assert first["valid_loss_std"] == pytest.approx(np.std(pair, ddof=1))
    assert third["valid_loss"] is None
    results.write(tmp_path, model="small")
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    whole = json.loads((tmp_path / "results.json").read_text())
    assert len(lines) == len(whole["points"]) == 5
    assert (whole["model"], whole["rounds"], len(whole["summary"])) == ("small", 1, 3)
    assert float(lines[1]["valid_loss"]) == whole["points"][1]["valid_loss"] == pair[1]
    assert (lines[4]["valid_loss"], lines[4]["failed_at"], lines[0]["failed_at"]) == ("", "2", "")
    assert results.table().row_count == 3


def classify(params, input_ids, attention_mask):
    """A head on the mean of the tokens, for rows with labels."""
    hidden = jax.numpy.tanh(params["embed"]["kernel"][input_ids]) * attention_mask[..., None]
    return jax.numpy.tanh(hidden.mean(1) @ params["dense"]["kernel"]) @ params["classifier"]["kernel"]


def test_an_adapted_function_brings_its_own_dropout():
    points = [Point(rank=2, alpha=4, targets=("head",))]
    config = dataclasses.replace(CONFIG, max_steps=2)
    raw, own = (
        sweep.run(f, PARAMS, points, ROWS, config=c, lora=LoRAConfig(rank=1, alpha=1), memory=10**9)
        for f, c in (
            (tiny.small_apply, dataclasses.replace(config, dropout=0.5)),
            (lora_jax.adapt(tiny.small_apply, dropout=0.5), config),
        )
    )
    np.testing.assert_array_equal(raw.results[0].losses, own.results[0].losses)
    with pytest.raises(ValueError, match=r"^dropout: the function is adapted already with 0.5, and 0.1 is given"):
        sweep.run(
            lora_jax.adapt(tiny.small_apply, dropout=0.5),
            PARAMS,
            points,
            ROWS,
            config=dataclasses.replace(config, dropout=0.1),
        )


@pytest.mark.slow
def test_labels_are_swept_with_their_metrics_and_heads():
    rows = [LabelledExample(row.input_ids, np.int32(row.input_ids[0] % 2), None) for row in tiny.examples(16)]
    keys = jax.random.split(jax.random.key(1), 2)
    params = {
        "embed": PARAMS["embed"],
        "dense": {"kernel": jax.random.normal(keys[0], (tiny.WIDTH, tiny.WIDTH))},
        "classifier": {"kernel": jax.random.normal(keys[1], (tiny.WIDTH, 2))},
    }
    lora = LoRAConfig(rank=1, alpha=1, also_train=("classifier",))
    point = Point(rank=2, alpha=4, targets=("dense",), seed=1)
    config = dataclasses.replace(CONFIG, load_best_model_at_end=False)

    def newly_initialized(seed):
        return {"classifier/kernel": jax.random.normal(jax.random.key(seed), (tiny.WIDTH, 2))}

    points = [dataclasses.replace(point, seed=0), point]
    results = sweep.run(
        classify, params, points, rows, rows, config, lora=lora, memory=10**9, newly_initialized=newly_initialized
    )
    mine = results.results[1]
    lora, config = point.settings(lora, config, list(leaves_of(params)))
    params["classifier"]["kernel"] = newly_initialized(1)["classifier/kernel"]
    adapted = lora_jax.init(jax.random.fold_in(jax.random.key(1), 0), params, lora)
    alone = train(classify, adapted, rows, rows, config, also_train=lora.also_train)
    assert mine.valid.loss == pytest.approx(alone.after.loss, rel=1e-5)
    assert mine.valid.metrics == pytest.approx(alone.after.metrics, rel=1e-5)
    np.testing.assert_allclose(
        mine.adapter["classifier"]["kernel"].value, alone.params["classifier"]["kernel"].value, rtol=0, atol=1e-5
    )
    assert {"valid_loss", "valid_accuracy", "valid_accuracy_std"} <= set(results.summary()[0])


@pytest.mark.slow
def test_scores_say_what_gradients_promise_and_are_judged():
    """Of rank 12 the sketch holds the whole gradient, which is taken here by hand."""
    points = [
        Point(rank=r, alpha=4, targets=t, seed=s) for r in (1, 12) for t in (("embed",), ("head",)) for s in (0, 1)
    ]
    results = swept(points, dataclasses.replace(CONFIG, data_seed=0), score_batches=2)
    batches = ShuffledBatches(ROWS, [dataclasses.replace(CONFIG, data_seed=0)], 2).first(2)

    def loss(params, batch):
        total, weight = LANGUAGE_MODELLING.objective(
            tiny.small_apply(params, batch["input_ids"], batch["attention_mask"]), batch
        )
        return total / weight

    grads = [jax.grad(loss)(PARAMS, batch) for batch in batches]
    for result in results.results:
        (name,) = result.point.targets
        mean = np.mean([grad[name]["kernel"] for grad in grads], axis=0)
        expected = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[: result.point.rank])
        assert result.score == pytest.approx(expected, rel=1e-4)
    assert set(results.scores) == {"embed/kernel", "head/kernel"}
    rows = results.summary()
    expected = scipy.stats.spearmanr([row["score"] for row in rows], [row["valid_loss"] for row in rows]).statistic
    assert results.rank_correlation() == pytest.approx(expected)
    assert "score" in [column.header for column in results.table().columns]
    first = max(rows, key=lambda row: row["score"])
    few = swept(points, dataclasses.replace(CONFIG, data_seed=0), score_batches=2, best=1)
    assert [(row["targets"], row["rank"], row["repeats"]) for row in few.summary()] == [
        (first["targets"], first["rank"], 2)
    ]
    assert few.summary()[0]["valid_loss"] == pytest.approx(first["valid_loss"], rel=1e-5)
    assert few.rank_correlation() is None


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"^no points"):
        swept([])
    with pytest.raises(ValueError, match=r"^no training examples"):
        sweep.run(tiny.small_apply, PARAMS, POINTS, [])
    with pytest.raises(ValueError, match=r"^eval_steps: 3 given"):
        swept(POINTS, dataclasses.replace(CONFIG, eval_steps=3))
    with pytest.raises(ValueError, match=r"^overrides: 'head' given, but a point of a sweep has one rank"):
        swept(POINTS, lora=LoRAConfig(rank=1, alpha=1, targets=("head",), overrides=(Override(target="head", rank=2),)))
    with pytest.raises(ValueError, match=r"^best: 1 given, expected 1 or more, with score_batches"):
        swept(POINTS, best=1)
    with pytest.raises(ValueError, match=r"^score_batches: -1 given"):
        swept(POINTS, score_batches=-1)
    with pytest.raises(ValueError, match=r"^targets: 'nope' matches no leaf"):
        swept([*POINTS, Point(rank=1, alpha=1, targets=("nope",))])
