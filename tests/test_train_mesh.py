"""The trainer on meshes of eight devices: the same losses, and each device has its share of everything."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from marks import few
from mesh_cases import CONFIGS, MESHES, batch_of, mesh_of

import lora_jax
from lora_jax import models
from lora_jax.checkpoint import Checkpoints, TrainState
from lora_jax.data import Example
from lora_jax.train import Stopped, TrainConfig, evaluate, make_optimizer, train
from lora_jax.train._placement import placed

KEY = jax.random.key(0)

CONFIG = TrainConfig(batch_size=16, max_steps=20, learning_rate=1e-2, logging_steps=1, save_minutes=0, dropout=0.1)


def examples(count, seed=0):
    rows = batch_of(seed, count)
    lengths = rows["attention_mask"].sum(axis=1)
    return [
        Example(ids[:length], np.arange(length) >= 3) for ids, length in zip(rows["input_ids"], lengths, strict=True)
    ]


def adapted(name, seed=0):
    """A model and its parameters with an adapter, on one device."""
    model = models.init(jax.random.key(seed), CONFIGS[name])
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 8), jnp.int32))
    lora = lora_jax.LoRAConfig(rank=4, alpha=8, targets="all-linear")
    return model, lora_jax.init(jax.random.key(1), model.params, lora, axes=axes)


def losses(result):
    return [line["loss"] for line in result.history if "loss" in line]


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shares(tree):
    """For each leaf, the part of it that a device holds."""
    return {path: leaf.addressable_shards[0].data.size / leaf.size for path, leaf in by_path(tree).items()}


@pytest.fixture(scope="module")
def alone():
    """The run on one device, once for each model."""
    done = {}

    def run(name):
        if name not in done:
            model, params = adapted(name)
            done[name] = train(model.apply, params, examples(40), examples(12, 1), CONFIG)
        return done[name]

    return run


CASES = [(name, mesh, kind) for name in ("llama", "five") for mesh in MESHES for kind in ("auto", "explicit")]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_do_not_depend_on_the_mesh(case, alone):
    """With dropout, and within whatever mesh the caller has set."""
    name, mesh, kind = case
    model, params = adapted(name)
    there = mesh_of(mesh, kind)
    with warnings.catch_warnings(), jax.set_mesh(there):
        warnings.filterwarnings("ignore", ".*don't divide by [28] devices")
        found = train(model.apply, params, examples(40), examples(12, 1), CONFIG, mesh=there)
    assert len(losses(found)) == 20
    np.testing.assert_allclose(losses(found), losses(alone(name)), atol=1e-5, rtol=1e-5)
    assert found.before is not None
    assert found.before.loss == pytest.approx(alone(name).before.loss, abs=1e-5)
    assert losses(found)[-1] < losses(found)[0] - 0.1
    if name == "llama":
        cut = 8 // dict(there.shape).get("data", 1)
        assert {share for path, share in shares(found.params).items() if path.endswith("kernel")} == {1 / cut}


@pytest.mark.parametrize("mesh", few(MESHES, ["fsdp=8"]))
def test_each_device_has_its_share(mesh):
    """Of weights, A, B, moments and the batch."""
    model, params = adapted("llama")
    there = mesh_of(mesh, "explicit")
    placement = placed(model.apply, params, there, None, 16)
    base, adapter = lora_jax.split(placement.params)
    state = placement.state(make_optimizer(CONFIG, 20), adapter)
    fsdp, columns = (dict(there.shape).get(axis, 1) for axis in ("fsdp", "model"))
    assert all(share == 1 / fsdp / columns for path, share in shares(base).items() if "norm" not in path)
    expected = {"q_proj": (fsdp, columns), "down_proj": (columns, fsdp)}  # of A, along the inputs; of B, the outputs
    for tree, start in ((adapter, ""), (state, "mu/"), (state, "nu/")):
        found = shares(tree)
        for name, (inputs, outputs) in expected.items():
            ours = {path: share for path, share in found.items() if start in path and name in path}
            assert {path[-1]: share for path, share in ours.items()} == {"a": 1 / inputs, "b": 1 / outputs}
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    assert counts
    assert all(leaf.sharding.device_set == set(there.devices.flat) for leaf in counts)
    assert set(shares(placement.batch(batch_of())).values()) == {1 / (8 // columns)}
    assert placement.key(0).sharding.device_set == set(there.devices.flat)


@pytest.mark.parametrize("name", few(["adamw", "masked", "adafactor"], ["masked"]))
def test_moments_are_cut_as_their_factors(name):
    tx = optax.adafactor(1e-3) if name == "adafactor" else optax.adamw(1e-3)
    tx = lora_jax.masked(tx) if name == "masked" else tx
    model, params = adapted("gpt2")
    adapter = lora_jax.split(placed(model.apply, params, mesh_of("fsdp=8"), None, 8).params)[1]
    where = lora_jax.state_shardings(tx, adapter)
    state = jax.jit(tx.init, out_shardings=where)(adapter)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    factors = by_path(adapter)
    moments = 0
    for path, leaf in by_path(state).items():
        like = next((factor for end, factor in factors.items() if path.endswith("/" + end)), None)
        if like is not None and like.shape == leaf.shape:
            moments += 1
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        else:
            assert leaf.sharding.is_fully_replicated
    assert moments == len(factors) * (1 if name == "adafactor" else 2)
    with pytest.raises(ValueError, match=r"^adapter: no leaf has a NamedSharding; place it"):
        lora_jax.state_shardings(tx, lora_jax.split(params)[1])


def test_a_batch_that_does_not_divide_is_refused_first(caplog):
    """Before anything is compiled."""
    model, params = adapted("llama")
    config = dataclasses.replace(CONFIG, batch_size=24, gradient_accumulation_steps=2)
    expected = r"^batch_size: 24 given in 2 parts \(gradient_accumulation_steps\), expected a multiple of 16, .*fsdp=8$"
    with pytest.raises(ValueError, match=expected), jax.log_compiles():
        train(model.apply, params, examples(40), config=config, mesh=mesh_of("fsdp=8"))
    assert "Compiling" not in caplog.text
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(np.ones(3))
    assert "Compiling" in caplog.text
    with pytest.raises(ValueError, match=r"^batch_size: 18 given, expected a multiple of 4, .* over data=2, fsdp=2$"):
        evaluate(model.apply, params, examples(4), batch_size=18, mesh=mesh_of("data=2,fsdp=2,model=2"))


@pytest.mark.slow
def test_evaluation_and_parts_of_a_batch_on_a_mesh():
    model, params = adapted("gpt2")
    there = evaluate(model.apply, params, examples(20), batch_size=8, mesh=mesh_of("fsdp=8"))
    here = evaluate(model.apply, params, examples(20), batch_size=8)
    assert there.loss == pytest.approx(here.loss, abs=1e-5)
    assert there.count == here.count
    config = dataclasses.replace(CONFIG, max_steps=3, gradient_accumulation_steps=2)
    found, expected = (
        train(model.apply, params, examples(40), config=config, mesh=mesh) for mesh in (mesh_of("fsdp=8"), None)
    )
    np.testing.assert_allclose(losses(found), losses(expected), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", few([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]), ids=str)
def test_a_function_of_ones_own(axis_type):
    """Its leaves stay where they are on the mesh, and those elsewhere are copied to every device."""
    params = tiny.init(jax.random.key(0))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    cut = NamedSharding(mesh, jax.P(None, None, "model"))
    params["layers"]["q_proj"]["kernel"] = jax.device_put(params["layers"]["q_proj"]["kernel"], cut)
    axes = lora_jax.kernel_axes(tiny.apply, params, jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    params = lora_jax.init(KEY, params, lora_jax.LoRAConfig(rank=2, alpha=4, targets=["q_proj", "v_proj"]), axes=axes)
    config = dataclasses.replace(CONFIG, max_steps=3)
    found = train(tiny.apply, params, tiny.examples(30), config=config, mesh=mesh)
    expected = train(tiny.apply, jax.device_get(params), tiny.examples(30), config=config)
    np.testing.assert_allclose(losses(found), losses(expected), atol=1e-5)
    kept = found.params["layers"]["q_proj"]["kernel"].sharding
    assert (kept.spec, kept.mesh.shape) == (cut.spec, mesh.shape)
    assert found.params["layers"]["q_proj"]["kernel_lora"].b.sharding.spec == jax.P(None, None, "model")
    assert found.params["head"]["kernel"].is_fully_replicated


def test_a_base_on_another_mesh_of_the_same_devices_is_refused():
    params = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x")))}
    params = lora_jax.init(KEY, params, lora_jax.LoRAConfig(rank=2, alpha=4, targets=["w"]))
    with pytest.raises(ValueError, match=r"^w: on a mesh of x=8, but mesh fsdp=8 given; device_put the base on"):
        train(lambda p, ids, mask: p["w"], params, tiny.examples(8), config=CONFIG, mesh=jax.make_mesh((8,), ("fsdp",)))


def test_a_model_on_a_mesh_keeps_its_rules():
    model = models.init(KEY, CONFIGS["grouped"])
    rules = models.RULES | {"vocab": None}
    model = model.on_mesh(jax.make_mesh((4, 2), ("fsdp", "model")), rules)
    where = models.shardings(model)["embed_tokens"]["embedding"].spec
    assert where == jax.P(None, "fsdp")
    assert model.apply.on_mesh(model.mesh).shardings["embed_tokens/embedding"].spec == where
    assert models.shardings(model.on_mesh(model.mesh))["embed_tokens"]["embedding"].spec == where


@pytest.mark.slow
def test_a_run_is_resumed_on_another_mesh(tmp_path):
    """And on one device, with the losses of a run that wasn't stopped."""
    params = tiny.init(KEY)
    axes = lora_jax.kernel_axes(tiny.apply, params, jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    params = lora_jax.init(KEY, params, lora_jax.LoRAConfig(rank=2, alpha=4, targets=["q_proj", "v_proj"]), axes=axes)
    config = dataclasses.replace(CONFIG, batch_size=8, max_steps=6)

    def go_on(mesh, stop_at, resume=True):
        """The losses of the steps up to one, on a mesh where the kernels of q are cut."""
        tree = params
        if mesh is not None:
            cut = {"layers": {"q_proj": {"kernel": jax.P(None, "fsdp")}}}
            named = jax.tree.map(lambda _: jax.P(), lora_jax.split(params)[0]) | {}
            named["layers"] = named["layers"] | cut["layers"]
            placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), named, is_leaf=lambda x: isinstance(x, jax.P))
            tree = jax.device_put(params, lora_jax.shardings(params, placed))
        seen = []
        given = {"config": config, "output": tmp_path, "resume": resume, "mesh": mesh, "on_log": seen.append}
        with contextlib.suppress(Stopped):
            train(tiny.apply, tree, tiny.examples(30), stop=lambda: len(seen) >= stop_at, **given)
        return [line["loss"] for line in seen if "loss" in line]

    def auto(**sizes):
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    expected = losses(train(tiny.apply, params, tiny.examples(30), config=config))
    found = go_on(auto(fsdp=8), 2, resume=False) + go_on(auto(data=4, fsdp=2), 2) + go_on(None, 9)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scalars_are_restored_to_the_mesh(tmp_path):
    """A template whose key and counts are on one device, as those of a loop of one's own are."""
    mesh = mesh_of("fsdp=8")
    weights = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, jax.P("fsdp")))
    tx = optax.adam(1e-3)
    state = TrainState({"w": weights}, tx.init({"w": weights}), KEY, 1, {}, "f", {})
    state = state._replace(opt_state=jax.tree.map(lambda x: jnp.zeros(()) if x.ndim == 0 else x, state.opt_state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        found = checkpoints.restore(state)
    for leaf in jax.tree.leaves((found.adapter, found.opt_state, found.key)):
        assert leaf.sharding.device_set == weights.sharding.device_set
    assert found.adapter["w"].sharding == weights.sharding
    step = jax.jit(lambda key, opt_state, adapter: (jax.random.normal(key) + opt_state[0].count) * adapter["w"])
    assert step(found.key, found.opt_state, found.adapter).shape == (16, 4)
