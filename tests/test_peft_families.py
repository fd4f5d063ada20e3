"""Every family's adapters both ways, live: PEFT reads ours and we read PEFT's, with the same outputs.

Only with `--oracle`. Ours adapt all linear layers, experts and routers included; PEFT's are what its "all-linear"
makes.
"""

import importlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from model_cases import CASES, tokens_of, write_folder
from peft_cases import draw

import lora_jax
from lora_jax import models, peft

pytestmark = [
    pytest.mark.oracle,
    # PEFT's own: a deprecated name that it asks transformers for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says this of the rank and alpha that it gives experts itself.
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
    ),
    # GPT-2's layers are Conv1D: PEFT sets the field right and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning"),
]

# One case of each architecture.
CHOSEN = sorted({case["architectures"][0]: name for name, case in CASES.items()}.values())


MIXTURES = [name for name in CHOSEN if "num_experts_per_tok" in CASES[name]]


class Setting(NamedTuple):
    """A model on both sides: ours with its adapted function compiled once, and how to make theirs."""

    name: str
    model: models.Model
    axes: lora_jax.KernelAxes
    inputs: dict[str, np.ndarray]
    apply: Any

    def outputs(self, params):
        return self.apply(params, **{name: jnp.asarray(array, jnp.int32) for name, array in self.inputs.items()})

    def theirs(self, dtype):
        return make().read(self.name, self.model.folder, getattr(importlib.import_module("torch"), dtype))

    def their_outputs(self, model):
        torch = importlib.import_module("torch")
        with torch.no_grad():
            return model.eval()(**{name: torch.from_numpy(array) for name, array in self.inputs.items()})[0].numpy()


def make():
    """The reference's side of `model_cases`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and transformers' own imports
        return importlib.import_module("golden.make_models")


@pytest.fixture(params=CHOSEN, scope="module")
def setting(request, tmp_path_factory):
    name = request.param
    folder = write_folder(tmp_path_factory.mktemp(name), name, make().shapes(name))
    model, inputs = models.load(folder), tokens_of(name)
    traced = {key: jnp.asarray(array, jnp.int32) for key, array in inputs.items()}
    axes = lora_jax.kernel_axes(model.apply, model.params, **traced)
    apply = jax.jit(lora_jax.adapt(model.apply, on_materialize="error"))
    return Setting(name, model, axes, inputs, apply)


def drawn(params):
    """Every factor drawn: at init B = 0, which hides mistakes."""

    def leaf(path, value):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(draw(name, value.shape)) if name.endswith((".a", ".b")) else value

    return jax.tree_util.tree_map_with_path(leaf, params)


def read_by_peft(setting, folder):
    """The outputs of PEFT's model with the adapter in `folder`, in float32 and in float64. Nothing is left over."""
    reference, refs = importlib.import_module("peft"), []
    for dtype in ("float32", "float64"):
        config = reference.PeftConfig.from_pretrained(folder)
        theirs = reference.get_peft_model(setting.theirs(dtype), config, autocast_adapter_dtype=False)
        result = reference.set_peft_model_state_dict(theirs, reference.load_peft_weights(folder, device="cpu"))
        assert result.unexpected_keys == []
        assert [name for name in result.missing_keys if ".default" in name] == []
        refs.append(setting.their_outputs(theirs.to(getattr(importlib.import_module("torch"), dtype))))
    return refs


def test_peft_reads_ours(setting, tmp_path):
    config = lora_jax.LoRAConfig(rank=2, alpha=3, targets=("all-linear",))
    params = drawn(lora_jax.init(jax.random.key(0), setting.model.params, config, axes=setting.axes))
    peft.save(tmp_path / "ours", params, names=setting.model.names)
    assert_agrees(setting.outputs(params), *read_by_peft(setting, tmp_path / "ours"))


def test_we_read_pefts_and_it_reads_ours_of_them(setting, tmp_path):
    reference, torch = importlib.import_module("peft"), importlib.import_module("torch")
    config = reference.LoraConfig(r=3, lora_alpha=4, target_modules="all-linear")
    refs = []
    for dtype in ("float32", "float64"):
        theirs = reference.get_peft_model(setting.theirs(dtype), config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
        refs.append(setting.their_outputs(theirs.to(getattr(torch, dtype))))
        if dtype == "float32":
            theirs.save_pretrained(tmp_path / "theirs")
    read = lambda name: peft.load(tmp_path / name, setting.model.params, names=setting.model.names, axes=setting.axes)
    params = read("theirs")
    assert_agrees(setting.outputs(params), *refs)
    peft.save(tmp_path / "ours", params, names=setting.model.names)
    jax.tree.map(np.testing.assert_array_equal, read("ours"), params)
    assert_agrees(read_by_peft(setting, tmp_path / "ours")[0], *refs)


@pytest.mark.parametrize("setting", MIXTURES, indirect=True)
@pytest.mark.parametrize(
    ("targets", "ranks", "scaling"),
    [
        (("all-linear",), {}, "standard"),
        (("all-linear",), {}, "rank_stabilized"),
        (("all-linear",), {"down_proj": 4}, "standard"),
        (("gate_proj", "q_proj"), {}, "standard"),
        (("up_proj", "down_proj"), {"down_proj": (0,) * 5 + (1,) * 5 + (3,) * 5}, "standard"),
        (("mlp/gate", "q_proj"), {"mlp/gate": 3}, "standard"),
    ],
)
def test_peft_reads_our_experts(setting, tmp_path, targets, ranks, scaling):
    """Also where it would read one entry an expert wrong: ranks that differ, gate without up, alpha over √r."""
    overrides = [lora_jax.Override(target=target, rank=rank) for target, rank in ranks.items()]
    config = lora_jax.LoRAConfig(rank=2, alpha=2, targets=targets, overrides=overrides, scaling=scaling)
    params = drawn(lora_jax.init(jax.random.key(0), setting.model.params, config, axes=setting.axes))
    for fused in (False, True):
        peft.save(tmp_path / "ours", params, names=setting.model.names, fused=fused, overwrite=True)
        assert_agrees(setting.outputs(params), *read_by_peft(setting, tmp_path / "ours"))
