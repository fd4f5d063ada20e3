"""Token ids that no table has a row for, and parameters that aren't finite: refused by name, on every road."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import few

import lora_jax
from lora_jax import sweep
from lora_jax._tables import check_ids, vocabulary
from lora_jax.data import Example, LabelledExample
from lora_jax.train import TrainConfig, evaluate, train

TABLE, PLACES = jnp.ones((5, 3)), jnp.ones((9, 3))
CONFIG = TrainConfig(batch_size=2, max_steps=2, learning_rate=1e-2)

LOOKUPS = {
    "index": lambda table, ids: table[ids],
    "take": lambda table, ids: jnp.take(table, ids, axis=0),
    "filled": lambda table, ids: table.at[ids].get(mode="fill"),
    "promised": lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
    "masked": lambda table, ids: table[jnp.where(jnp.arange(4) > 1, ids, 0)],
    "cast": lambda table, ids: table.astype(jnp.bfloat16)[ids[:, ::-1].astype(jnp.uint8)],
    "transposed": lambda table, ids: table.T[:, ids.reshape(-1)],
    "jit": lambda table, ids: jax.jit(lambda t, i: t[i])(table, ids),
    "remat": lambda table, ids: jax.checkpoint(lambda t, i: t[i])(table, ids),
    "loop": lambda table, ids: jax.lax.map(lambda row: table[row], ids),
    "branch": lambda table, ids: jax.lax.cond(table[0, 0] > 0, lambda: table[ids], lambda: 2 * table[ids]),
    "padded": lambda table, ids: (
        table[jnp.where(jnp.pad(ids, ((0, 0), (1, 0))) > 3, 0, 1)] + table[jnp.maximum(ids, 0)][:, :1]
    ),
}
OTHERS = {
    "places": lambda table, ids: table[jnp.arange(ids.shape[1])],
    "places_of_mask": lambda table, ids: table[jnp.cumsum(ids != 0, axis=1)],
    "hashed": lambda table, ids: table[ids % 5],
    "smaller": lambda table, ids: table[jnp.minimum(ids, 4)],
    "shifted": lambda table, ids: table[ids - 3],
    "clip": lambda table, ids: table[jnp.clip(ids, 0, 4)],
    "clip_in_a_loop": lambda table, ids: jax.lax.map(lambda row: table[jnp.clip(row, 0, 4)], ids),
    "made_smaller_by_a_loop": lambda table, ids: table[jax.lax.fori_loop(0, 3, lambda _, ids: ids // 2, ids)],
    "chosen_by_a_branch": lambda table, ids: table[jax.lax.cond(ids.max() < 5, lambda: ids, lambda: 0 * ids)],
    "clamp": lambda table, ids: jax.jit(lambda t, i: t[jax.lax.clamp(0, i, 4)])(table, ids),
    "where": lambda table, ids: table[jnp.where(ids < 5, ids, 0)],
    "where_both": lambda table, ids: jnp.take(table, jnp.where((ids >= 5) | (ids < 0), 4, ids), axis=0),
    "clipped": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "clipped_index": lambda table, ids: table.at[ids].get(mode="clip"),
    "filled": lambda table, ids: table.at[ids].get(mode="fill", fill_value=0),
    "filled_integers": lambda table, ids: table.astype(int).at[ids].get(mode="fill", fill_value=0),
}
RAISED = {
    "maximum": lambda table, ids: table[jnp.maximum(ids, 0)],
    "clip": lambda table, ids: jnp.take(table, jnp.clip(ids, min=0), axis=0),
    "where": lambda table, ids: table[jnp.where(ids < 0, 0, ids)],
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_tables_that_ids_are_looked_up_in(lookup):
    def embed(params, batch):
        return lookup(params["deep"]["table"], batch["input_ids"]), params["places"][batch["attention_mask"]]

    ids = np.ones((2, 4), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids}
    assert vocabulary(embed, {"deep": {"table": TABLE}, "places": PLACES}, batch).rows == {"deep/table": 5}


@pytest.mark.parametrize("lookup", OTHERS.values(), ids=OTHERS)
def test_other_lookups_bound_no_ids(lookup):
    batch = {"input_ids": np.ones((2, 4), np.int32)}
    assert vocabulary(lambda params, batch: lookup(params, batch["input_ids"]), TABLE, batch).rows == {}


@pytest.mark.parametrize("lookup", RAISED.values(), ids=RAISED)
def test_ids_below_zero_that_the_function_sees_to(lookup):
    batch = {"input_ids": np.ones((2, 4), np.int32)}
    both = [lookup, lambda table, ids: lookup(table, ids) + table[ids]]
    limits, unsafe = (
        vocabulary(lambda p, batch, f=f: f(p["a"], batch["input_ids"]), {"a": TABLE}, batch) for f in both
    )
    check_ids([[0, -1, -100]], limits, "row")
    for wrong, rows in ((limits, [0, 5]), (unsafe, [0, -1])):
        with pytest.raises(ValueError, match=f"row 1: token {rows[1]} is beyond a, a table of 5 rows"):
            check_ids([rows], wrong, "row")


def test_a_function_that_can_not_be_traced_bounds_nothing():
    assert vocabulary(lambda params, batch: 1 / 0, TABLE, {"input_ids": np.ones((1, 1), np.int32)}) == ({}, None, False)


def test_negative_ids_are_in_no_table():
    limits = vocabulary(
        lambda params, batch: params[batch["input_ids"]], {"a": TABLE}["a"], {"input_ids": np.ones((1, 2), int)}
    )
    with pytest.raises(ValueError, match="row 1: token -1 is beyond"):
        check_ids([[0, -1]], limits, "row")


# --- the roads -------------------------------------------------------------------------------------------------------


def small(spoilt=None):
    """Parameters of `tiny.small_apply`, with a node."""
    params = tiny.small_init(jax.random.key(0))
    if spoilt is not None:
        params["head"]["kernel"] = params["head"]["kernel"].at[3, 0].set(spoilt)
    return lora_jax.init(jax.random.key(1), params, lora_jax.LoRAConfig(rank=2, alpha=4, targets=("head",)))


def beyond(count=4, token=tiny.VOCABULARY):
    rows = tiny.examples(count)
    last = rows[-1]
    return [*rows[:-1], last._replace(input_ids=np.append(last.input_ids[:-1], np.int32(token)))]


def swept(params, rows, valid=None):
    plain = lora_jax.split(params)[0]
    return sweep.run(tiny.small_apply, plain, [sweep.Point(rank=2, alpha=4, targets=("head",))], rows, valid, CONFIG)


ROADS = {
    "train": lambda params, rows: train(tiny.small_apply, params, rows, config=CONFIG),
    "validation": lambda params, rows: train(tiny.small_apply, params, tiny.examples(4), rows, CONFIG),
    "evaluate": lambda params, rows: evaluate(tiny.small_apply, params, rows, batch_size=2),
    "sweep": swept,
    "sweep_validation": lambda params, rows: swept(params, tiny.examples(4), rows),
}


@pytest.mark.parametrize("road", few(ROADS, ["train", "validation", "evaluate"]))
def test_a_token_beyond_the_embedding_is_refused(road):
    call = ROADS[road]
    with pytest.raises(ValueError, match=r"example 4: token 32 is beyond embed/kernel, a table of 32 rows") as error:
        call(small(), beyond())
    assert len(str(error.value)) < 200
    call(small(), beyond(token=tiny.VOCABULARY - 1))


def test_a_target_that_no_logit_predicts():
    """Where the table has more rows than there are logits, as with tokens that are only read."""

    def apply(params, ids, mask):
        return tiny.small_apply(params, ids, mask)[..., :20]

    rows = [Example(np.array([1, 30, 2], np.int32), np.array([False, False, True]))]
    assert np.isfinite(evaluate(apply, small(), rows).loss)
    rows.append(Example(np.array([1, 30, 20], np.int32), np.array([False, False, True])))
    with pytest.raises(ValueError, match="example 2: token 20 is beyond the model's vocabulary of 20 logits"):
        evaluate(apply, small(), rows)


def test_labelled_rows_are_checked_too():
    def apply(params, ids, mask):
        return tiny.small_apply(params, ids, mask)[:, 0, :2]

    rows = [LabelledExample(np.array([1, token], np.int32), np.int32(token % 2)) for token in (2, 3, 40)]
    with pytest.raises(ValueError, match="example 3: token 40 is beyond embed/kernel, a table of 32 rows"):
        evaluate(apply, small(), rows)


@pytest.mark.parametrize("spoilt", few([np.nan, np.inf], [np.inf]))
def test_a_base_that_is_not_finite_is_named_before_training(spoilt):
    params, rows = small(spoilt), beyond(token=3)
    steps = []
    with pytest.raises(ValueError, match=r"the validation loss is (nan|inf) before training: head/kernel holds nan"):
        train(tiny.small_apply, params, rows, rows, CONFIG, on_log=steps.append)
    assert steps == []
    with pytest.raises(ValueError, match=r"the loss is (nan|inf): head/kernel holds nan or inf"):
        evaluate(tiny.small_apply, params, rows)
    with pytest.raises(
        ValueError, match=r"step 1: the loss of every adapter is (nan|inf): head/kernel of the base holds"
    ):
        swept(params, rows, rows)


def test_a_loss_that_finite_parameters_give():
    def apply(params, ids, mask):
        return tiny.small_apply(params, ids, mask) * jnp.float32(3e38)

    with pytest.raises(ValueError, match=r"the loss is (nan|inf): every parameter is finite, so activations overflow"):
        evaluate(apply, small(), tiny.examples(4))


def test_the_first_leaf_that_is_not_finite():
    tree = {"a": np.ones(2, np.int32), "b": {"c": jnp.array([1.0, -jnp.inf], jnp.bfloat16)}, "d": jnp.array(jnp.nan)}
    apply = lambda params, ids, mask: tiny.small_apply(params["e"], ids, mask) + params["d"]
    with pytest.raises(ValueError, match=r"^the loss is nan: b/c holds nan or inf"):
        evaluate(apply, tree | {"e": small()}, tiny.examples(4))
