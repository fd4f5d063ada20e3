"""Prefix embeddings: laws on small models of every kind, beside LoRA, in training, generation and files."""

import functools
import importlib
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import assert_agrees
from marks import few
from model_cases import CASES, encodes, write_folder
from public_trees import leaves_of
from safetensors.numpy import load_file, save_file
from test_cli import tiny_model, write_rows
from transformers import BertConfig, GPT2Config, LlamaConfig, PretrainedConfig

import lora_jax
from lora_jax import Prefix, data, models, peft, prefix, sweep, train
from lora_jax.cli import main
from lora_jax.generate import generate

LENGTH = 3
SIZES = {"vocab_size": 40, "initializer_range": 0.3}
LLAMA = LlamaConfig(
    **SIZES,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    eos_token_id=1,
)
BERT = BertConfig(
    **SIZES, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
)
BERT.architectures = ["BertForSequenceClassification"]


@pytest.fixture(scope="module")
def llama():
    return models.init(jax.random.key(0), LLAMA)


@pytest.fixture(scope="module")
def bert():
    return models.init(jax.random.key(0), BERT)


def adapted(model, after=0, length=LENGTH):
    """The model's parameters with LoRA that does something, and a prefix."""
    config = lora_jax.LoRAConfig(rank=2, alpha=4)
    ids = jnp.ones((1, 4), jnp.int32)
    params = lora_jax.init(
        jax.random.key(1), model.params, config, axes=lora_jax.kernel_axes(model.apply, model.params, ids)
    )
    base, adapter = lora_jax.split(params)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    return prefix.init(jax.random.key(2), lora_jax.combine(base, adapter), length, after=after)


def adapt(model):
    return jax.jit(prefix.adapt(lora_jax.adapt(model.apply)))


IDS = jnp.asarray(np.random.default_rng(0).integers(2, 40, (2, 7)), jnp.int32)


# --- laws ------------------------------------------------------------------------------------------------------------


def test_length_zero_is_the_base(llama):
    params = prefix.init(jax.random.key(0), llama.params, 0)
    assert params is llama.params
    assert prefix.length(params) == 0


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        pytest.param(GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=32), marks=pytest.mark.slow),
        BERT,
        pytest.param(PretrainedConfig.from_dict({"model_type": "gemma"}), marks=pytest.mark.slow),
    ],
    ids=lambda config: config.model_type,
)
def test_a_prefix_of_known_tokens_is_those_tokens(config):
    """Rows of the table as a prefix give what the tokens themselves give, whatever the model makes of embeddings."""
    if config.model_type == "gemma":
        config = importlib.import_module("transformers").GemmaConfig(**LLAMA.to_diff_dict() | {"head_dim": 8})
    model = models.init(jax.random.key(0), config)
    after = 1 if config.model_type == "bert" else 0
    known = jnp.array([5, 9, 7])
    table = next(x for path, x in models.flatten(model.params).items() if path.split("/")[-2] in prefix.EMBEDDINGS)
    params = prefix.put(model.params, table[known], after=after)
    longer = jnp.concatenate([IDS[:, :after], jnp.tile(known, (2, 1)), IDS[:, after:]], axis=1)
    expected = jax.jit(model.apply)(model.params, longer)
    if expected.ndim == 3:
        expected = jnp.delete(expected, np.arange(after, after + LENGTH), axis=1)
    np.testing.assert_allclose(jax.jit(prefix.adapt(model.apply))(params, IDS), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", few(["left", "right"], ["left"]))
def test_padding_on_either_side_is_not_seen(llama, side):
    params, apply = adapted(llama), adapt(llama)
    alone = apply(params, IDS)
    pad = jnp.full((2, 4), 3, jnp.int32)
    parts, masks = [IDS, pad], [jnp.ones_like(IDS), jnp.zeros_like(pad)]
    order = (1, 0) if side == "left" else (0, 1)
    ids, mask = (jnp.concatenate([x[i] for i in order], axis=1) for x in (parts, masks))
    real = slice(4, None) if side == "left" else slice(0, 7)
    np.testing.assert_allclose(apply(params, ids, mask)[:, real], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_pooled_position_stays_the_first(bert):
    """With the prefix after [CLS], padding on the right and types of tokens."""
    params, apply = adapted(bert, after=1), adapt(bert)
    types = jnp.concatenate([jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 3), jnp.int32)], axis=1)
    alone = apply(params, IDS, token_type_ids=types)
    assert alone.shape == (2, 3)
    assert np.abs(alone - apply(prefix.take(params)[0], IDS, token_type_ids=types)).max() > 1e-2
    ids = jnp.pad(IDS, ((0, 0), (0, 2)))
    mask, types = jnp.pad(jnp.ones_like(IDS), ((0, 0), (0, 2))), jnp.pad(types, ((0, 0), (0, 2)))
    np.testing.assert_allclose(apply(params, ids, mask, token_type_ids=types), alone, rtol=1e-5, atol=1e-5)


def test_split_combine_mask_and_counts_know_it(llama):
    params = adapted(llama)
    base, adapter = lora_jax.split(params)
    assert base["prefix"] is None
    assert isinstance(adapter["prefix"], Prefix)
    assert jax.tree.structure(lora_jax.combine(base, adapter)) == jax.tree.structure(params)
    assert lora_jax.mask(params)["prefix"].value is True
    assert lora_jax.describe(params).trainable == lora_jax.describe(prefix.take(params)[0]).trainable + LENGTH * 16
    assert lora_jax.stack([adapter, adapter])["prefix"].value.shape == (2, LENGTH, 16)


def test_gradients_reach_the_prefix_and_the_factors_only(llama):
    params, apply = adapted(llama), adapt(llama)
    base, adapter = lora_jax.split(params)
    tx = lora_jax.masked(optax.sgd(1.0))

    def loss(params):
        return jnp.sum(jnp.square(apply(params, IDS)[:, -1]))

    grads = jax.grad(lambda a: loss(lora_jax.combine(base, a)))(adapter)
    node = grads["layers"]["self_attn"]["q_proj"]["kernel_lora"]
    for name, found in {"prefix": grads["prefix"].value, "a": node.a, "b": node.b}.items():
        assert np.abs(found).max() > 1e-6, name
    assert np.all(np.abs(grads["prefix"].value).max(axis=1) > 1e-6)  # every token of it
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    moved = {path for path, x in models.flatten(updates).items() if np.abs(x).max() > 0}
    assert moved
    assert all("_lora" in path or path.startswith("prefix") for path in moved)


@pytest.mark.slow
def test_low_precision_keeps_a_float32_master(llama):
    model = models.init(jax.random.key(0), LLAMA, jnp.bfloat16)
    params = adapted(model)
    assert params["prefix"].value.dtype == jnp.float32
    assert params["prefix"].dtype == "bfloat16"
    assert jax.eval_shape(adapt(model), params, IDS).dtype == jnp.bfloat16


# --- training, generation --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_moves_it_and_the_loss(llama, tmp_path):
    rows = [data.Example(np.arange(2, 10 + i % 3, dtype=np.int32), np.arange(8 + i % 3) > 2) for i in range(8)]
    config = train.TrainConfig(max_steps=4, batch_size=4, learning_rate=1e-2, save_steps=2)
    params = adapted(llama)
    result = train.train(llama.apply, params, rows, rows, config, output=tmp_path)
    assert np.abs(result.params["prefix"].value - params["prefix"].value).max() > 1e-3
    assert result.after.loss < result.before.loss
    assert train.evaluate(llama.apply, result.params, rows).loss == pytest.approx(result.after.loss, rel=1e-5)
    resumed = train.train(llama.apply, params, rows, rows, config, output=tmp_path, resume=True)
    np.testing.assert_array_equal(resumed.params["prefix"].value, result.params["prefix"].value)


@pytest.mark.slow
def test_a_sweep_trains_one_for_each_point(llama):
    """As alone, beside adapters of other ranks."""
    rows = [data.Example(np.arange(2, 10, dtype=np.int32), np.arange(8) > 2) for _ in range(4)]
    params = prefix.init(jax.random.key(2), llama.params, LENGTH)
    points = [sweep.Point(rank=rank, alpha=4, targets=("q", "v")) for rank in (1, 2)]
    config = train.TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2)
    found = sweep.run(llama.apply, params, points, rows, config=config).results
    lora, alone = points[0].settings(None, config, list(leaves_of(llama.params)))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    started = lora_jax.init(
        key, params, lora, axes=lora_jax.kernel_axes(llama.apply, llama.params, jnp.ones((1, 4), jnp.int32))
    )
    result = train.train(llama.apply, started, rows, config=alone)
    for each in found:
        assert np.abs(each.adapter["prefix"].value - params["prefix"].value).max() > 1e-3
    np.testing.assert_allclose(found[0].adapter["prefix"].value, result.params["prefix"].value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "after"), [("llama", 0), ("bert", 1)])
def test_what_isnt_used_is_not_seen(kind, after, request):
    """The outputs, and the gradients of the embeddings, are those with a prefix of that length; 0 is none at all."""
    model = request.getfixturevalue(kind)
    params, mask = adapted(model, after), jnp.ones_like(IDS).at[1, 5:].set(0)
    plain, node = prefix.take(params)

    def outputs(params, **settings):
        found = prefix.adapt(lora_jax.adapt(model.apply), **settings)(params, IDS, mask)
        return found * mask[..., None] if found.ndim == 3 else found  # what a model makes of padding doesn't matter

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def cut(value, used):
        found = outputs({**plain, "prefix": Prefix(value, node.dtype, after)}, used=used)
        return jnp.sum(jnp.square(found)), found

    for used in (0, 2, LENGTH):
        (_, ours), grads = cut(node.value, used)
        expected = jax.jit(outputs)(prefix.put(plain, node.value[:used], after=after) if used else plain)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        assert not grads[used:].any()
        assert np.all(np.abs(grads[:used]).max(axis=1) > 1e-6)


@pytest.mark.slow
def test_a_sweep_compares_lengths(llama):
    """Each as alone with a prefix of that length, or with none: in one program, beside another rank."""
    rows = [data.Example(np.arange(2, 9 + i, dtype=np.int32), np.arange(7 + i) > 2) for i in range(4)]
    points = [
        sweep.Point(rank=rank, alpha=4, targets=("q", "v"), prefix_length=length, seed=length)
        for rank, length in ((1, 0), (2, 2))
    ]
    config = train.TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, data_seed=0)
    results = sweep.run(llama.apply, llama.params, points, rows, rows, config)
    for point, found in zip(points, results.results, strict=True):
        assert_as_alone(llama, point, found, rows, config)
    assert [row["prefix_length"] for row in results.summary()] == [0, 2]


def assert_as_alone(model, point, found, rows, config):
    lora, alone = point.settings(None, config, list(leaves_of(model.params)))
    key = jax.random.key(alone.seed)
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    started = lora_jax.init(jax.random.fold_in(key, 0), model.params, lora, axes=axes)
    if point.prefix_length:
        started = prefix.init(key, started, point.prefix_length)
    result = train.train(model.apply, started, rows, rows, config=alone)
    assert found.valid.loss == pytest.approx(result.after.loss, rel=1e-5)
    expected = lora_jax.split(result.params)[1]
    assert jax.tree.structure(found.adapter) == jax.tree.structure(expected)
    for mine, other in zip(jax.tree.leaves(found.adapter), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert found.trainable == lora_jax.describe(result.params).trainable


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 2])
def test_the_longest_prefix_may_be_of_a_point_that_is_not_trained(llama, length):
    """What is left is padded to its own longest, not to that of the points which scored less."""
    rows = [data.Example(np.arange(2, 9 + i, dtype=np.int32), np.arange(7 + i) > 2) for i in range(4)]
    points = [
        sweep.Point(rank=1, alpha=1, targets=("q",), prefix_length=4),
        sweep.Point(rank=2, alpha=4, targets=("q", "v"), prefix_length=length),
    ]
    config = train.TrainConfig(max_steps=2, batch_size=4, learning_rate=1e-2, data_seed=0)
    (found,) = sweep.run(llama.apply, llama.params, points, rows, rows, config, score_batches=1, best=1).results
    assert found.point.rank == 2
    assert_as_alone(llama, found.point, found, rows, config)


@pytest.mark.slow
def test_a_sweep_is_told_the_table(llama):
    """A model that calls its table otherwise trains as the one that it is."""
    rows = [data.Example(np.arange(2, 9, dtype=np.int32), np.arange(7) > 2)]
    point = sweep.Point(rank=1, alpha=4, targets=("q",), prefix_length=2)
    config = train.TrainConfig(max_steps=2, batch_size=1, learning_rate=1e-2)
    named = {**llama.params, "lookup": {"rows": llama.params["embed_tokens"]["embedding"]}}
    del named["embed_tokens"]

    def apply(params, *args, **options):
        rest = {name: child for name, child in params.items() if name != "lookup"}
        return llama.apply({**rest, "embed_tokens": {"embedding": params["lookup"]["rows"]}}, *args, **options)

    with pytest.raises(ValueError, match=r"^embedding: nothing matches"):
        sweep.run(apply, named, [point], rows, config=config)
    (ours,) = sweep.run(apply, named, [point], rows, config=config, prefix_embedding="lookup/rows").results
    (expected,) = sweep.run(llama.apply, llama.params, [point], rows, config=config).results
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(ours.adapter["prefix"].value, expected.adapter["prefix"].value, rtol=1e-5)


def test_a_sweep_of_lengths_needs_a_tree_without(llama):
    params = prefix.init(jax.random.key(2), llama.params, LENGTH)
    point = sweep.Point(rank=1, alpha=1, targets=("q",), prefix_length=2)
    rows = [data.Example(np.arange(2, 9, dtype=np.int32), np.arange(7) > 2)]
    with pytest.raises(ValueError, match=r"^prefix_length: 2 given, but the tree has 3 prefix embeddings"):
        sweep.run(llama.apply, params, [point], rows)
    with pytest.raises(ValueError, match=r"^prefix_length: -1 given, expected a whole number of 0 or more"):
        sweep.Point(rank=1, alpha=1, prefix_length=-1)


@pytest.mark.slow
def test_generation_is_the_argmax_of_the_whole_forward(llama):
    params, apply = adapted(llama), adapt(llama)
    ids, mask = np.array(IDS), np.ones(IDS.shape, bool)
    ids[1, :3], mask[1, :3] = 0, False
    new = np.asarray(generate(llama.apply, llama.init_cache, params, ids, mask, max_tokens=5, eos_id=1))
    whole = np.concatenate([ids, new], axis=1)
    greedy = jnp.argmax(apply(params, whole, np.pad(mask, ((0, 0), (0, 5)), constant_values=True)), axis=-1)
    for row in range(2):
        told = new[row].tolist()
        end = told.index(1) + 1 if 1 in told else len(told)
        assert greedy[row, 6 : 6 + end].tolist() == told[:end]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_prefix_comes_back(llama, tmp_path):
    params = adapted(llama, after=1)
    peft.save(tmp_path / "a", params, names=llama.names, task_type="CAUSAL_LM")
    again = peft.load(tmp_path / "a", llama.params, names=llama.names)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    settings = json.loads((tmp_path / "a" / "prefix" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["num_virtual_tokens"], settings["token_dim"]) == ("PROMPT_TUNING", 3, 16)


def test_an_adapter_without_one_is_written_as_before(llama, tmp_path):
    """No prefix of an earlier adapter stays behind, and no field that PEFT doesn't know."""
    params = adapted(llama)
    peft.save(tmp_path, params, names=llama.names)
    peft.save(tmp_path, prefix.take(params)[0], names=llama.names, overwrite=True)
    assert not (tmp_path / "prefix").exists()
    assert "lora_jax_prefix" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert "prefix" not in peft.load(tmp_path, llama.params, names=llama.names)


def test_neither_part_is_read_without_the_other(llama, tmp_path):
    params = adapted(llama)
    for name in ("a", "b", "c"):
        peft.save(tmp_path / name, params, names=llama.names)
    shutil.rmtree(tmp_path / "a" / "prefix")
    with pytest.raises(ValueError, match=r"has a prefix, and prefix/adapter_model\.safetensors is missing"):
        peft.load(tmp_path / "a", llama.params, names=llama.names)
    file = tmp_path / "b" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({name: x for name, x in fields.items() if name != "lora_jax_prefix"}))
    with pytest.raises(ValueError, match="checksum differs"):
        peft.load(tmp_path / "b", llama.params, names=llama.names)
    other = prefix.put(prefix.take(params)[0], params["prefix"].value + 1)
    peft.save(tmp_path / "d", other, names=llama.names)
    shutil.copy(tmp_path / "d" / "prefix" / "adapter_model.safetensors", tmp_path / "c" / "prefix")
    peft.load(tmp_path / "c", llama.params, names=llama.names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: 'LORA' given, expected 'PROMPT_TUNING'"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens: 4 given, expected 3"),
        ({"token_dim": "16"}, "token_dim: '16' given, expected 16"),
        (None, "missing; restore it"),
        ([], "peft_type: None given"),
    ],
)
def test_its_own_config_tells_the_same(llama, tmp_path, fields, message):
    peft.save(tmp_path / "a", adapted(llama), names=llama.names)
    path = tmp_path / "a" / "prefix" / "adapter_config.json"
    if fields is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields if isinstance(fields, dict) else fields))
    with pytest.raises(ValueError, match=message) as caught:
        peft.load(tmp_path / "a", llama.params, names=llama.names)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.complex64])
def test_its_dtype_is_one_of_an_adapters(llama, tmp_path, dtype):
    peft.save(tmp_path / "a", adapted(llama), names=llama.names)
    path = tmp_path / "a" / "prefix" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"].astype(dtype)}, path)
    with pytest.raises(ValueError, match=r"prompt_embeddings is .*; expected one of BF16, F16, F32, F64"):
        peft.load(tmp_path / "a", llama.params, names=llama.names)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_would_lose_it_is_refused(llama):
    params = adapted(llama)
    with pytest.raises(ValueError, match=r"prefix: 3 prefix embeddings are inputs and can't be merged"):
        lora_jax.merge(params)
    with pytest.raises(ValueError, match=r"prefix: 3 prefix embeddings don't reach the function by themselves"):
        lora_jax.adapt(llama.apply)(params, IDS)
    lora_jax.merge(prefix.take(params)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: prefix.init(jax.random.key(0), p, -1), "length: -1 given"),
        (lambda p: prefix.init(jax.random.key(0), p, 2, after=-1), "after: -1 given"),
        (lambda p: prefix.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, 2), "embedding: nothing matches"),
        (
            lambda p: prefix.put({name: {"embedding": jnp.ones((2, 2))} for name in "xy"}, jnp.ones((1, 2))),
            r"embedding: \['x/embedding', 'y/embedding'\] matches, expected one table",
        ),
        (lambda p: prefix.init(jax.random.key(0), prefix.init(jax.random.key(0), p, 2), 2), "have one already"),
        (lambda p: prefix.put(p, jnp.ones((2, 5))), r"shape \(2, 5\) given, expected \(length, 16\)"),
    ],
)
def test_bad_calls(llama, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama.params)


def test_positions_are_refused(llama):
    with pytest.raises(ValueError, match="positions: given, but a prefix makes the input longer"):
        adapt(llama)(adapted(llama), IDS, positions=jnp.arange(7)[None])


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    model, rows, out = tiny_model(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl"), str(tmp_path / "out")
    flags = ["train", "--model", model, "--data", rows, "--output", out, "--max-steps", "2", "--prefix-length"]
    assert main([*flags, "127"]) == 2
    assert "prefix_length: 127 given, expected 0 to 126" in capsys.readouterr().err
    assert main([*flags, "4"]) == 0
    assert "prefix: 4 tokens, 64 parameters" in capsys.readouterr().out
    assert main(["evaluate", "--model", model, "--data", rows, "--adapter", out]) == 0
    assert main(["generate", "--model", model, "--adapter", out, "--prompt", "1 + 1 = ", "--max-tokens", "2"]) == 0
    assert (
        main(["merge", "--model", model, "--adapter", out, "--check", "never", "--output", str(tmp_path / "merged")])
        == 2
    )
    assert "can't be merged into weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "bert_classification", "roberta_masked_lm"])
def test_transformers_reads_the_same_embeddings(name, tmp_path):
    """Against `inputs_embeds`: the prefix's rows put between those that transformers looks up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        torch, oracle = importlib.import_module("torch"), importlib.import_module("golden.make_models")
    write_folder(tmp_path, name, oracle.shapes(name))
    model = models.load(tmp_path)
    after = int(encodes(name))
    rows = np.random.default_rng(1).normal(size=(LENGTH, 32)).astype(np.float32)
    ids = np.random.default_rng(0).integers(3, CASES[name]["vocab_size"], (2, 9))
    scale = 32**0.5 if name == "gemma2" else 1.0  # transformers multiplies as it looks up, so its inputs have it
    references = []
    for dtype in (torch.float32, torch.float64):
        theirs = oracle.read(name, tmp_path, dtype)
        with torch.no_grad():
            own = theirs.get_input_embeddings()(torch.from_numpy(ids))
            new = torch.from_numpy(rows).to(dtype)[None].expand(2, -1, -1) * scale
            output = theirs(inputs_embeds=torch.cat([own[:, :after], new, own[:, after:]], dim=1))[0].numpy()
        drop = np.arange(after, after + LENGTH)
        references.append(np.delete(output, drop, axis=1) if output.ndim == 3 else output)
    ours = prefix.adapt(model.apply)(prefix.put(model.params, rows, after=after), jnp.asarray(ids, jnp.int32))
    assert_agrees(ours, *references)
