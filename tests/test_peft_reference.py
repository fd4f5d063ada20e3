"""Agreement with transformers and PEFT: reading, logits, gradients, steps of SGD, and adapters and models written here.

`make test` compares with tests/golden/peft, which tests/golden/make_peft.py wrote; with `--oracle` the same references
are computed anew, and what we write is loaded by PEFT and transformers. The rule of agreement is tests/agreement.py.
"""

import importlib
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import assert_agrees
from marks import few
from peft_cases import ATTENTION, CASES, STEPS, Case, draw, model_config, tokens
from peft_trees import tensors_in
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

import lora_jax
from lora_jax import models, peft

# PEFT's own: a deprecated name that it asks transformers for, and that it copies adapted embeddings into the file.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

GOLDEN = Path(__file__).parent / "golden" / "peft"


class Setting(NamedTuple):
    """One case on both sides: our model, its parameters with PEFT's adapter, and what the reference computes."""

    name: str
    case: Case
    model: models.Model
    params: Any
    expected: dict[str, np.ndarray]

    @property
    def also_train(self) -> tuple[str, ...]:
        """The leaves that train whole, as patterns."""
        whole = {"lm_head": "lm_head", "model.norm": "/norm/scale/"}
        biases = {
            "lora_only": ("q_proj/bias", "v_proj/bias"),
            "all": tuple(f"{name}/bias" for name in ATTENTION),
        }.get(self.case.lora.get("bias"), ())
        return tuple(whole[name] for name in self.case.lora.get("modules_to_save", ())) + biases

    def agrees(self, kind: str, ours: Any) -> None:
        """`ours` is an array, or a dict of them by the name of the tensor."""
        if not isinstance(ours, dict):
            assert_agrees(np.asarray(ours), self.expected[f"{kind}/float32"], self.expected[f"{kind}/float64"])
            return
        names = {name.split("/", 2)[2] for name in self.expected if name.startswith(f"{kind}/")}
        # Our file has the factors of a tied head as well, which are the embedding's.
        head = {f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"}
        assert ours.keys() == (names | head if self.name == "tied_embedding" else names)
        ours = {name: ours[name] for name in names}
        sides = [{name: self.expected[f"{kind}/{dtype}/{name}"] for name in names} for dtype in ("float32", "float64")]
        assert_agrees(ours, *sides)


def llama(case: Case) -> models.Model:
    """Our model with the case's weights, read from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        model = models.init(jax.random.key(0), LlamaConfig(**model_config(case)))
        models.save(folder, model, model.params, overwrite=True)
        file = Path(folder) / "model.safetensors"
        save_file({name: draw(name, tensor.shape) for name, tensor in load_file(file).items()}, file)
        return models.load(folder)


def oracle():
    """The reference itself: torch, PEFT and transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return importlib.import_module("golden.make_peft")


def by_name(model: models.Model, params: Any, adapter: Any, folder: Path) -> dict[str, np.ndarray]:
    """An adapter of `params`, or gradients by it, under the names and in the shapes of PEFT's file.

    The file has no padding: an array in it that wasn't zero would make the rank another one than PEFT's.
    """
    base = lora_jax.split(params)[0]
    peft.save(folder, lora_jax.combine(base, adapter), names=model.names, overwrite=True)
    return tensors_in(folder)


OFTEN = ("grouped_query", "patterns", "whole_modules")


@pytest.fixture(scope="module", params=few(CASES, OFTEN))
def setting(request, live, tmp_path_factory):
    case, folder = CASES[request.param], GOLDEN / request.param
    if live:
        folder = tmp_path_factory.mktemp("peft")
        oracle().make(folder, case)
    model = llama(case)
    params = peft.load(folder, model.params, names=model.names)
    with np.load(folder / "expected.npz") as expected:
        return Setting(request.param, case, model, params, dict(expected))


def test_logits_of_the_base_and_of_the_merged_model(setting):
    apply = jax.jit(setting.model.apply)
    setting.agrees("base", apply(setting.model.params, jnp.asarray(tokens())))
    setting.agrees("adapted", apply(lora_jax.merge(setting.params), jnp.asarray(tokens())))


def test_logits_gradients_and_three_steps(setting, tmp_path):
    ids = jnp.asarray(tokens())
    base, adapter = lora_jax.split(setting.params, setting.also_train)
    apply = lora_jax.adapt(setting.model.apply, on_materialize="error")
    tx = lora_jax.masked(optax.sgd(setting.case.learning_rate))

    def loss(adapter):
        logits = apply(lora_jax.combine(base, adapter), ids)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return losses.mean(), logits

    @jax.jit
    def step(adapter, state):
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(adapter)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, logits, gradients

    trained, state, logits, gradients = step(adapter, tx.init(adapter))
    setting.agrees("adapted", logits)
    setting.agrees("gradient", by_name(setting.model, setting.params, gradients, tmp_path / "gradients"))
    for _ in range(STEPS - 1):
        trained, state, _, _ = step(trained, state)
    moved = jax.tree.map(jnp.subtract, trained, adapter)
    moves = by_name(setting.model, setting.params, moved, tmp_path / "moves")
    assert min(np.max(np.abs(move)) for move in moves.values()) >= 1e-2
    setting.agrees("move", moves)


def test_what_peft_wrote_survives_a_round_trip(setting, tmp_path):
    peft.save(tmp_path / "ours", setting.params, names=setting.model.names, also_train=setting.also_train)
    again = peft.load(tmp_path / "ours", setting.model.params, names=setting.model.names)
    assert jax.tree.structure(again) == jax.tree.structure(setting.params)
    jax.tree.map(np.testing.assert_array_equal, again, setting.params)


# Live ---------------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("portable", [False, True])
def test_peft_loads_what_we_write(setting, tmp_path, portable):
    """No key missing or unexpected, and the same logits; what PEFT then saves is read here as the same adapter."""
    import peft as reference

    save = lambda: peft.save(
        tmp_path / "ours", setting.params, names=setting.model.names, also_train=setting.also_train, portable=portable
    )
    if portable and setting.case.lora.get("use_dora"):
        with pytest.raises(ValueError, match="no portable form"):
            save()
        return
    save()
    make = oracle()
    config = reference.PeftConfig.from_pretrained(tmp_path / "ours")
    theirs = reference.get_peft_model(make.base_model(setting.case), config).eval()
    weights = reference.load_peft_weights(tmp_path / "ours", device="cpu")
    result = reference.set_peft_model_state_dict(theirs, weights)
    assert result.unexpected_keys == []
    adapters = [name for name in result.missing_keys if ".default" in name]
    assert adapters == []
    assert set(reference.get_peft_model_state_dict(theirs)) - set(weights) <= {
        f"base_model.model.{name}.base_layer.weight" for name in ("lm_head", "model.embed_tokens")
    }
    setting.agrees("adapted", make.logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.load(tmp_path / "theirs", setting.model.params, names=setting.model.names)
    ours = peft.load(tmp_path / "ours", setting.model.params, names=setting.model.names)
    jax.tree.map(np.testing.assert_array_equal, again, ours)


@pytest.mark.oracle
def test_peft_model_loads_our_folder_without_a_warning(setting, tmp_path):
    import peft as reference

    peft.save(tmp_path / "ours", setting.params, names=setting.model.names, also_train=setting.also_train)
    make = oracle()
    model = reference.PeftModel.from_pretrained(make.base_model(setting.case), tmp_path / "ours")
    setting.agrees("adapted", make.logits(model))


@pytest.mark.oracle
def test_transformers_loads_the_merged_folder(setting, tmp_path):
    import transformers

    models.save(tmp_path / "merged", setting.model, lora_jax.merge(setting.params))
    merged, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    setting.agrees("adapted", oracle().logits(merged.eval()))
