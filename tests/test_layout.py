"""Models on meshes: what their rules cut, that outputs don't depend on it, and what the compiled programs exchange."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from marks import few
from mesh_cases import CONFIGS, LENGTH, MESHES, ROWS, batch_of, collectives, llama, mesh_of, run

from lora_jax import models

P = jax.P


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree, is_leaf=lambda x: isinstance(x, NamedSharding))


def on(model, mesh):
    """The model and its parameters on the mesh, whatever can't be cut there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.on_mesh(mesh), jax.device_put(model.params, models.shardings(model, mesh))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_the_rules_cut_weights(kind):
    model = models.init(jax.random.key(0), llama())
    found = models.shardings(model, mesh_of("data=2,fsdp=2,model=2", kind))
    layers = specs(found["layers"])
    assert specs(found["embed_tokens"]) == {"embedding": P("model", "fsdp")}
    assert layers["self_attn"]["q_proj"]["kernel"] == layers["mlp"]["up_proj"]["kernel"] == P(None, "fsdp", "model")
    assert layers["self_attn"]["o_proj"]["kernel"] == layers["mlp"]["down_proj"]["kernel"] == P(None, "model", "fsdp")
    assert specs(found["lm_head"]) == {"kernel": P("fsdp", "model")}
    assert found["norm"]["scale"].is_fully_replicated
    assert found["norm"]["scale"].mesh.axis_types == (AxisType.Auto,) * 3
    assert jax.tree.structure(found) == jax.tree.structure(model.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_has_names(name):
    model = models.init(jax.random.key(0), CONFIGS[name])
    large = {path for path, leaf in models.flatten(model.params).items() if leaf.size > 1000}
    assert large <= set(model.axes)
    assert all(
        len(model.axes[path]) == leaf.ndim for path, leaf in models.flatten(model.params).items() if path in large
    )


def test_rules_may_be_others():
    model = models.init(jax.random.key(0), llama())
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    rules = models.RULES | {"batch": "rows", "embed": "rows", "mlp": "columns", "vocab": None}
    found = specs(models.shardings(model, mesh, rules))
    assert found["layers"]["mlp"]["up_proj"]["kernel"] == P(None, "rows", "columns")
    assert found["layers"]["self_attn"]["q_proj"]["kernel"] == P(None, "rows", None)
    assert found["embed_tokens"]["embedding"] == P(None, "rows")
    assert specs(models.shardings(model.on_mesh(mesh, rules))) == found
    with pytest.raises(ValueError, match=r"^mesh: axis 'rows' is in no rule; expected data, fsdp, model, or rules="):
        models.shardings(model, mesh)
    with pytest.raises(ValueError, match=r"^mesh: none given"):
        models.shardings(model)


def test_what_does_not_divide_is_copied_and_reported():
    model = models.init(jax.random.key(0), CONFIGS["five"])
    with pytest.warns(UserWarning, match="don't divide by 8 devices") as told:
        found = models.shardings(model, mesh_of("model=8"))
    assert [str(warning.message) for warning in told] == [
        "layers/self_attn/k_proj/kernel and 1 more: 5 kv_heads don't divide by 8 devices along model, each of which has"
        " a copy",
        "layers/self_attn/o_proj/kernel and 1 more: 5 heads don't divide by 8 devices along model, each of which has a"
        " copy",
    ]
    assert found["layers"]["self_attn"]["q_proj"]["kernel"].is_fully_replicated  # of 80 channels, which do divide
    assert specs(found["layers"]["mlp"]["up_proj"]["kernel"]) == P(None, None, "model")


PLACED = [(name, mesh, kind) for name in CONFIGS for mesh in MESHES for kind in ("auto", "explicit")]
# Each model on a mesh with all three axes; of one axis alone, what divides and what doesn't.
OFTEN = [case for case in PLACED if case[1:] == ("data=2,fsdp=2,model=2", "auto")]
OFTEN += [("llama", "fsdp=8", "auto"), ("five", "model=8", "auto")]


@pytest.mark.parametrize("case", few(PLACED, OFTEN), ids="-".join)
def test_outputs_do_not_depend_on_the_mesh(case):
    name, mesh, kind = case
    model = models.init(jax.random.key(0), CONFIGS[name])
    batch = batch_of()
    alone = jax.jit(model.apply)(model.params, batch["input_ids"], batch["attention_mask"])
    there, params = on(model, mesh_of(mesh, kind))
    spread = jax.jit(there.apply)(params, batch["input_ids"], batch["attention_mask"])
    np.testing.assert_allclose(spread, alone, atol=1e-5 * float(jnp.abs(alone).max()))
    assert not spread.is_fully_replicated


@pytest.mark.parametrize("name", few(["llama", "grouped", "gpt2", "bert"], ["llama"]))
def test_fsdp_gathers_weights_and_no_activations(name):
    """Of a whole batch's activations [ROWS, LENGTH, ...] no device ever sees or sends more than its rows."""
    compiled = run(CONFIGS[name], mesh_of("fsdp=8")).compiled()
    exchanged = collectives(compiled)
    assert ("all-gather", (64, 64)) in exchanged  # a layer's kernel, within the loop
    rows, width = ROWS // 8, min(size for size in (64, 176))
    assert [
        (kind, shape) for kind, shape in exchanged if math.prod(shape) > rows * LENGTH * width and LENGTH in shape
    ] == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_computes_its_share(mesh):
    config = llama(hidden_size=256, intermediate_size=704)
    alone = run(config, rank=1).compiled().cost_analysis()["flops"]
    for kind in ("auto", "explicit"):
        assert run(config, mesh_of(mesh, kind), rank=1).compiled().cost_analysis()["flops"] <= 1.1 * alone / 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "grouped", "five", "gpt2"])
def test_kernels_of_one_device_run_on_each(name):
    """Splash, interpreted: rows and heads of a mesh; two heads of keys for four parts are repeated."""
    kernel, plain = (
        models.init(jax.random.key(0), CONFIGS[name], attention=attention) for attention in ("splash", "xla")
    )
    batch = batch_of(rows=4)
    mesh = jax.make_mesh((2, 4), ("fsdp", "model"))
    there, params = on(kernel, mesh)

    def loss(apply):
        def of(params):
            logits = apply(params, batch["input_ids"], batch["attention_mask"])
            return jnp.mean(jnp.square(logits) * batch["loss_weights"][..., None])

        return jax.jit(jax.value_and_grad(of))

    spread, expected = loss(there.apply)(params), loss(plain.apply)(plain.params)
    for made, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(made, wanted, atol=2e-5 * float(jnp.abs(wanted).max()), rtol=1e-5)
    assert there.attention(4, LENGTH).form == "splash"


def test_the_choice_of_attention_knows_the_mesh():
    on_tpu = models.init(jax.random.key(0), llama(), platform="tpu")
    assert on_tpu.attention(4, LENGTH).why.startswith("splash's kernel runs on one device")
    assert on_tpu.on_mesh(mesh_of("model=8")).attention(4, LENGTH).form == "splash"
    on_cpu = models.init(jax.random.key(0), llama())
    rows = 2**28 // (4 * 8 * 1024**2)
    assert on_cpu.attention(8 * rows, 1024).form == "blockwise"
    assert on_cpu.on_mesh(mesh_of("fsdp=8")).attention(8 * rows, 1024).form == "xla"  # of a device's rows


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_weights_are_read_to_their_devices(sizes, tmp_path):
    drawn = models.init(jax.random.key(0), CONFIGS["grouped"], jnp.bfloat16)
    models.save(tmp_path / "model", drawn, drawn.params)
    folder = tmp_path / "model"
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*don't divide by")
        model = models.load(folder, mesh=mesh)
        where = models.shardings(model)
    for leaf, wanted, alone in zip(
        *map(jax.tree.leaves, (model.params, where, models.load(folder).params)), strict=True
    ):
        assert leaf.sharding == wanted
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(alone, np.float32))
        assert leaf.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"^embed_tokens/embedding: no sharding given"):
        models.load(folder, shardings={})
