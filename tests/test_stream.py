"""Streams of tokens and text: against generation in one program, and what ends a piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from test_cli import tiny_model
from tokenizers_of import CHAT, KINDS, byte_level
from transformers import LlamaConfig

import lora_jax
from lora_jax import data, models
from lora_jax.generate import GenerateConfig, chat_prompt, generate, generate_text, stream, stream_text

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "key": jax.random.key(4)}
QUESTION = [{"role": "user", "content": "a yes?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer has a token for each byte."""
    return models.load(tiny_model(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def adapted(model):
    """Its tree with an adapter whose B isn't zero, and a prefix."""
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("all-linear",))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    params = lora_jax.combine(base, jax.tree.map(lambda leaf: leaf + 0.03, adapter))
    return lora_jax.prefix.init(jax.random.key(2), params, 3)


def prompts(*lengths):
    """Random prompts padded on the left, and their mask."""
    ids, mask = np.zeros((2, len(lengths), max(lengths)), np.int32)
    for row, count in enumerate(lengths):
        ids[row, -count:] = np.random.default_rng(row).integers(2, 258, count)
        mask[row, -count:] = 1
    return ids, mask


@pytest.mark.parametrize("sampled", few([False, True], [True]))
def test_a_stream_has_the_tokens_of_one_program(model, adapted, sampled):
    settings = SAMPLED if sampled else {}
    call = (model.apply, model.init_cache, adapted, *prompts(3, 9))
    whole = np.asarray(generate(*call, max_tokens=20, eos_id=-1, **settings))
    ends = [
        next(int(row[place]) for place in range(least, 20) if row[place] not in whole[:, :least])
        for row, least in zip(whole, (5, 9), strict=True)
    ]
    whole = np.asarray(generate(*call, max_tokens=20, eos_id=ends, **settings))
    parts = list(stream(*call, max_tokens=20, eos_id=ends, **settings))
    streamed = np.concatenate(parts, axis=1)
    assert len(parts) > 1
    np.testing.assert_array_equal(streamed, whole[:, : streamed.shape[1]])
    assert (whole[:, streamed.shape[1] :] == ends[0]).all()
    assert np.isin(whole[:, streamed.shape[1] - 1], ends).all()


def test_a_streams_mistakes_are_those_of_one_program(model):
    spoilt = jax.tree.map(lambda leaf: leaf, model.params)
    spoilt["norm"]["scale"] = spoilt["norm"]["scale"].at[0].set(jnp.nan)
    parts = stream(model.apply, model.init_cache, spoilt, *prompts(3), max_tokens=4, eos_id=1)
    with pytest.raises(ValueError, match="aren't finite: norm/scale holds nan or inf"):
        next(parts)
    for settings, words in (({"temperature": 1.0}, "needs a key"), ({"max_tokens": 0}, "max_tokens: 0 given")):
        with pytest.raises(ValueError, match=words):
            stream(
                model.apply, model.init_cache, model.params, *prompts(3), **{"max_tokens": 4, "eos_id": 1} | settings
            )
    with pytest.raises(ValueError, match="prompt 1: 130 tokens and max_tokens 4 given"):
        stream_text(model, model.params, "a" * 130, GenerateConfig(max_tokens=4))


@pytest.mark.parametrize("temperature", few([0.0, 1.5], [1.5]))
def test_pieces_are_the_text(model, temperature):
    """Random bytes are seldom characters, so many pieces wait for others."""
    config = GenerateConfig(max_tokens=30, temperature=temperature)
    pieces = list(stream_text(model, model.params, "aé", config, key=jax.random.key(3)))
    assert all(pieces)
    assert "".join(pieces) == generate_text(model, model.params, ["aé"], config, key=jax.random.key(3))[0]


class Scripted:
    """A model that says a text, whatever it is asked: the next token is the one after the last in a list."""

    end_tokens = ()
    max_length = 512

    def __init__(self, tokenizer, before, said):
        whole = tokenizer(before + said)["input_ids"]
        self.tokenizer, self.script = tokenizer, jnp.asarray([*whole, tokenizer.eos_token_id])
        self.start = len(tokenizer(before)["input_ids"])
        self.params = {"rows": jnp.zeros((len(tokenizer), 2))}

    def init_cache(self, batch, length):
        return jnp.int32(0)

    def apply(self, params, input_ids, attention_mask=None, *, cache):
        place = cache + (0 if attention_mask is None else attention_mask.sum()) + (attention_mask is None)
        logits = jax.nn.one_hot(self.script[place], len(self.tokenizer))
        return jnp.broadcast_to(logits, (*input_ids.shape, len(self.tokenizer))) + params["rows"][0, 0], place


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_has_a_part_of_a_character(kind):
    """Of letters that tokenizers divide into bytes, and of spaces that they leave out at the start of a text."""
    tokenizer, said = KINDS[kind](), " yes ab 🙂é→ ab\n🙂"
    model = Scripted(tokenizer, "a:", said)
    pieces = list(stream_text(model, model.params, "a:", GenerateConfig(max_tokens=80)))
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1


def test_bytes_without_an_end_come_last():
    tokenizer = byte_level()
    model = Scripted(tokenizer, "yes", "b🙂")
    model.script = jnp.concatenate([model.script[:-2], model.script[-1:]])
    assert "".join(stream_text(model, model.params, "yes", GenerateConfig(max_tokens=20))) == "b\ufffd"


def test_turns_of_a_chat_compile_nothing_new(model):
    """Prompts of 1 to 64 tokens are padded to 64."""
    config, begin = GenerateConfig(max_tokens=3), lora_jax.generate._loop._begin
    list(stream_text(model, model.params, "a", config))
    before = begin._cache_size()
    list(stream_text(model, model.params, "a" * 64, config))
    assert begin._cache_size() == before


# --- prompts of conversations ----------------------------------------------------------------------------------------


def test_a_rendered_prompt_has_one_start_token(model):
    """In training and in generation, as a text, as a prompt, and as messages."""
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    ids = chat_prompt(tokenizer, QUESTION)
    text = data.render_chat(QUESTION, tokenizer, add_generation_prompt=True)
    assert text.startswith("<s>")
    assert ids.count(tokenizer.bos_token_id) == 1
    answer = {"role": "assistant", "content": "yes"}
    rows = [[data.Chat((*QUESTION, answer))], [data.Completion(text, "yes")], [data.Text(text + "yes")]]
    for row in rows:
        (example,) = data.encode(row, tokenizer, 64).examples
        assert example.input_ids[: len(ids)].tolist() == ids
    scripted = Scripted(tokenizer, text, "yes")
    scripted.script = jnp.asarray([*ids, *tokenizer("yes", add_special_tokens=False)["input_ids"], 2])
    for prompt in (text, ids):
        assert "".join(stream_text(scripted, scripted.params, prompt, GenerateConfig(max_tokens=5))) == "yes"


def test_a_prompt_of_messages_is_the_beginning_of_the_training_row():
    tokenizer = KINDS["metaspace"]()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    tools = ({"name": "add"},)
    ids = chat_prompt(tokenizer, QUESTION, tools)
    (example,) = data.encode([data.Chat((*QUESTION, {"role": "assistant", "content": "yes"}), tools)], tokenizer, 99)[0]
    assert example.input_ids[: len(ids)].tolist() == ids
    assert example.targets.argmax() == len(ids)
    assert "add" in tokenizer.decode(ids)


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match=r"no chat template.*--chat-template FILE"):
        chat_prompt(byte_level(), QUESTION)


@pytest.mark.slow
def test_a_small_llama_streams_on_a_mesh():
    """The parts of a model's cache are on the devices that its rules say, and stay there."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = models.init(jax.random.key(0), LlamaConfig(vocab_size=32, initializer_range=0.3, **sizes))
    mesh = jax.make_mesh((2,), ("model",))
    spread = model.on_mesh(mesh)
    params = jax.device_put(model.params, models.shardings(spread))
    ids, mask = prompts(3)
    call = {"input_ids": ids % 32, "attention_mask": mask, "max_tokens": 6, "eos_id": -1}
    parts = list(stream(spread.apply, spread.init_cache, params, **call))
    whole = generate(model.apply, model.init_cache, model.params, **call)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.asarray(whole))
