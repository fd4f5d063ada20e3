"""Agreement with TRL's DPOTrainer: tokens of preferences, losses, gradients of A and B, and what is logged.

`make test` compares with tests/golden/dpo.npz, which tests/golden/make_dpo.py wrote; with `--oracle` the trainer is
run anew. The rule of agreement is tests/agreement.py.
"""

import importlib
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from dpo_cases import BETA, CASE, LOSSES, ROWS, tokenizer
from peft_cases import draw
from peft_trees import edit
from test_peft_reference import by_name, llama

import lora_jax
from lora_jax import data, peft
from lora_jax.train import Reference, dpo, dpo_loss
from lora_jax.train._reference import at_start

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture(scope="module")
def expected(live):
    if not live:
        with np.load(Path(__file__).parent / "golden" / "dpo.npz") as golden:
            return dict(golden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        return importlib.import_module("golden.make_dpo").everything()


def encoded(form, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
    return data.encode_preferences(data.load(path), tokenizer(), 64).examples


def test_tokens_are_trls(expected, tmp_path):
    for form in ROWS:
        theirs = json.loads(str(expected[f"tokens/{form}"]))
        for (prompt, *answers), example in zip(theirs, encoded(form, tmp_path), strict=True):
            for answer, (ids, targets) in zip(answers, example, strict=True):
                assert ids.tolist() == prompt + answer, form
                assert targets.tolist() == [False] * len(prompt) + [True] * len(answer), form


def filled(model, params, prefix, folder):
    """The adapter with drawn factors, by PEFT's file."""
    peft.save(folder, params, names=model.names, overwrite=True)
    edit(folder, lambda tensors: {name: draw(prefix + name, x.shape) for name, x in tensors.items()})
    return lora_jax.split(peft.load(folder, model.params, names=model.names))[1]


def test_losses_gradients_and_metrics_are_trls(expected, tmp_path):
    """Also where the reference isn't the base, but has the adapter from which a run goes on."""
    model, config = llama(CASE), lora_jax.LoRAConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=axes)
    base, adapter = lora_jax.split(params)
    policy, earlier = (filled(model, params, prefix, tmp_path / "adapter") for prefix in ("policy ", ""))
    examples = encoded("text", tmp_path)
    batch = jax.tree.map(jnp.asarray, data.pad(examples, 4, 16))  # one of the four is padding
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    starts = {"base": at_start(base, adapter)[0], "adapter": at_start(base, earlier)[0]}
    assert starts["base"] is base
    compared = {name: Reference(model.apply, dpo(), start)(batch, 2) for name, start in starts.items()}
    cases = [*(("base", loss) for loss in LOSSES), ("adapter", "sigmoid")]

    @jax.jit
    def found(policy, compared):
        rows = (x.reshape(-1, x.shape[-1]) for x in (batch["input_ids"], batch["attention_mask"]))
        outputs, pull = jax.vjp(lambda policy, rows=tuple(rows): apply(lora_jax.combine(base, policy), *rows), policy)
        results, cotangents = [], []
        for reference, loss in cases:
            keywords = {"beta": BETA, "loss_type": loss, "label_smoothing": LOSSES[loss]}

            def mean(outputs, given=compared[reference], keywords=keywords):
                total, count, sums = dpo_loss(outputs, given, **keywords)
                return total / count, [sums[name] / count for name in METRICS]

            result, cotangent = jax.value_and_grad(mean, has_aux=True)(outputs)
            results.append(result)
            cotangents.append(cotangent)
        return results, jax.vmap(pull)(jnp.stack(cotangents))[0]

    results, gradients = found(policy, compared)
    for i, ((reference, loss), (value, metrics)) in enumerate(zip(cases, results, strict=True)):
        theirs = {
            name.removeprefix(f"{reference}/{loss}/"): x
            for name, x in expected.items()
            if name.startswith(f"{reference}/{loss}/")
        }
        assert abs(float(value) - theirs["loss/float64"]) <= 1e-5 * abs(theirs["loss/float64"])
        np.testing.assert_allclose(metrics, theirs["metrics/float64"], rtol=1e-4, atol=1e-5)
        ours = by_name(model, params, jax.tree.map(lambda x, i=i: x[i], gradients), tmp_path / "gradients")
        sides = [{name: theirs[f"gradient/{dtype}/{name}"] for name in ours} for dtype in ("float32", "float64")]
        assert_agrees(ours, *sides)
        assert sum(name.startswith("gradient/float64/") for name in theirs) == len(ours)
