"""Optimizers by name on stacked factors, schedule-free's averages, and LoRA+, against optax and PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import few

import lora_jax
from lora_jax import Trained, sweep
from lora_jax.checkpoint import load_adapter
from lora_jax.train import TrainConfig, averaged, evaluate, make_optimizer, train

PLAIN = TrainConfig(
    learning_rate=0.01, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, batch_size=8, logging_steps=1
)


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def stacked(layers=2, heads=3, width=5, rank=4):
    """A node of stacked layers whose kernels are [layers, heads, width, outputs], and a head trained in full."""
    axes = lora_jax.Axes(stack=(0,), inputs=(1, 2), outputs=(3,))
    node = lora_jax.LoRA(jnp.ones((layers, heads, width, rank)), jnp.ones((layers, rank, 6)), 2.0, axes=axes)
    return random_like({"q": {"kernel_lora": node}, "head": {"kernel": Trained(jnp.ones((7, 9)), "float32")}}, 0)


def matrices(params):
    """Each layer's A and B as a matrix of its own."""
    node = params["q"]["kernel_lora"]
    pairs = [(a.reshape(-1, a.shape[-1]), b) for a, b in zip(node.a, node.b, strict=True)]
    return {f"{name}{i}": x for i, pair in enumerate(pairs) for name, x in zip("ab", pair, strict=True)}


REFERENCES = {
    "muon": optax.contrib.muon(0.01, consistent_rms=0.2),
    "adafactor": optax.adafactor(0.01, multiply_by_parameter_scale=False),
}


CASES = {"muon": ("muon", 5, 4), "adafactor": ("adafactor", 5, 4), "adafactor, factored": ("adafactor", 50, 130)}


@pytest.mark.parametrize("case", few(CASES, ["muon", "adafactor"]))
def test_each_layers_matrix_moves_as_it_does_alone(case):
    """The third case has sides of 128 and more, whose moments adafactor factors."""
    optim, width, rank = CASES[case]
    params = stacked(width=width, rank=rank)
    tx = make_optimizer(dataclasses.replace(PLAIN, optim=optim), 3)
    together, alone = params, matrices(params)
    state, states = tx.init(params), {name: REFERENCES[optim].init(x) for name, x in alone.items()}
    update_together, update_alone = jax.jit(tx.update), jax.jit(REFERENCES[optim].update)
    for step in range(3):
        grads = random_like(params, step + 1)
        updates, state = update_together(grads, state, together)
        together = optax.apply_updates(together, updates)
        for name, grad in matrices(grads).items():
            update, states[name] = update_alone(grad, states[name], alone[name])
            alone[name] = alone[name] + update
    for name, x in matrices(together).items():
        np.testing.assert_allclose(x, alone[name], rtol=1e-5, atol=1e-6)
    assert (together["head"]["kernel"].value != params["head"]["kernel"].value).all()


def test_padded_ranks_stay_zero_or_are_refused():
    params = stacked()
    node = params["q"]["kernel_lora"]
    params["q"]["kernel_lora"] = node.replace(a=node.a.at[0, ..., 2:].set(0), b=node.b.at[0, 2:].set(0))
    with pytest.raises(ValueError, match="q/kernel_lora: ranks are padded with zeros"):
        make_optimizer(dataclasses.replace(PLAIN, optim="adafactor"), 3).init(params)
    tx = make_optimizer(dataclasses.replace(PLAIN, optim="muon"), 3)
    grads = jax.tree.map(lambda g, w: jnp.where(w == 0, 0, g), random_like(params, 1), params)
    moved = tx.update(grads, tx.init(params), params)[0]["q"]["kernel_lora"]
    assert moved.a[0, ..., :2].all()
    assert not moved.a[0, ..., 2:].any()
    assert not moved.b[0, 2:].any()


FREE = dataclasses.replace(PLAIN, optim="schedule_free_adamw", max_steps=6)


def test_schedule_free_is_optax_s():
    params, reference = stacked(), optax.contrib.schedule_free_adamw(0.01)
    tx = make_optimizer(FREE, 6)
    state, expected = tx.init(params), reference.init(params)
    ours = theirs = params
    for step in range(4):
        grads = random_like(params, step + 1)
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, expected = reference.update(grads, expected, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for x, y in zip(
        jax.tree.leaves(averaged(state, ours)),
        jax.tree.leaves(optax.contrib.schedule_free_eval_params(expected, theirs)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert averaged(optax.adam(0.1).init(params), params) is params


def small():
    config = lora_jax.LoRAConfig(rank=4, alpha=8, targets=["head"])
    return lora_jax.init(jax.random.key(1), tiny.small_init(jax.random.key(0)), config)


@pytest.mark.parametrize("valid", [True, False])
def test_a_run_evaluates_and_saves_the_averages(tmp_path, valid):
    rows, held_out = tiny.examples(24), tiny.examples(8, seed=9)
    config = dataclasses.replace(FREE, save_steps=6, eval_steps=2)
    result = train(tiny.small_apply, small(), rows, held_out if valid else None, config, output=tmp_path)
    _, adapter = lora_jax.split(result.params)
    saved = load_adapter(tmp_path).adapter
    for x, y in zip(jax.tree.leaves(saved), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    if valid:
        assert result.after.loss == pytest.approx(evaluate(tiny.small_apply, result.params, held_out).loss, rel=1e-6)


@pytest.mark.optimized
def test_a_resumed_schedule_free_run_is_the_run(tmp_path):
    rows, config = tiny.examples(24), dataclasses.replace(FREE, save_steps=3)
    expected = train(tiny.small_apply, small(), rows, None, config, output=tmp_path / "whole")
    train(tiny.small_apply, small(), rows, None, dataclasses.replace(config, max_steps=3), output=tmp_path / "out")
    result = train(tiny.small_apply, small(), rows, None, config, output=tmp_path / "out", resume=True)
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(x, y)
    other = dataclasses.replace(config, learning_rate=0.02, max_steps=9)
    with pytest.raises(ValueError, match=r"setting learning_rate: 0\.01 in the checkpoint, 0\.02"):
        train(tiny.small_apply, small(), rows, None, other, output=tmp_path / "out", resume=True)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"^lr_scheduler_type: cosine given with schedule_free_adamw, which has no"):
        dataclasses.replace(FREE, lr_scheduler_type="cosine")
    points = [sweep.Point(rank=2, alpha=4, targets=("head",))]
    with pytest.raises(ValueError, match=r"^optim: muon given, expected adamw, .* in a sweep, which pads"):
        sweep.run(
            tiny.small_apply,
            tiny.small_init(jax.random.key(0)),
            points,
            tiny.examples(4),
            config=dataclasses.replace(PLAIN, optim="muon"),
        )


# --- LoRA+ -----------------------------------------------------------------------------------------------------------

RATIO = 16.0
NODE = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, magnitude=jnp.ones(4))
TREE = {
    "q": {"kernel_lora": NODE, "bias": Trained(jnp.ones(4), "float32")},
    "norm": {"scale": Trained(jnp.ones((2, 4)), "float32")},  # of two stacked layers
    "table": {"embedding_lora": lora_jax.LoRA(jnp.ones((9, 2)), jnp.ones((2, 4)), 2.0)},
    "head": {"kernel": Trained(jnp.ones((4, 5)), "float32")},
}
# By PEFT's names; `create_loraplus_optimizer` gives those of embeddings a rate of their own, 1e-6.
RATIOS = {
    "q.kernel_lora.a": 1,
    "q.kernel_lora.b": RATIO,
    "q.kernel_lora.magnitude": RATIO,
    "q.bias.value": RATIO,
    "norm.scale.value": RATIO,
    "table.embedding_lora.a": 1,
    "table.embedding_lora.b": 1,
    "head.kernel.value": 1,
}


@pytest.mark.parametrize(
    "optim", few(["sgd", "adamw", "muon", "schedule_free_adamw"], ["adamw", "schedule_free_adamw"])
)
def test_loraplus_scales_the_steps_of_b(optim):
    plain = dataclasses.replace(PLAIN, optim=optim, weight_decay=0.1)
    plus = dataclasses.replace(plain, loraplus_lr_ratio=RATIO)
    grads = random_like(TREE, 1)
    updates = [tx.update(grads, tx.init(TREE), TREE)[0] for tx in (make_optimizer(c, 3) for c in (plain, plus))]
    named = [
        {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}
        for tree in updates
    ]
    assert named[0].keys() == RATIOS.keys()
    for name, x in named[0].items():
        np.testing.assert_allclose(named[1][name], RATIOS[name] * x, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.oracle
def test_loraplus_has_the_groups_of_peft():
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.norm, self.head = (
                torch.nn.Linear(3, 4),
                torch.nn.LayerNorm(4),
                torch.nn.Linear(4, 5, bias=False),
            )

        def forward(self, x):
            return self.head(self.norm(self.q(x)))

    config = LoraConfig(target_modules=["q"], use_dora=True, modules_to_save=["norm", "head"], bias="lora_only")
    model = get_peft_model(Model(), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=RATIO)
    names = {id(x): name for name, x in model.named_parameters()}
    theirs = {names[id(x)]: group["lr"] / 0.01 for group in optimizer.param_groups for x in group["params"]}
    ours = {"lora_A": "a", "lora_B": "b", "magnitude": "magnitude"}
    expected = {
        name: RATIOS[
            next(
                (f"q.kernel_lora.{part}" for mark, part in ours.items() if mark in name),
                "head.kernel.value" if ".head." in name else "norm.scale.value" if ".norm." in name else "q.bias.value",
            )
        ]
        for name in theirs
    }
    assert theirs == pytest.approx(expected)
    assert set(theirs.values()) == {1, RATIO}
