"""New tokens: rows of tables that train beside frozen ones, a vocabulary that grows, and folders that PEFT loads."""

import functools
import importlib
import json
import operator
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from peft_cases import Case
from public_trees import attach
from test_cli import tiny_model, tiny_tokenizer, write_rows
from test_cli_labels import call
from test_peft_reference import llama, oracle
from transformers import AutoTokenizer, BertConfig

import lora_jax
from lora_jax import checkpoint, models, peft
from lora_jax.checkpoint import Checkpoints, TrainState
from lora_jax.cli import _new_tokens, _run_file, main, train

EMBEDDING, HEAD = "embed_tokens/embedding", "lm_head/kernel"
ROWS = (9, 2)


def at(tree: Any, path: str) -> Any:
    return functools.reduce(operator.getitem, path.split("/"), tree)


def by_token(path, table):
    return table.T if path == HEAD else table


def moved(params):
    base, adapter = lora_jax.split(params)
    leaves, treedef = jax.tree.flatten(adapter)
    more = [0.3 * jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
    return lora_jax.combine(base, jax.tree.map(jnp.add, adapter, treedef.unflatten(more)))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_train_and_the_others_stay(tied):
    rng = np.random.default_rng(0)
    shapes = {EMBEDDING: (11, 6), "mix/kernel": (6, 6), HEAD: (6, 11)}
    plain = models.unflatten({path: jnp.asarray(rng.normal(size=x), jnp.float32) for path, x in shapes.items()})
    tables, ids = ([EMBEDDING] if tied else [EMBEDDING, HEAD]), jnp.array([[1, 9, 3, 2, 9]])

    def model(p, ids):
        table = p["embed_tokens"]["embedding"]
        return jnp.tanh(table[ids] @ p["mix"]["kernel"]) @ (table.T if tied else p["lm_head"]["kernel"])

    params = lora_jax.init(jax.random.key(1), plain, lora_jax.LoRAConfig(rank=2, alpha=4, targets=("mix",)))
    params = lora_jax.init_rows(params, dict.fromkeys(tables, ROWS))
    base, adapter = lora_jax.split(params)
    assert jax.tree.structure(lora_jax.combine(base, adapter)) == jax.tree.structure(params)
    counts = {row.path: row.trainable for row in lora_jax.describe(params).rows}
    assert counts == dict.fromkeys(tables, 2 * 6) | {"mix/kernel": 2 * 2 * 6}
    apply = lora_jax.adapt(model, dropout=0.5, on_materialize="error")

    @jax.jit
    def values(adapter, plain):
        def loss(apply, params):
            logits = apply(params, ids)
            return jnp.square(logits).sum(), logits

        ours, at_start = jax.grad(lambda a: loss(apply, lora_jax.combine(base, a)), has_aux=True)(adapter)
        theirs, logits = jax.grad(lambda p: loss(model, p), has_aux=True)(plain)
        dropped = apply(lora_jax.combine(base, adapter), ids, dropout_key=jax.random.key(3))  # B is zero
        more = moved(lora_jax.combine(base, adapter))
        return (at_start, dropped, logits), ours, theirs, more, lora_jax.merge(more)

    (at_start, dropped, logits), ours, theirs, more, merged = jax.tree.map(np.asarray, values(adapter, plain))
    np.testing.assert_allclose(at_start, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dropped, logits, rtol=1e-5, atol=1e-6)
    others = [row for row in range(11) if row not in ROWS]
    for path in tables:
        gradient = by_token(path, at(theirs, path))[list(ROWS)]
        np.testing.assert_allclose(at(ours, f"{path}_rows").value, gradient, rtol=1e-4, atol=1e-5)
        after, before = by_token(path, at(merged, path)), by_token(path, np.asarray(at(plain, path)))
        np.testing.assert_array_equal(after[list(ROWS)], at(more, f"{path}_rows").value)
        np.testing.assert_array_equal(after[others], before[others])


def test_rows_that_cannot_train_are_told():
    params = {"embedding": jnp.ones((5, 3)), "kernel": jnp.ones((3, 5)), "bias": jnp.ones(3)}
    for rows, line in (
        ({"wte": [1]}, "wte: no such leaf, expected a table such as embedding"),
        ({"bias": [1]}, "bias: has shape"),
        ({"embedding": [5]}, r"embedding: rows \(5,\) given, expected some of 0 to 4, each once"),
        ({"kernel": [1, 1]}, "kernel: rows"),
    ):
        with pytest.raises(ValueError, match=line):
            lora_jax.init_rows(params, rows)
    with_rows = lora_jax.init_rows(params, {"embedding": [1]})
    with pytest.raises(ValueError, match="embedding: is adapted, quantized or trained already"):
        lora_jax.init_rows(with_rows, {"embedding": [2]})
    with pytest.raises(ValueError, match="embedding: some of its rows train"):
        lora_jax.unmerge(lora_jax.merge(with_rows), lora_jax.split(with_rows)[1])
    both = lora_jax.init(jax.random.key(0), with_rows, lora_jax.LoRAConfig(rank=1, alpha=1, targets=("embedding",)))
    with pytest.raises(ValueError, match="embedding: its trained rows are here, with a LoRA node as well"):
        lora_jax.merge(both)


def test_a_checkpoint_holds_rows(tmp_path):
    params = lora_jax.init_rows({"head": {"kernel": jnp.ones((3, 5), jnp.bfloat16)}}, {"head/kernel": [4, 0]})
    adapter = lora_jax.split(params)[1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(adapter, (), jax.random.key(0), 7, {}, "f", {}))
    node = checkpoint.load_adapter(tmp_path).adapter["head"]["kernel_rows"]
    assert (node.rows, node.axis, node.dtype, node.value.shape) == ((4, 0), 1, "bfloat16", (2, 3))


# The vocabulary -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_rows_are_near_the_mean(tmp_path):
    folder = tiny_model(tmp_path / "model")  # 258 rows, as many as the tokenizer has
    model = models.load(folder)
    added, rows = models.add_tokens(model, ["<tool>", "</tool>"], key=jax.random.key(3))
    assert rows == {EMBEDDING: (258, 259), HEAD: (258, 259)}
    assert added.tokenizer("a<tool>b</tool>")["input_ids"][1::2] == [258, 259]
    assert (len(added.tokenizer), len(model.tokenizer), added.config.vocab_size) == (260, 258, 260)
    for path in rows:
        old, new = (np.asarray(by_token(path, at(m.params, path))) for m in (model, added))
        np.testing.assert_array_equal(new[:258], old)
        np.testing.assert_allclose(new[258:], np.tile(old.mean(0), (2, 1)), atol=1e-4)
    assert added.apply(added.params, jnp.array([[259]])).shape == (1, 1, 260)
    # Of these 260 rows two are spare for a tokenizer of 258 tokens, and three tokens need one more.
    padded = replace(added, new_tokenizer=model.tokenizer)
    again, rows = models.add_tokens(padded, ["<a>", "<b>", "<c>"], key=jax.random.key(4))
    assert (rows[HEAD], again.config.vocab_size) == ((258, 259, 260), 261)
    np.testing.assert_allclose(np.asarray(at(again.params, HEAD))[:, 258:].T, np.tile(old.mean(0), (3, 1)), atol=1e-4)
    resized = models.resize_token_embeddings(models.load_abstract(folder), 300, key=jax.random.key(0))
    streamed = models.resize_token_embeddings(models.load_streamed(folder), 260, key=jax.random.key(0))
    assert at(resized.params, HEAD).shape == (16, 300)
    assert np.asarray(at(streamed.params, EMBEDDING))[:258].shape == (258, 16)
    assert at(models.resize_token_embeddings(model, 9, key=jax.random.key(0)).params, HEAD).shape == (16, 9)


def test_new_rows_have_the_spread_of_the_old_ones(tmp_path):
    model, rng = models.load(tiny_model(tmp_path / "model")), np.random.default_rng(0)
    old = (rng.normal(size=(258, 4)) @ rng.normal(size=(4, 16))).astype(np.float32)
    model = replace(model, params=attach(model.params, {}, {EMBEDDING: jnp.asarray(old)}))
    grown = models.resize_token_embeddings(model, 6_000, key=jax.random.key(3))
    new = np.asarray(at(grown.params, EMBEDDING))[258:]
    found, expected = np.cov((new - old.mean(0)).T) * 1e9, np.cov(old.T, bias=True)
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


def test_tokens_that_cannot_be_added(tmp_path):
    model = models.load(tiny_model(tmp_path / "model"))
    for tokens, line in (
        ([], "tokens: \\[\\] given, expected a list"),
        (["<x>", "<x>"], "tokens: '<x>' is given twice"),
        (["<x>", "a"], "tokens: 'a' is in the tokenizer already, as token"),
    ):
        with pytest.raises(ValueError, match=line):
            models.add_tokens(model, tokens, key=jax.random.key(0))
    layers: Any = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=11, architectures=["BertForMaskedLM"], max_position_embeddings=16, **layers)
    masked = replace(models.init(jax.random.key(0), config), new_tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="bias: has an entry for each token too"):
        models.add_tokens(masked, ["<x>"], key=jax.random.key(0))
    path = tmp_path / "tokens"
    for text, line in (("\n \n", "is empty, expected one token a line"), ("[1]", "expected a JSON list of texts")):
        path.write_text(text)
        with pytest.raises(ValueError, match=line):
            _new_tokens.read(path)
    for text, tokens in (('["a b", " c"]', ["a b", " c"]), ("[INST]\n[/INST]\n", ["[INST]", "[/INST]"])):
        path.write_text(text)
        assert _new_tokens.read(path) == tokens


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_no_run_has_written_stays(tmp_path):
    """The output folder may be the model's own."""
    (tmp_path / "tokens.txt").write_text("<tool>\n")
    tiny_tokenizer().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for content in (None, "rank: 8\n", "add_tokens: null\n"):
        if content is not None:
            (tmp_path / "run.yaml").write_text(content)
        _new_tokens.remove_earlier(tmp_path)
        assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
        with pytest.raises(FileExistsError, match="has a tokenizer, which no run with --add-tokens or "):
            _new_tokens.check(tmp_path / "tokens.txt", tmp_path)
    (tmp_path / "run.yaml").write_text("add_tokens: tokens.txt\n")
    _new_tokens.check(tmp_path / "tokens.txt", tmp_path)
    _new_tokens.remove_earlier(tmp_path)
    assert models.tokenizer_in(tmp_path) == ""


def test_a_copied_tokenizer_is_known_where_its_adapter_has_moved(tmp_path):
    """By the note in run.yaml; the files of runs before there was one name the adapter, which must be there then."""
    first, on, other = (tmp_path / name for name in ("first", "on", "other"))
    config = {"peft_type": "LORA", "trainable_token_indices": {"model.embed_tokens": [258]}}
    first.mkdir()
    (first / "adapter_config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(first)
    for folder in (on, other):
        _new_tokens.copy_of_adapter(first, folder)
    _run_file.write(on, train.Settings(from_adapter=first), _new_tokens.notes(first))
    _run_file.write(other, train.Settings(from_adapter=first))
    _new_tokens.check_replaced(other)
    first.rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match="has a tokenizer"):
        _new_tokens.check_replaced(other)
    _new_tokens.check_replaced(on)
    tokenizer = (on / "tokenizer.json").read_bytes()
    (on / "tokenizer.json").write_bytes(tokenizer + b" ")
    with pytest.raises(FileExistsError, match="has a tokenizer, which no run with --add-tokens or --from-adapter"):
        _new_tokens.check_replaced(on)
    _new_tokens.remove_earlier(on)
    assert models.tokenizer_in(on) == "tokenizer"
    (on / "tokenizer.json").write_bytes(tokenizer)
    _new_tokens.remove_earlier(on)
    assert models.tokenizer_in(on) == ""


def test_a_run_that_ends_while_it_writes_leaves_no_part_of_a_tokenizer(tmp_path, monkeypatch):
    out, moved_to, replace_file = tmp_path / "out", [], os.replace
    out.mkdir()

    class Ends(Exception):
        pass

    class Ending:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text('{"version"')
            raise Ends

    with pytest.raises(Ends):
        models.save_tokenizer(out, Ending())
    assert list(out.iterdir()) == []
    monkeypatch.setattr(os, "replace", lambda old, new: (moved_to.append(new.name), replace_file(old, new)))
    models.save_tokenizer(out, tiny_tokenizer())
    models.copy_tokenizer(out, tmp_path)
    assert moved_to == ["tokenizer_config.json", "tokenizer.json"] * 2  # without the last of them there is no tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]


@pytest.mark.slow
def test_a_run_with_new_tokens_and_the_commands_after_it(tmp_path, capsys):
    model, data = tiny_model(tmp_path / "model", tie_word_embeddings=True), write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "tokens.txt").write_text("<tool>\n1 + 1\n")
    out, words = tmp_path / "out", ["--model", model, "--data", data, "--report-to", "none", "--max-steps", 2]
    words += ["--learning-rate", 0.1, "--save-steps", 1, "--output", out]
    said = call("train", *words, "--add-tokens", tmp_path / "tokens.txt")
    assert "new tokens: 2, the vocabulary has 260 rows, it had 258" in said
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [258, 259]}
    assert AutoTokenizer.from_pretrained(out)("<tool>")["input_ids"] == [258]

    assert "`model.resize_token_embeddings(260)` first" in (out / "README.md").read_text()
    call("merge", "--adapter", out, "--output", tmp_path / "merged", "--check", "never")
    call("export", "--checkpoint", out, "--output", tmp_path / "exported")
    merged, base = models.load(tmp_path / "merged"), models.load(model)
    assert (merged.config.vocab_size, len(merged.tokenizer)) == (260, 260)
    grown = models.resize_token_embeddings(base, 260, key=jax.random.key(9))
    expected = models.flatten(merged.params)
    for folder in (out, tmp_path / "exported"):
        params = lora_jax.merge(peft.load(folder, grown.params, names=grown.names))
        for path, leaf in models.flatten(params).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7)
        assert AutoTokenizer.from_pretrained(folder)("<tool>")["input_ids"] == [258]
    start = np.asarray(at(base.params, EMBEDDING))
    np.testing.assert_array_equal(np.asarray(at(merged.params, EMBEDDING))[:258], start)
    with pytest.raises(ValueError, match=r"has only 258 rows; for tokens that were added, models.resize_token_embe"):
        peft.load(out, base.params, names=base.names)
    call("train", *words, "--overwrite")
    assert models.tokenizer_in(out) == ""
    capsys.readouterr()
    (tmp_path / "tokens.txt").write_text("a\n")
    assert main([str(word) for word in ["train", *words, "--overwrite", "--add-tokens", tmp_path / "tokens.txt"]]) == 2
    assert "tokens.txt: tokens: 'a' is in the tokenizer already" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_the_rows_beside_a_resized_base(tied, tmp_path):
    """A folder of ours has the new rows alone; PEFT's own has the tables too, and both are the same function."""
    make, reference = oracle(), importlib.import_module("peft")
    torch = importlib.import_module("torch")
    case = Case(model={"tie_word_embeddings": tied}, lora={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]})
    size = llama(case).config.vocab_size
    rows, ids = (size, size + 1), np.array([[1, size, 3, size + 1, 2, size]])
    grown = models.resize_token_embeddings(llama(case), size + 2, key=jax.random.key(1))
    config = lora_jax.LoRAConfig(rank=2, alpha=3, targets=("q_proj",))
    axes = lora_jax.kernel_axes(grown.apply, grown.params, jnp.asarray(ids))
    params = lora_jax.init(jax.random.key(2), grown.params, config, axes=axes)
    tables = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    params = moved(lora_jax.init_rows(params, dict.fromkeys(tables, rows)))
    apply = lora_jax.adapt(grown.apply, on_materialize="error")
    peft.save(tmp_path / "ours", params, names=grown.names, base_model=tmp_path / "base")
    make.base_model(case).save_pretrained(tmp_path / "base")

    base = make.base_model(case)
    base.resize_token_embeddings(size + 2)  # with rows of its own, which the adapter's replace
    theirs = reference.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        logits = [m(torch.from_numpy(ids)).logits.numpy() for m in (theirs, make.in_double(theirs))]
    assert_agrees(np.asarray(apply(params, jnp.asarray(ids))), *logits)

    theirs.float().save_pretrained(tmp_path / "theirs")  # it sees that the vocabulary has grown
    assert (tmp_path / "theirs" / "adapter_model.safetensors").stat().st_size > (
        tmp_path / "ours" / "adapter_model.safetensors"
    ).stat().st_size
    other = models.resize_token_embeddings(llama(case), size + 2, key=jax.random.key(5))
    for folder in ("ours", "theirs"):
        again = peft.load(tmp_path / folder, other.params, names=other.names)
        assert_agrees(np.asarray(apply(again, jnp.asarray(ids))), *logits)
