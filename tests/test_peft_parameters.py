"""Experts in PEFT's format: one entry an expert, or a layer's as one parameter, as transformers 5 holds them."""

import jax.numpy as jnp
import numpy as np
import pytest
from peft_trees import config_in, edit, same, tensors_in
from public_trees import attach

from lora_jax import Axes, LoRA, peft
from lora_jax.models import Weight

LAYERS, EXPERTS, WIDTH, INNER = 2, 3, 4, 5
BLOCK, STEM = "model.layers.{}.mlp", "base_model.model.model.layers.1.mlp"
GATE, UP, DOWN, ROUTER, QUERY = (
    "mlp/gate/kernel",
    "mlp/up/kernel",
    "mlp/down/kernel",
    "mlp/router/kernel",
    "query/kernel",
)
NAMES = {
    QUERY: Weight("model.layers.{}.query.weight", True),
    ROUTER: Weight("model.layers.{}.moe.router.weight", True, parameter=f"{BLOCK}.router.weight"),
    GATE: Weight("model.layers.{}.moe.experts.{}.w1.weight", True, parameter=f"{BLOCK}.experts.gate_up_proj"),
    UP: Weight("model.layers.{}.moe.experts.{}.w3.weight", True, parameter=f"{BLOCK}.experts.gate_up_proj"),
    DOWN: Weight("model.layers.{}.moe.experts.{}.w2.weight", True, parameter=f"{BLOCK}.experts.down_proj"),
}
SHAPES = {
    QUERY: (LAYERS, WIDTH, 6),
    ROUTER: (LAYERS, WIDTH, EXPERTS),
    GATE: (LAYERS, EXPERTS, WIDTH, INNER),
    UP: (LAYERS, EXPERTS, WIDTH, INNER),
    DOWN: (LAYERS, EXPERTS, INNER, WIDTH),
}


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def base():
    leaves = {path: draw(*shape) for path, shape in SHAPES.items()}
    experts = {name: {"kernel": leaves[f"mlp/{name}/kernel"]} for name in ("router", "gate", "up", "down")}
    return {"query": {"kernel": leaves[QUERY]}, "mlp": experts}


def node(path, rank=2, scale=1.5):
    *stack, inputs, outputs = SHAPES[path]
    depth, seed = len(stack), sum(map(ord, path))
    random = np.random.default_rng(seed)
    scales = np.broadcast_to(np.float32(scale), stack)
    there = scales[..., None, None] != 0
    a, b = there * random.normal(size=(*stack, inputs, rank)), there * random.normal(size=(*stack, rank, outputs))
    axes = Axes(tuple(range(depth)), (depth,), (depth + 1,))
    return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scales, axes=axes)


def adapted(**nodes):
    """Of the kernels by their last name."""
    return attach(base(), {path: nodes[name] for path in SHAPES if (name := path.split("/")[-2]) in nodes})


def save(folder, params, **options):
    peft.save(folder, params, names=NAMES, **options)
    return config_in(folder), tensors_in(folder)


def loads(folder, params):
    return same(peft.load(folder, base(), names=NAMES), params)


EVERYTHING = {path.split("/")[-2]: node(path) for path in SHAPES}
ALL_FUSED = ["down_proj", "gate_up_proj", "router.weight"]


def test_experts_have_an_entry_each(tmp_path):
    params = adapted(**EVERYTHING | {"query": node(QUERY, 1, 3.0)})
    config, tensors = save(tmp_path / "a", params)
    assert config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"]) == (2, 3)  # the experts': PEFT goes by these for them
    assert set(config["rank_pattern"].values()) == {1}
    assert "base_model.model.model.layers.1.moe.experts.2.w3.lora_A.weight" in tensors
    assert loads(tmp_path / "a", params)


@pytest.mark.parametrize("options", [{"fused": True}, {}])
def test_experts_as_parameters(tmp_path, options):
    """Written as asked for, or because PEFT would take the router's scale for the experts'."""
    params = adapted(**EVERYTHING | ({} if options else {"router": node(ROUTER, 2, 4.0)}))
    config, tensors = save(tmp_path / "a", params, **options)
    assert (config["target_modules"], config["target_parameters"]) == (["query"], ALL_FUSED)
    inner, outer = f"{STEM}.experts.base_layer.lora", f"{STEM}.experts.lora"
    assert {name: array.shape for name, array in tensors.items() if name.startswith(STEM)} == {
        f"{inner}_A.weight": (EXPERTS * 4, WIDTH),
        f"{inner}_B.weight": (2 * INNER, 4 * EXPERTS),
        f"{outer}_A.weight": (EXPERTS * 2, INNER),
        f"{outer}_B.weight": (WIDTH, 2 * EXPERTS),
        f"{STEM}.router.lora_A.weight": (2, WIDTH),
        f"{STEM}.router.lora_B.weight": (EXPERTS, 2),
    }
    assert loads(tmp_path / "a", params)


def test_delta_is_what_peft_computes_of_it(tmp_path):
    """`ParamWrapper.get_delta_weight` of PEFT, written with the indices that it means."""
    params = adapted(gate=node(GATE), up=node(UP))
    config, tensors = save(tmp_path / "a", params, fused=True)
    a, b = (tensors[f"{STEM}.experts.lora_{side}.weight"] for side in "AB")
    rank, alpha = config["r"], config["lora_alpha"]
    a, b = a.reshape(EXPERTS, rank, WIDTH), b.reshape(2 * INNER, rank, EXPERTS)
    delta = alpha / rank * np.einsum("ore,eri->eoi", b, a)
    for k, path in enumerate((GATE, UP)):
        own = node(path)
        expected = 1.5 * np.einsum("eir,ero->eoi", own.a[1], own.b[1])
        np.testing.assert_allclose(delta[:, k * INNER : (k + 1) * INNER], expected, rtol=1e-5)


def test_an_a_that_gate_and_up_share_is_written_once(tmp_path):
    shared = node(UP).replace(a=node(GATE).a)
    params = adapted(gate=node(GATE), up=shared)
    _, tensors = save(tmp_path / "a", params, fused=True)
    assert tensors[f"{STEM}.experts.lora_A.weight"].shape == (EXPERTS * 2, WIDTH)
    assert loads(tmp_path / "a", params)


@pytest.mark.parametrize(
    "nodes",
    [
        {"gate": node(GATE)},
        {"up": node(UP, 1)},
        {"gate": node(GATE, 1), "up": node(UP, 3)},
        {"down": node(DOWN, 2, np.float32([[1.5], [0]]))},
        {"gate": node(GATE), "up": node(UP), "down": node(DOWN, 3)},
        {"down": node(DOWN, 2, np.float32([[1.5, 0, 1.5]]))},
        {"router": node(ROUTER, 2, np.float32([1, 2]))},
        {"router": node(ROUTER), "down": node(DOWN, 2, 3.0)},
        {"gate": node(GATE, 2, 3 / 2**0.5), "up": node(UP, 2, 3 / 2**0.5)},  # alphas are whole over √rank
    ],
)
def test_what_peft_would_read_wrong_as_entries_becomes_parameters(tmp_path, nodes):
    params = adapted(**nodes)
    config, _ = save(tmp_path / "a", params)
    assert config["target_parameters"]
    assert loads(tmp_path / "a", params)


def test_unequal_scales_in_one_parameter_are_refused(tmp_path):
    uneven = node(DOWN, 2, np.float32([[1, 1, 2]]))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.experts\.down_proj: scales from 1 to 2 in one layer's experts"
    ):
        save(tmp_path / "a", adapted(down=uneven))
    with pytest.raises(ValueError, match=r"gate_up_proj: scales from 1 to 3 in one"):
        save(tmp_path / "a", adapted(gate=node(GATE, 2, 1.0), up=node(UP, 2, 3.0)))
    assert not (tmp_path / "a").exists()
    config, _ = save(tmp_path / "a", adapted(down=uneven), portable=True)
    assert (config["target_parameters"], config["r"], config["lora_alpha"]) == (None, 2, 2)


def test_other_mistakes(tmp_path):
    params = adapted(gate=node(GATE))
    with pytest.raises(ValueError, match="portable and fused exclude one another"):
        save(tmp_path / "a", params, portable=True, fused=True)
    dora = node(DOWN).replace(magnitude=draw(LAYERS, EXPERTS, WIDTH))
    with pytest.raises(ValueError, match="no fused form"):
        save(tmp_path / "a", adapted(down=dora), fused=True)
    save(tmp_path / "a", params)
    with pytest.raises(ValueError, match="target_parameters given; only the model shows which kernels these are"):
        peft.updates(tmp_path / "a")
    edit(tmp_path / "a", use_dora=True)
    with pytest.raises(ValueError, match="target_parameters: not together with use_dora"):
        peft.load(tmp_path / "a", base(), names=NAMES)
    edit(tmp_path / "a", use_dora=False, target_modules=["w1"])
    with pytest.raises(ValueError, match=r"experts\.0\.w1 is named by target_modules and by target_parameters"):
        peft.load(tmp_path / "a", base(), names=NAMES)
    edit(tmp_path / "a", target_modules=[], target_parameters=["other"])
    with pytest.raises(ValueError, match="target_parameters: other names no matrix of this model"):
        peft.load(tmp_path / "a", base(), names=NAMES)
