"""Generation: against the plain loop over whole forwards, against transformers' own, and its edges.

The model of these tests is random and its tokenizer is the alphabet, so a text is what its letters' tokens are.
"""

import importlib
import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from tokenizers_of import KINDS, metaspace
from transformers import LlamaConfig

import lora_jax
from lora_jax import models
from lora_jax.generate import GenerateConfig, continuation, generate, generate_text

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
EOS = 1
VOCABULARY = len(LETTERS) + 2  # 0 is padding


class Tokenizer:
    """One token a letter."""

    bos_token_id = None
    eos_token_id = EOS

    def __call__(self, text):
        return {"input_ids": [LETTERS.index(letter) + 2 for letter in text]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(LETTERS[i - 2] for i in ids if i > EOS)


class Tokenized(models.Model):
    tokenizer = Tokenizer()  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=EOS,
    )
    drawn = models.init(jax.random.key(0), config)
    return Tokenized(**{name: getattr(drawn, name) for name in drawn.__dataclass_fields__})


@pytest.fixture(scope="module")
def adapted(model):
    """Its tree with an adapter whose B isn't zero."""
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("all-linear",))
    params = lora_jax.init(jax.random.key(1), model.params, config, axes=axes)
    base, adapter = lora_jax.split(params)
    adapter = jax.tree.map(lambda leaf: leaf + 0.2, adapter)
    return lora_jax.combine(base, adapter)


def prompts(*lengths, length=None):
    """Random prompts padded on the left, and their mask."""
    length = length or max(lengths)
    random = np.random.default_rng(0)
    ids, mask = np.zeros((len(lengths), length), np.int32), np.zeros((len(lengths), length), np.int32)
    for row, count in enumerate(lengths):
        if count:
            ids[row, -count:] = random.integers(2, VOCABULARY, count)
            mask[row, -count:] = 1
    return ids, mask


def run(model, params, ids, mask, **settings):
    settings = {"max_tokens": 10, "eos_id": EOS} | settings
    return np.asarray(generate(model.apply, model.init_cache, params, ids, mask, **settings))


def slowly(apply, params, row, max_tokens, eos=(EOS,)):
    """Greedy, one whole forward a token."""
    row, new = list(row), []
    whole = jax.jit(apply)
    while len(new) < max_tokens and not (new and new[-1] in eos):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(row)] = row
        new.append(int(np.argmax(whole(params, jnp.asarray(padded))[0, len(row) - 1])))
        row.append(new[-1])
    return new + [eos[0]] * (max_tokens - len(new))


@pytest.mark.parametrize("with_adapter", few([False, True], [True]))
def test_greedy_is_the_whole_forward_token_by_token(model, adapted, with_adapter):
    params = adapted if with_adapter else model.params
    apply = lora_jax.adapt(model.apply) if with_adapter else model.apply
    ids, mask = prompts(3, 9, 1)
    tokens = run(model, params, ids, mask)
    for row in range(3):
        assert tokens[row].tolist() == slowly(apply, params, ids[row, mask[row] == 1], 10)


@pytest.mark.slow
def test_adapter_and_merged_weights_say_the_same(model, adapted):
    ids, mask = prompts(3, 9, 5)
    tokens = run(model, adapted, ids, mask)
    np.testing.assert_array_equal(tokens, run(model, lora_jax.merge(adapted), ids, mask))
    assert not np.array_equal(tokens, run(model, model.params, ids, mask))


def test_padding_and_company_change_nothing(model):
    ids, mask = prompts(3, 9, 5)
    together = run(model, model.params, ids, mask)
    wide = [np.pad(side, ((0, 0), (4, 0))) for side in (ids, mask)]
    np.testing.assert_array_equal(run(model, model.params, *wide), together)
    np.testing.assert_array_equal(run(model, model.params, ids[:1, -3:], mask[:1, -3:]), together[:1])


def test_a_row_ends_at_any_end_token_and_stays_ended(model):
    ids, mask = prompts(3, 9, 5)
    free = run(model, model.params, ids, mask, eos_id=VOCABULARY + 5)
    ends = [int(free[0, 2]), int(free[1, 4])]
    tokens = run(model, model.params, ids, mask, eos_id=ends)
    for row, expected in zip(tokens, free, strict=True):
        end = next((i for i, token in enumerate(expected) if token in ends), 10)
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert (row[end + 1 :] == ends[0]).all()


@pytest.mark.slow
def test_the_loop_stops_when_all_rows_have_ended(model):
    """Of a call for many tokens in which every row ends at once, the model runs twice: the prompt and one step."""
    ids, mask = prompts(3, 3)
    ids[1] = ids[0]
    first = int(run(model, model.params, ids, mask, max_tokens=1)[0, 0])
    calls = []

    def apply(params, input_ids, attention_mask=None, **keywords):
        jax.debug.callback(lambda: calls.append(1))
        return model.apply(params, input_ids, attention_mask, **keywords)

    tokens = generate(apply, model.init_cache, model.params, ids, mask, max_tokens=40, eos_id=first)
    assert (np.asarray(tokens) == first).all()
    jax.effects_barrier()
    assert len(calls) == 2


def test_an_empty_row_is_passed_over(model):
    ids, mask = prompts(3, 9, 5)
    expected = run(model, model.params, ids, mask)
    ids, mask = (np.pad(side, ((0, 2), (0, 0))) for side in (ids, mask))
    tokens = run(model, model.params, ids, mask)
    np.testing.assert_array_equal(tokens[:3], expected)
    assert (tokens[3:] == EOS).all()


def test_a_token_without_a_row_is_refused(model, adapted):
    ids, mask = prompts(3, 9)
    for token in (VOCABULARY, -1):
        ids[0, -1] = token
        with pytest.raises(
            ValueError, match=rf"prompt 1: token {token} is beyond embed_tokens/embedding, a table of 31 rows"
        ):
            run(model, adapted, ids, mask)
    with pytest.raises(ValueError, match="prompt 2: token 31 is beyond"):
        generate_text(model, adapted, [[3, 4, 5], [VOCABULARY], "abc"], GenerateConfig(max_tokens=2))
    ids[0, :-3] = VOCABULARY  # what the mask covers is nobody's
    ids[0, -1] = 2
    run(model, model.params, ids, mask)


def test_the_table_is_read_once_for_each_model(model, adapted):
    reads = importlib.import_module("lora_jax.generate._loop")._read_limits
    ids, mask = prompts(3, 9)
    run(model, adapted, ids, mask)
    before = reads.cache_info().misses
    run(model, adapted, *prompts(4, 9))
    assert reads.cache_info().misses == before


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "key": jax.random.key(0)}])
def test_logits_that_are_not_finite_are_no_text(model, adapted, settings):
    ids, mask = prompts(3, 9)
    spoilt = jax.tree.map(lambda leaf: leaf, model.params)
    spoilt["norm"]["scale"] = spoilt["norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="logits of the next tokens aren't finite: norm/scale holds nan or inf"):
        run(model, spoilt, ids, mask, **settings)


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_follow_the_softmax(model):
    """Of 4,000 draws of one token, the shares of tokens are near their probabilities, at any temperature and top_p."""
    ids = np.repeat(prompts(5)[0], 4000, axis=0)
    logits = np.asarray(model.apply(model.params, jnp.asarray(ids[:1]))[0, -1], np.float64)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.6), (1.0, 1e-6)):
        settings = {"max_tokens": 1, "temperature": temperature, "top_p": top_p, "key": jax.random.key(3)}
        drawn = run(model, model.params, ids, np.ones_like(ids), **settings)[:, 0]
        expected = np.exp(logits / temperature - np.max(logits / temperature))
        expected /= expected.sum()
        order = np.argsort(-expected)
        inside = order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1]
        kept = np.zeros_like(expected)
        kept[inside] = expected[inside] / expected[inside].sum()
        shares = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
        assert (shares[kept == 0] == 0).all()
        np.testing.assert_allclose(shares, kept, atol=4 * np.sqrt(kept * (1 - kept) / len(drawn)).max())


def test_draws_are_those_of_the_key(model):
    ids, mask = prompts(3, 9)
    one, again, other = (
        run(model, model.params, ids, mask, temperature=1.0, key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(set(one[0].tolist())) > 2  # a step's draw is not the step's before


@pytest.fixture
def compiled(caplog):
    """Gives the number of programs with a loop over tokens that a call compiles."""

    def count(call):
        caplog.clear()
        with jax.log_compiles():
            call()
        return sum("Compiling jit(_generate)" in message for message in caplog.messages)

    return count


def test_settings_that_are_not_in_the_program_compile_nothing(model, compiled):
    ids, mask = prompts(3, 9)

    def generate():
        for seed, temperature in enumerate((1.0, 0.5, 0.7)):
            run(model, model.params, ids, mask, temperature=temperature, key=jax.random.key(seed), max_tokens=11)

    assert compiled(generate) == 1


# --- texts -----------------------------------------------------------------------------------------------------------


TEXTS = ["the cat", "a", "some longer prompt of letters", "dog", "it is.", "x, y"]


@pytest.mark.slow
def test_texts_come_back_in_order_whatever_the_batches(model, adapted):
    config = GenerateConfig(max_tokens=6, batch_size=len(TEXTS))
    together = generate_text(model, adapted, TEXTS, config)
    for size in (1, 4):
        assert generate_text(model, adapted, TEXTS, replace(config, batch_size=size)) == together
    assert generate_text(model, adapted, [], config) == []
    assert generate_text(model, adapted, [Tokenizer()(text)["input_ids"] for text in TEXTS], config) == together
    apply = lora_jax.adapt(model.apply)
    for prompt, text in zip(TEXTS, together, strict=True):
        new = slowly(apply, adapted, Tokenizer()(prompt)["input_ids"], 6)
        end = new.index(EOS) if EOS in new else 6
        assert text == Tokenizer().decode(new[:end], skip_special_tokens=True)


def test_few_programs_for_many_lengths(model, compiled):
    config = GenerateConfig(max_tokens=13, batch_size=2)
    texts = ["a" * length for length in range(1, 16)]
    assert compiled(lambda: generate_text(model, model.params, texts, config)) == 1


def test_half_a_character_in_a_prompt_is_named(model):
    with pytest.raises(ValueError, match=r"^prompt 2: '.*' is half a character"):
        generate_text(model, model.params, ["ab", "\ud83d"], GenerateConfig(max_tokens=4))


def test_an_empty_prompt_starts_from_the_start_token(model):
    config = GenerateConfig(max_tokens=4)
    assert len(generate_text(model, model.params, [""], config)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 given"),
        ({"temperature": -1.0}, "temperature: -1.0 given"),
        ({"temperature": float("nan")}, "temperature: nan given"),
        ({"top_p": 0.0}, "top_p: 0.0 given"),
        ({"top_p": 1.5}, "top_p: 1.5 given"),
        ({"batch_size": 0}, "batch_size: 0 given"),
    ],
)
def test_settings_out_of_range(model, settings, words):
    with pytest.raises(ValueError, match=words):
        GenerateConfig(**settings)
    if "batch_size" not in settings:
        with pytest.raises(ValueError, match=words):
            run(model, model.params, *prompts(3), **settings)


def test_what_can_not_be_generated(model):
    ids, mask = prompts(3, 5)
    with pytest.raises(ValueError, match="needs a key"):
        run(model, model.params, ids, mask, temperature=1.0)
    with pytest.raises(ValueError, match="padded on the right"):
        run(model, model.params, ids[:, ::-1], mask[:, ::-1])
    with pytest.raises(ValueError, match="prompt 2: 60 tokens and max_tokens 5 given, expected at most the model's 64"):
        generate_text(model, model.params, ["a", "a" * 60], GenerateConfig(max_tokens=5))


@pytest.mark.oracle
def test_transformers_generates_the_same(model, adapted, tmp_path):
    """Greedy, batched with padding on the left, to the end token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    merged = lora_jax.merge(adapted)
    models.save(tmp_path / "model", model, merged)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids, mask = prompts(3, 9, 5, 1)
    expected = theirs.generate(
        input_ids=torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=EOS,
        eos_token_id=EOS,
    ).numpy()[:, ids.shape[1] :]
    tokens = run(model, merged, ids, mask, max_tokens=20)
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)


# --- tokenizers and end tokens of a folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_is_what_follows_in_the_text(kind):
    tokenizer = KINDS[kind]()
    for before, after in (("ab(", "ab)"), ("a:", " yes"), ("a: yes", "yes"), ("", "yes"), ("é", "è 🙂")):
        given, whole = (tokenizer(text)["input_ids"] for text in (before, before + after))
        assert continuation(tokenizer, given, whole[len(given) :]) == after or given != whole[: len(given)]
    ids = tokenizer("a🙂 b")["input_ids"]
    cut = next(i for i in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[:i]))
    assert continuation(tokenizer, ids[:cut], [*ids[cut:], tokenizer.eos_token_id]) == "🙂 b"


@pytest.fixture(scope="module")
def spaced():
    """A model that ends at 2, and a tokenizer that puts a space before any text."""
    tokenizer = metaspace("first")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=2,
    )
    return models.init(jax.random.key(0), config), tokenizer


@pytest.fixture
def folder(spaced, tmp_path):
    """Theirs."""
    drawn, tokenizer = spaced
    models.save(tmp_path / "model", drawn, drawn.params, tokenizer=tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize(("given", "ends"), [(None, (2,)), (7, (2, 7)), ([7, 2, 9, -1, 10**6], (2, 7, 9))])
def test_end_tokens_of_all_files(folder, given, ends):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "temperature": 0.6}))
    assert models.load_abstract(folder).end_tokens == ends


def test_a_text_of_a_folders_model(folder):
    """It is what follows in the text, up to any of the folder's end tokens."""
    model = models.load(folder)
    ids = model.tokenizer("ab(")["input_ids"]
    free = run(model, model.params, np.array([ids]), np.ones((1, len(ids))), max_tokens=12, eos_id=2)[0].tolist()
    stop = next(token for place, token in enumerate(free) if place >= 3 and token not in free[:place])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    (text,) = generate_text(models.load(folder), model.params, ["ab("], GenerateConfig(max_tokens=12))
    expected = model.tokenizer.decode([*ids, *free[: free.index(stop)]], skip_special_tokens=True)
    assert "ab(" + text == expected


def test_a_saved_model_keeps_its_end_tokens(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model = models.load(folder)
    for name, more in {"own": {}, "given": {"tokenizer": metaspace("first")}}.items():
        models.save(tmp_path / name, model, model.params, **more)
        assert models.load_abstract(tmp_path / name).end_tokens == (2, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"eos_token_id": "</s>"}', "eos_token_id </s> given, expected a token id or a list of them"),
        ('{"eos_token_id": [2, true]}', r"eos_token_id \[2, True\] given"),
        (" " * (2**20 + 1), "1,048,577 bytes, expected at most 1,048,576"),
    ],
)
def test_a_damaged_generation_config(folder, text, words):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"generation_config.json: {words}"):
        _ = models.load_abstract(folder).end_tokens
