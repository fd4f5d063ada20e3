"""Faults of what a run trains on: packed rows, mixtures, preferences, schedules."""

from mutants.mutant import Mutant, tests_in

PACKED = [
    Mutant(
        "models/_attention.py",
        "    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))",
        "    begins = jnp.zeros(segment_ids.shape, bool)",
        "positions go on from one document of a row to the next",
        "--slow tests/test_packed_attention.py::test_packed_is_unpacked[xla-gpt2]",
    ),
    Mutant(
        "models/_kernels.py",
        "            allowed = allowed & (own[:, None, :, None] == segments[:, None, None, :])",
        "            pass",
        "a document attends to those before it in its row",
        tests_in("packed_attention", "losses_are_those_of_the_documents"),
    ),
    Mutant(
        "data/_pack.py",
        "np.asarray(example.targets, bool) & ~first}",
        "np.asarray(example.targets, bool)}",
        "a document's first token is predicted from the document before it",
        tests_in("packing", "a_pass_has_each_document_once_and_whole", "losses_are_those_of_the_rows"),
    ),
    Mutant(
        "data/_mixture.py",
        "    return grain.MapDataset.mix(parts, examples.weights)",
        "    return grain.MapDataset.mix(parts)",
        "sets are mixed evenly, whatever their weights",
        tests_in("stream_data", "shares_by_weight"),
    ),
]

PREFERENCES = [
    Mutant(
        "train/_dpo.py",
        '    ratios = answer_log_probs(outputs, batch) - batch["reference"]',
        "    ratios = answer_log_probs(outputs, batch)",
        "rewards aren't relative to the reference",
        tests_in("dpo_reference", "losses_gradients_and_metrics_are_trls"),
    ),
    Mutant(
        "train/_dpo.py",
        "    weights = following(weights)",
        "    weights = weights[:, :-1]",
        "a token's weight is that of the token before it",
        tests_in("dpo_reference", "losses_gradients_and_metrics_are_trls"),
    ),
    Mutant(
        "train/_dpo.py",
        "        losses = (1 - label_smoothing) * right + label_smoothing * wrong",
        "        losses = right",
        "label smoothing does nothing",
        tests_in("dpo", "losses_are_those_of_the_formulas"),
    ),
    Mutant(
        "train/_reference.py",
        "    kept = {path: node for path, node in nodes.items() if moves[path]}",
        "    kept = {}",
        "an adapter that a run goes on from isn't in the reference",
        tests_in("dpo", "the_reference_is_the_model_at_the_start"),
    ),
    Mutant(
        "train/_reference.py",
        "    kept, leaves = jax.tree.map(jnp.array, (kept, leaves))",
        "    pass",
        "the reference's leaves are those that the steps donate",
        tests_in("dpo", "the_reference_is_the_model_at_the_start"),
    ),
]

SCHEDULES = [
    Mutant(
        "train/_schedule.py",
        'jnp.sqrt(1 + step / given.get("timescale", warmup or 10_000))',
        'jnp.sqrt(1 + step / given.get("timescale", 10_000))',
        "inverse_sqrt falls as if there were no warm-up",
        tests_in("schedules", "rates_after_warmup"),
    ),
    Mutant(
        "train/_schedule.py",
        '_fall("cosine", (turns * step / steps) % 1)',
        '_fall("cosine", turns * step / steps)',
        "a cosine doesn't restart",
        tests_in("schedules", "rates_after_warmup"),
    ),
]
