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
from peft_cases import STEPS, draw
from safetensors.numpy import load_file

import lora_jax
from lora_jax import models, peft
from lora_jax.peft import adapter_folder

pytestmark = [
    pytest.mark.oracle,
    # PEFT's own: a deprecated name that it asks transformers for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says this of the rank and alpha that it gives experts itself.
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
    ),
    # PEFT saves embeddings whole where they are adapted, and says so.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    # GPT-2's layers are Conv1D, and its head for labels is Linear: PEFT sets the field right and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (False|True) but the target module is:UserWarning"),
]

# One case of each architecture. Decoders have one head for labels, which `test_models` compares in all of them.
OF_EACH = {case["architectures"][0]: name for name, case in CASES.items()}.values()
HEADS = ("bert_classification", "roberta_classification", "gpt2_classification", "llama_classification")
CHOSEN = sorted(name for name in OF_EACH if not name.endswith("classification") or name in HEADS)


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
    return setting_of(request.param, tmp_path_factory.mktemp(request.param))


def setting_of(name, folder):
    folder = write_folder(folder, name, make().shapes(name))
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
        missing = [name for name in result.missing_keys if ".default" in name]
        # A head that shares its table shares the rows' parameter too, which the file has once.
        shared = tuple(f"{head}.token_adapter.trainable_tokens_delta.default" for head in ("decoder", "lm_head"))
        assert [name for name in missing if not name.endswith(shared)] == []
        refs.append(setting.their_outputs(theirs.to(getattr(importlib.import_module("torch"), dtype))))
    return refs


def test_peft_reads_ours(setting, tmp_path):
    config = lora_jax.LoRAConfig(rank=2, alpha=3, targets=("all-linear",))
    params = drawn(lora_jax.init(jax.random.key(0), setting.model.params, config, axes=setting.axes))
    peft.save(tmp_path / "ours", params, names=setting.model.names)
    assert_agrees(setting.outputs(params), *read_by_peft(setting, tmp_path / "ours"))


def written_by_peft(setting, config, folder, value=lambda name, parameter, drawn: drawn):
    """The outputs of PEFT's model in float32 and in float64.

    Every parameter that trains is set to `value(name, parameter, drawn)`; the float32 model is saved in `folder`.
    """
    reference, torch, refs = importlib.import_module("peft"), importlib.import_module("torch"), []
    for dtype in ("float32", "float64"):
        theirs = reference.get_peft_model(setting.theirs(dtype), config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(value(name, parameter, torch.from_numpy(draw(name, tuple(parameter.shape)))))
        refs.append(setting.their_outputs(theirs.to(getattr(torch, dtype))))
        if dtype == "float32":
            theirs.save_pretrained(folder)
    return refs


def test_we_read_pefts_and_it_reads_ours_of_them(setting, tmp_path):
    config = importlib.import_module("peft").LoraConfig(r=3, lora_alpha=4, target_modules="all-linear")
    refs = written_by_peft(setting, config, tmp_path / "theirs")
    read = lambda name: peft.load(tmp_path / name, setting.model.params, names=setting.model.names, axes=setting.axes)
    params = read("theirs")
    assert_agrees(setting.outputs(params), *refs)
    peft.save(tmp_path / "ours", params, names=setting.model.names)
    jax.tree.map(np.testing.assert_array_equal, read("ours"), params)
    assert_agrees(read_by_peft(setting, tmp_path / "ours")[0], *refs)


class Trained(NamedTuple):
    """PEFT's model in one dtype: its outputs, the first gradients, and the moves of three steps of SGD, by name."""

    outputs: np.ndarray
    gradients: dict[str, np.ndarray]
    moves: dict[str, np.ndarray]


def pull(name, shape):
    """What the outputs are pulled towards: the loss is the sum of outputs times this, so that nothing saturates."""
    return draw(f"{name} pull", shape) / shape[-1]


def train_by_peft(setting, dtype, rate, folder):
    """`rate` maps the first gradients to the learning rate; the adapter is saved before it trains."""
    reference, torch = importlib.import_module("peft"), importlib.import_module("torch")
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if setting.name in MIXTURES:  # gate's and up's common A trains otherwise than one for each
        parameters = ["mlp.gate.weight", "experts.down_proj"]
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": parameters}
    config = reference.LoraConfig(r=3, lora_alpha=1, **targets)  # small, so that no softmax saturates
    theirs = reference.get_peft_model(setting.theirs(dtype), config, autocast_adapter_dtype=False)
    trained = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    theirs.save_pretrained(folder)
    theirs = theirs.to(getattr(torch, dtype)).eval()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    inputs = {name: torch.from_numpy(array) for name, array in setting.inputs.items()}
    outputs, first = None, None
    for _ in range(STEPS):
        theirs.zero_grad()
        out = theirs(**inputs)[0]
        torch.sum(out * torch.from_numpy(pull(setting.name, out.shape))).backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}
        outputs, first = (out.detach().numpy(), gradients) if first is None else (outputs, first)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= rate(first) * gradients[name]
    moves = {name: (parameter.detach() - before[name]).numpy() for name, parameter in trained.items()}
    return Trained(outputs, {name: gradient.numpy() for name, gradient in first.items()}, moves)


def by_name(tree, adapter, setting, folder):
    """Factors of a tree of the adapter's shape, as a file names and lays them out."""

    def leaf(path, value, own):
        return own if jax.tree_util.keystr(path).endswith(".scale") else value

    tree = jax.tree_util.tree_map_with_path(leaf, tree, adapter)
    peft.save(folder, tree, names=setting.model.names, fused=setting.name in MIXTURES, overwrite=True)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("setting", CHOSEN, indirect=True)
def test_gradients_steps_and_the_merged_model(setting, tmp_path):
    # Steps as long as moves of 1e-2 need: three of them amplify the rounding of the first.
    rate = lambda gradients: 0.2 / max(float(abs(gradient).max()) for gradient in gradients.values())
    refs = [train_by_peft(setting, dtype, rate, tmp_path / dtype) for dtype in ("float32", "float64")]
    params = peft.load(tmp_path / "float32", setting.model.params, names=setting.model.names, axes=setting.axes)
    models.save(tmp_path / "merged", setting.model, lora_jax.merge(params))
    single = importlib.import_module("torch").float32
    merged = setting.their_outputs(make().read(setting.name, tmp_path / "merged", single))
    assert_agrees(merged, refs[0].outputs, refs[1].outputs)

    base, adapter = lora_jax.split(params)

    @jax.jit
    def gradient(adapter):
        def loss(adapter):
            out = setting.outputs(lora_jax.combine(base, adapter))
            return jnp.sum(out * pull(setting.name, out.shape))

        return jax.grad(loss)(adapter)

    first, now = gradient(adapter), adapter
    gradients = by_name(first, adapter, setting, tmp_path / "ours")
    assert_agrees(gradients, refs[0].gradients, refs[1].gradients)
    for _ in range(STEPS):
        found = gradient(now)
        now = jax.tree.map(lambda p, g: p - rate(gradients) * g, now, found)
    moves = by_name(jax.tree.map(jnp.subtract, now, adapter), adapter, setting, tmp_path / "ours")
    assert np.median([np.max(np.abs(move)) for move in refs[1].moves.values()]) >= 1e-2
    assert_agrees(moves, refs[0].moves, refs[1].moves)


OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rank_stabilized": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"1\..*query|h\.1\.attn\.c_attn": 4},
        "alpha_pattern": {"value": 5, "attn.c_proj": 1},
    },
    "bias": {"bias": "all"},
    "bias of what is adapted": {"bias": "lora_only"},
    "whole": {"modules_to_save": ["classifier", "ln_f", "transform", "norm"]},
    "rows": {"trainable_token_indices": [1, 7, 30]},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "layers": {"target_modules": ["query", "c_attn", "q_proj"], "layers_to_transform": [0, 2]},
    "excluded": {"exclude_modules": r".*\.1\..*"},
}
MOST = ["gpt2", "bert_masked_lm", "roberta_classification"]
COMBINATIONS = [
    *((name, option) for name in MOST for option in OPTIONS if option != "embedding"),
    ("roberta_classification", "embedding"),  # untied; `test_peft_reference` has one that is tied
    ("roberta_masked_lm", "bias"),
    *((name, option) for name in ("gemma2", "qwen3") for option in ("dora", "whole", "rows")),
    ("mixtral", "layers"),
]


@pytest.mark.parametrize(("setting", "option"), COMBINATIONS, indirect=["setting"])
def test_options_beyond_llama(setting, option, tmp_path):
    """What PEFT writes with an option reads as its function; what we write of it reads back as that, in PEFT too."""
    settings = {"r": 3, "lora_alpha": 2, "target_modules": "all-linear"} | OPTIONS[option]
    # Where rows of an embedding train whose table a head shares, PEFT's forward leaves out the head's bias.
    head = setting.model.params.get("lm_head", {}).get("bias") if option == "rows" else None
    forgotten = 0 if head is None else np.asarray(head)

    def value(name, parameter, drawn):
        return drawn if "lora_A" in name or "lora_B" in name else parameter + 0.3 * drawn.abs()

    config = importlib.import_module("peft").LoraConfig(**settings)
    refs = [outputs + forgotten for outputs in written_by_peft(setting, config, tmp_path / "theirs", value)]
    plain = setting.their_outputs(setting.theirs("float32"))
    assert np.max(np.abs(refs[0] - plain)) > 1e-2 * np.max(np.abs(plain))
    model = setting.model
    read = lambda name: peft.load(tmp_path / name, model.params, names=model.names, axes=setting.axes)
    params = read("theirs")
    assert_agrees(setting.outputs(params), *refs)
    rows = adapter_folder.token_rows(tmp_path / "theirs", model.params, model.names)
    peft.save(tmp_path / "ours", params, names=model.names, tokens=rows)
    jax.tree.map(np.testing.assert_array_equal, read("ours"), params)
    assert_agrees(read_by_peft(setting, tmp_path / "ours")[0] + forgotten, *refs)


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
