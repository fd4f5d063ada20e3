"""Arguments of the wrong kind: each is answered in one line that names it."""

import jax.numpy as jnp
import numpy as np
import pytest
from peft_trees import EMBEDDING, NAMES, adapted, base, config_in

import lora_jax
from lora_jax import peft


class Model:
    """As `models.Model` has them."""

    params, names = base(), NAMES


GOOD = {"names": NAMES}
LOADED = {
    "a folder": ((None, base()), GOOD, r"^folder: None given, expected the path of an adapter's folder$"),
    "a number": ((3, base()), GOOD, r"^folder: 3 given"),
    "an empty folder": (("", base()), GOOD, r"^folder: '' given"),
    "a model": (("a", Model()), GOOD, r"^params: a Model given, expected a tree of parameters: give its params$"),
    "no tree": (("a", None), GOOD, r"^params: None given, expected a tree of parameters$"),
    "an array": (("a", jnp.ones(3)), GOOD, r"^params: a ArrayImpl given, expected a tree"),
    "a function": (("a", adapted), GOOD, r"^params: a function given, expected a tree"),
    "no names": (("a", base()), {"names": None}, r"^names: None given, expected leaf paths .*, as model\.names$"),
    "a model's names": (
        ("a", base()),
        {"names": Model()},
        r"^names: a Model given, .*: give its names$",
    ),
    "a list of names": (("a", base()), {"names": ["q"]}, r"^names: \['q'\] given"),
    "bare names": (("a", base()), {"names": {"q": "model.q"}}, r"^names: 'q': 'model.q' given, .* a models\.Weight\("),
    "axes": (
        ("a", base()),
        GOOD | {"axes": lora_jax.kernel_axes},
        r"^axes: a function given, .*kernel_axes",
    ),
}
SAVED = {name: case for name, case in LOADED.items() if name != "axes"} | {
    "a pattern": (("a", adapted()), GOOD | {"also_train": 3}, r"^also_train: 3 given, expected patterns of leaves"),
    "patterns": (("a", adapted()), GOOD | {"also_train": [3]}, r"^also_train: \[3\] given"),
    "no patterns": (("a", adapted()), GOOD | {"also_train": None}, r"^also_train: None given"),
    "tokens": (("a", adapted()), GOOD | {"tokens": [1]}, r"^tokens: \[1\] given, expected row numbers by the path"),
    "rows": (
        ("a", adapted()),
        GOOD | {"tokens": {EMBEDDING: 1}},
        r"^tokens: 'embed/embedding': 1 given, .* a list",
    ),
    "half rows": (("a", adapted()), GOOD | {"tokens": {EMBEDDING: [1.5]}}, r"\[1\.5\] given"),
    "base": (("a", adapted()), GOOD | {"base_model": 3}, r"^base_model: 3 given, expected a string$"),
    "task": (("a", adapted()), GOOD | {"task_type": ["CAUSAL_LM"]}, r"^task_type: \['CAUSAL_LM'\] given"),
}


@pytest.mark.parametrize("case", LOADED)
def test_load_says_which_argument_is_wrong(case):
    positional, named, message = LOADED[case]
    with pytest.raises(ValueError, match=message) as caught:
        peft.load(*positional, **named)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("case", SAVED)
def test_save_says_which_argument_is_wrong(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    positional, named, message = SAVED[case]
    with pytest.raises(ValueError, match=message) as caught:
        peft.save(*positional, **named)
    assert len(str(caught.value)) < 200
    assert not any(tmp_path.iterdir())


def test_updates_says_which_argument_is_wrong():
    with pytest.raises(ValueError, match=r"^folder: None given"):
        peft.updates(None)


def test_a_path_names_the_base_and_an_array_the_rows(tmp_path):
    peft.save(tmp_path / "a", adapted(), names=NAMES, base_model=tmp_path, tokens={EMBEDDING: np.array([3, 1])})
    config = config_in(tmp_path / "a")
    assert config["base_model_name_or_path"] == str(tmp_path)
    assert config["trainable_token_indices"] == {"model.embed": [3, 1]}
