"""One-line faults that the tests must find, a module of the core at a time; `make mutants` applies each by itself.

A fault is known by the text that it replaces, so that the list survives code that moves. None is equivalent: each gives
another number, another refusal or another program for somebody, as its reason says. `mutate.py` runs the tests.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
      file: Where the text was last seen, below `lora_jax/`; where it isn't there, the whole package is searched.
      old: Text of (a part of) one line, in the package once.
      new: What takes its place.
      why: What goes wrong.
      tests: The tests of which one fails, by their pytest identifiers, separated by spaces.
    """

    file: str
    old: str
    new: str
    why: str
    tests: str


def _forward(*names: str) -> str:
    return " ".join(f"tests/test_forward.py::test_{name}" for name in names)


def _battery(*cases: str) -> str:
    return " ".join(f"tests/test_battery.py::test_battery[{case}]" for case in cases)


def _in(file: str, *names: str) -> str:
    return " ".join(f"tests/test_{file}.py::test_{name}" for name in names)


FORWARD = [
    Mutant(
        "_forward/carry.py",
        "    b = b * scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim)).astype(b.dtype)",
        "    b = b * 1",
        "the scale is lost",
        _forward("equals_merged"),
    ),
    Mutant(
        "_forward/carry.py",
        "_differentiable(path, factor).astype(wide(factor.dtype)) for",
        "_differentiable(path, factor) for",
        "a scale is rounded to bfloat16 by itself",
        _forward("the_scale_is_rounded_with_the_factors_and_not_by_itself"),
    ),
    Mutant(
        "_forward/carry.py",
        "scale = lax.stop_gradient(node.scale)",
        "scale = jax.numpy.asarray(node.scale)",
        "a scale that is data gets a gradient",
        _forward("gradient_and_the_scale_has_none"),
    ),
    Mutant(
        "_forward/consumers.py",
        "return Factor(factor.value.astype(dtype), factor.axes)",
        "return factor",
        "float32 factors make a bfloat16 network's products float32",
        "tests/test_forward.py::test_a_float32_factor_does_not_promote",
    ),
    Mutant(
        "_forward/consumers.py",
        "waiting = [k for k in contracted if k in second.axes]",
        "waiting = []",
        "a stack that is contracted, as in one-hot routing, is summed over before it meets B",
        "tests/test_forward.py::test_axes_are_followed",
    ),
    Mutant(
        "_forward/consumers.py",
        'return inside and params["slice_sizes"][axis] == factor.size(axis)',
        "return inside",
        "rows are looked up without their ids",
        _battery("embedding_clipped-output", "embedding_in_bounds-output"),
    ),
    Mutant(
        "_forward/dropout.py",
        "jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))",
        "jnp.where(kept, x, jnp.zeros((), x.dtype))",
        "dropout shrinks the expectation",
        _in("dropout", "expectation_is_the_undropped_output"),
    ),
    Mutant(
        "_forward/interpret.py",
        "self.uses[kernel.origin] = self.uses.get(kernel.origin, 0) + 1",
        "self.uses[kernel.origin] = 1",
        "two uses of a kernel drop the same elements",
        _in("dropout", "another_mask_for_each_kernel_and_each_use"),
    ),
    Mutant(
        "_forward/layout.py",
        'names = {old: new for new, old in enumerate(eqn.params["permutation"])}',
        'names = dict(enumerate(eqn.params["permutation"]))',
        "three axes moved in a circle move the other way round in the factors",
        "tests/test_forward.py::test_axes_are_followed",
    ),
    Mutant(
        "_forward/layout.py",
        "if not jnp.issubdtype(dtype, jnp.inexact) or narrow(dtype):",
        "if not jnp.issubdtype(dtype, jnp.inexact):",
        "W is quantized to eight bits without its update",
        _battery("quantised_to_eight_bits-output"),
    ),
    Mutant(
        "_forward/layout.py",
        "value = jnp.asarray(0 if RANK in factor.axes else 1, factor.value.dtype)",
        "value = jnp.asarray(0, factor.value.dtype)",
        "a gain is padded with zeros, and the array that W is padded with is lost",
        "tests/test_dora.py::test_what_a_kernel_is_padded_with_has_no_gain",
    ),
    Mutant(
        "_forward/arithmetic.py",
        'if isinstance(right, LowRank) and eqn.primitive.name == "sub":',
        "if False:",
        "a kernel that is subtracted has its update added",
        _battery("subtracted_from_an_array-output"),
    ),
    Mutant(
        "_forward/arithmetic.py",
        "differs = (ANY_AXIS, differs[1]) if target is a else (differs[0], ANY_AXIS)",
        "pass",
        "shards whose factors were scaled differently are gathered as if they shared them",
        _forward("shards_are_gathered_by_one_factor_only_where_they_share_the_other"),
    ),
    Mutant(
        "_forward/lowrank.py",
        "more = (gain.ordered(order) - 1).astype(value.dtype)",
        "more = gain.ordered(order).astype(value.dtype)",
        "DoRA's gain is one too large",
        _in("dora", "the_start_is_the_base"),
    ),
    Mutant(
        "_forward/convolution.py",
        "mixer.reshape(mixer.shape[0], groups, -1), (RANK, GROUP, FEATURE)",
        "mixer.reshape(mixer.shape[0], -1, groups), (RANK, FEATURE, GROUP)",
        "groups of a convolution take each other's features",
        _battery("grouped_convolution-output"),
    ),
]

CONTROL_FLOW = [
    Mutant(
        "_forward/control.py",
        "        return dataclasses.replace(value, draw=dropout.fold(value.draw, step))",
        "        return value",
        "every step of a loop drops the same elements",
        _in("dropout", "another_mask_for_each_step_of_a_loop"),
    ),
    Mutant(
        "_forward/control.py",
        "return (number + 1 if issued.counts else None), ",
        "return (number if issued.counts else None), ",
        "every step of a while loop drops the same elements",
        _in("dropout", "another_mask_for_each_step_of_a_loop[while]"),
    ),
    Mutant(
        "_forward/control.py",
        'for key in ("reverse", "unroll", "_split_transpose") if',
        'for key in ("unroll", "_split_transpose") if',
        "a reversed scan runs forwards",
        _battery("scan_reversed_unrolled_with_outputs-output"),
    ),
    Mutant(
        "_forward/control.py",
        "frame.note(dataclasses.replace(event, origin=outer(event.origin)))",
        "frame.note(event)",
        "what a function inside materialises is said of another leaf",
        _forward("each_caller_of_a_shared_function_is_told"),
    ),
    Mutant(
        "_forward/control.py",
        "value = dataclasses.replace(value, origin=(len(origins) - 1,), draw=frame.fresh_draw(value))",
        "value = dataclasses.replace(value, origin=(len(origins) - 1,))",
        "two calls of a function drop the same elements",
        _in("dropout", "another_mask_for_each_call_of_a_shared_function"),
    ),
    Mutant(
        "_forward/control.py",
        'if any(map(_specified, params["in_shardings"])):',
        "if False:",
        "the shardings of an inner jit's arguments are lost",
        _forward("inner_jit_keeps_its_shardings"),
    ),
    Mutant(
        "_forward/control.py",
        'prevent_cse=prevent_cse, policy=params["policy"])',
        "prevent_cse=prevent_cse)",
        "the policy of a remat is lost",
        _forward("remat_keeps_policy_and_scan_its_settings"),
    ),
    Mutant(
        "_forward/control.py",
        "outputs = lax.switch(index, bodies, *leaves)",
        "outputs = lax.switch(index, bodies[::-1], *leaves)",
        "the other branch runs",
        _battery("cond-output"),
    ),
    Mutant(
        "_forward/control.py",
        "    if key not in frame.session.cache:",
        "    if True:",
        "a layer function that recurs is transformed at every call",
        _forward("inner_jit_stays_a_jit_and_identical_ones_are_transformed_once"),
    ),
    Mutant(
        "_forward/control.py",
        "specs += [factor_spec(spec, factor.axes) for factor in value.factors]",
        "specs += [jax.sharding.PartitionSpec()] * len(value.factors)",
        "each shard gets whole factors beside a part of W",
        _battery("shard_map_by_outputs-output"),
    ),
    Mutant(
        "_forward/custom_rules.py",
        "    return jnp.zeros_like(direction)",
        "    return direction",
        "the tangents of activations count twice where a function has its own derivative",
        "tests/test_forward.py::test_a_functions_own_derivative_by_its_activations",
    ),
]

AXES = [
    Mutant(
        "_forward/tracks.py",
        "        outputs = outputs - inputs",
        "        pass",
        "an axis of which a part is contracted is input and output at once",
        "tests/test_kernel_axes.py::test_axes",
    ),
    Mutant(
        "_forward/tracks.py",
        "return set(self.axes.stack) == set(other.axes.stack) and sides[0] == sides[1]",
        "return self.axes == other.axes",
        "a tied head is refused: it contracts what the embedding looks up",
        _in("kernel_axes", "a_tied_head_is_an_embedding_too"),
    ),
    Mutant(
        "_forward/tracks.py",
        "(contracted, *spatial), ()) for track",
        "(contracted,), ()) for track",
        "the window of a convolution counts as outputs",
        _battery("convolution-axes"),
    ),
    Mutant(
        "_forward/tracks.py",
        "    stack = (*numbers.rhs_group_dimensions, *batch)",
        "    stack = batch",
        "experts share one pair of factors",
        _battery("ragged-axes"),
    ),
    Mutant(
        "_forward/tracks.py",
        "[track for track in _combined(eqn, infos) if track.where is None]",
        "_combined(eqn, infos)",
        "a function of rows that were looked up counts as a kernel",
        "tests/test_kernel_axes.py::test_axes",
    ),
    Mutant(
        "_forward/tracks.py",
        "return [track for track in tracks if not track.every < whole[track.path]]",
        "return tracks",
        "a kernel's own norms stay beside it as a second kernel",
        "tests/test_kernel_axes.py::test_a_function_of_a_kernel_is_a_kernel",
    ),
    Mutant(
        "_forward/tracks.py",
        "labels=track.labels[1:]",
        "labels=track.labels[:-1]",
        "a scan slices the last axis",
        _battery("scan_over_layers-axes"),
    ),
    Mutant(
        "_forward/axes.py",
        "heads={use.path for use in alone - reader.feeding},",
        "heads={use.path for use in alone},",
        "a kernel that feeds others counts as a head",
        _in("kernel_axes", "embeddings_and_heads", "heads_are_known_from_a_loss_too"),
    ),
    Mutant(
        "_forward/tracks.py",
        "return one if one == other else _merged([self.close(one), self.close(other)])",
        "return one",
        "what a loop's body does to its carry isn't followed round",
        "tests/test_kernel_axes.py::test_a_head_in_a_loop",
    ),
    Mutant(
        "_forward/axes.py",
        "alone = {use for info in outputs if len(info.reach) == 1 for use in info.reach}",
        "alone = {use for info in outputs for use in info.reach}",
        "a sum of several products makes heads of all of them",
        "tests/test_kernel_axes.py::test_two_heads",
    ),
    Mutant(
        "_walk.py",
        "            if changing == carry:",
        "            if True:",
        "what a loop's body does to its carry is followed for one step",
        "tests/test_kernel_axes.py::test_a_head_in_a_loop",
    ),
    Mutant(
        "_forward/interpret.py",
        "        if unknown:\n",
        "        if False:\n",
        "a primitive can be added that the forward knows and kernel_axes doesn't",
        "tests/test_kernel_axes.py::test_the_axes_know_the_primitives_that_the_forward_knows",
    ),
]

TESTING = [
    Mutant(
        "testing/_cost.py",
        "        return Flow(self.times * runs)",
        "        return Flow(self.times)",
        "a loop's products count once",
        _in("certify", "flops_are_those_of_every_iteration"),
    ),
    Mutant(
        "testing/_cost.py",
        "        most = max((flow.cost for",
        "        most = min((flow.cost for",
        "the cheapest branch is counted",
        _in("certify", "of_branches_the_most_expensive_is_counted"),
    ),
    Mutant(
        "testing/_cost.py",
        "data = (not left.data and right.data, right.data) if scatter",
        "data = (left.data, right.data) if scatter",
        "an embedding's whole gradient isn't seen",
        _in("certify", "an_embedding_gradient_fails"),
    ),
    Mutant(
        "testing/_cost.py",
        'if name == "gather" and math.prod(',
        "if False and math.prod(",
        "rows of a table that are looked up count as the table",
        _in("certify", "a_table_of_positions_that_is_read_whole_holds"),
    ),
    Mutant(
        "testing/_cost.py",
        "        return Value(one.data or other.data, one.origin if",
        "        return Value(one.data, one.origin if",
        "data that a loop brings into its carry isn't followed round",
        _in("certify", "a_gradient_of_what_a_loop_adds_up_fails"),
    ),
    Mutant(
        "testing/_claims.py",
        "    if size > STATE_LIMIT * step.trained:",
        "    if False:",
        "an optimizer's state for the whole base isn't seen",
        _in("certify", "state_for_the_whole_base_fails"),
    ),
    Mutant(
        "_tables.py",
        "        return one if one == other else _Of.OTHER if",
        "        return one if one else _Of.OTHER if",
        "ids that a loop has changed are checked as those of the batch",
        _in("vocabulary", "other_lookups_bound_no_ids"),
    ),
]

INIT = [
    Mutant(
        "_init.py",
        "std = 1 / np.maximum(each, 1).reshape(",
        "std = 1 / np.sqrt(np.maximum(each, 1)).reshape(",
        "a Gaussian start is √r times as wide as PEFT's",
        _in("init", "the_start_is_that_of_peft_and_loralib", "each_layer_starts_by_its_own_rank"),
    ),
    Mutant(
        "_init.py",
        "1 / math.sqrt(math.prod(inputs))",
        "math.sqrt(6 / math.prod(inputs))",
        "a uniform start is √6 times as wide as loralib's",
        _in("init", "the_start_is_that_of_peft_and_loralib"),
    ),
    Mutant(
        "_init.py",
        "        if kernel.embedding:",
        "        if False:",
        "an embedding starts as a matrix does",
        _in("init", "shapes_and_the_start_of_every_kind_of_kernel"),
    ),
    Mutant(
        "_init.py",
        'for word in np.frombuffer(digest[:8], "<u4"):',
        "for word in ():",
        "all kernels of a shape start with the same factors",
        _in("init", "stacked_kernels_have_factors_of_their_own", "a_kernels_factors_depend_on_its_path_alone")
        + " "
        + _in("others_get_wrong", "convolutions_have_random_factors_of_their_own"),
    ),
    Mutant(
        "_init.py",
        "used = np.arange(rank) < each[..., None]",
        "used = np.arange(rank) <= each[..., None]",
        "one column of the padding isn't zero",
        _in("init", "layers_of_a_stack_differ_by_padding_and_scale"),
    ),
    Mutant(
        "_init.py",
        "config.alpha if override.alpha is None else override.alpha",
        "config.alpha",
        "an override's alpha is ignored",
        _in("init", "overrides_change_rank_and_alpha"),
    ),
    Mutant(
        "_init.py",
        "if path in chosen and path not in excluded",
        "if path in chosen",
        "exclude excludes nothing",
        _in("init", "exclude_takes_kernels_out"),
    ),
    Mutant(
        "_init.py",
        "if not entry.embedding and not entry.head}",
        "if not entry.embedding}",
        "all-linear adapts the head",
        _in("init", "all_linear_leaves_heads_and_embeddings_out"),
    ),
]

TREE = [
    Mutant(
        "_tree.py",
        "same = list(new) == list(old) and all(new[key] is old[key] for key in old)",
        "same = False",
        "what isn't touched is rebuilt",
        _in("tree", "untouched_parts_stay_the_very_same_object"),
    ),
    Mutant(
        "_tree.py",
        "return leaf.cast() if isinstance(leaf, Trained) else leaf",
        "return leaf.value if isinstance(leaf, Trained) else leaf",
        "the function sees a leaf that is trained in full in float32",
        _forward("without_nodes_the_function_still_gets_its_own_dtypes")
        + " "
        + _in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_tree.py",
        "return bool(nodes) and paths.isdisjoint(nodes)",
        "return bool(nodes)",
        "a whole tree counts as an adapter, and its base trains",
        _in("optim", "a_mask_of_a_whole_tree"),
    ),
    Mutant(
        "_tree.py",
        "adapter = _pruned(params, lambda path, leaf: isinstance(leaf, LoRA) or path in whole)",
        "adapter = _pruned(params, lambda path, leaf: isinstance(leaf, LoRA))",
        "leaves trained in full are in neither part",
        _in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_tree.py",
        "return type(tree)(tree.default_factory, entries)",
        "return entries",
        "a defaultdict becomes a dict",
        _in("tree", "a_defaultdict_stays_one"),
    ),
    Mutant(
        "_node.py",
        "return (flat[0],) if len(set(flat)) == 1 else tuple(flat)",
        "return (flat[0],)",
        "all layers of a stack get the first one's scale",
        _in("tree", "a_scale_is_an_array_by_stack_index_whether_static_or_data"),
    ),
    Mutant(
        "_node.py",
        "if axes is not None and Axes(**numbers) != axes:",
        "if False:",
        "a square kernel's adapter comes back transposed",
        _in("tree", "a_dictionary_with_other_axes_is_refused"),
    ),
    Mutant(
        "_node.py",
        "wide = jnp.promote_types(dtype, jnp.float32)",
        "wide = dtype",
        "a bfloat16 leaf trains in bfloat16",
        _in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_node.py",
        "    counts = np.where(used.any(-1), rank - np.argmax(used[..., ::-1], -1), 0)",
        "    counts = used.sum(-1)",
        "a rank that is zero among others counts as padding",
        "tests/test_stack.py::test_a_rank_that_is_zero_among_others_is_no_padding",
    ),
    Mutant(
        "_node.py",
        "        a=PartitionSpec(*stack, *inputs, None),",
        "        a=PartitionSpec(*stack, *outputs, None),",
        "A is cut along the outputs' axes",
        _in("sharding", "specs_follow_the_kernels_axes"),
    ),
]

MERGE = [
    Mutant(
        "_merge.py",
        "return jnp.promote_types(jnp.float32, kernel.dtype)",
        "return kernel.dtype",
        "a merged bfloat16 kernel is rounded more than once",
        _in("merge", "rounding_happens_once"),
    ),
    Mutant(
        "_merge.py",
        "        return kernel - update_of(node, kernel.dtype)",
        "        return kernel + update_of(node, kernel.dtype)",
        "unmerge adds once more",
        _in("merge", "unmerge_undoes_merge"),
    ),
    Mutant(
        "_merge.py",
        "moved.astype(kernel.dtype if dtype is None else dtype)",
        "moved.astype(kernel.dtype)",
        "merging to float32 on request rounds to the kernel's dtype",
        _in("merge", "merge_in_float32_on_request"),
    ),
    Mutant(
        "_node.py",
        "    return product.transpose([order.index(axis) for axis in range(len(order))])",
        "    return product.transpose(order)",
        "an update whose axes move in a circle is added to the wrong entries",
        _in("merge", "delta_is_the_update_and_none_elsewhere", "unmerge_undoes_merge")
        + " "
        + _in("forward", "equals_merged"),
    ),
    Mutant(
        "_node.py",
        "        node.a.astype(dtype) * scale,",
        "        node.a.astype(dtype),",
        "merge forgets alpha / r",
        _forward("equals_merged"),
    ),
    Mutant(
        "_dora.py",
        "norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))",
        "norm = jnp.sqrt(squares)",
        "an output whose kernel is zero becomes nan",
        _in("dora", "an_output_without_a_kernel_makes_no_nan"),
    ),
    Mutant(
        "_dora.py",
        "return _gain(node, _squares(w, axes) + 2 * s * cross + s**2 * square)",
        "return _gain(node, _squares(w, axes) + s * cross + s**2 * square)",
        "the norm that the forward divides by isn't that of W + ΔW",
        "tests/test_battery_dora.py::test_adapted_is_merged[dense]",
    ),
    Mutant(
        "_dora.py",
        "update_of(node, kernel.dtype) if node.magnitude is None else changed(kernel, node) - kernel",
        "update_of(node, kernel.dtype)",
        "delta forgets the magnitude",
        "tests/test_dora.py::test_merge_delta_and_reports",
    ),
]

OPTIM = [
    Mutant(
        "_optim.py",
        "return flags if leaf.scale_is_static else flags.replace(scale=False)",
        "return flags",
        "scales of stacked adapters train",
        "tests/test_optim.py::test_a_magnitude_trains",
    ),
    Mutant(
        "_optim.py",
        "return rebox(leaf, everything or path in whole)",
        "return rebox(leaf, path in whole)",
        "extra leaves of an adapter stay as they are",
        "tests/test_optim.py::test_what_split_was_told_to_train_trains",
    ),
    Mutant(
        "_optim.py",
        "lambda trains: not trains",
        "lambda trains: False",
        "the base moves by its raw gradients",
        _in("optim", "masked_composes_with_optax", "whole_trees_and_adapter_trees_train_alike"),
    ),
    Mutant(
        "_optim.py",
        "(used_ranks(node) < node.a.shape[-1]).any())",
        "(used_ranks(node) < node.a.shape[-1]).all())",
        "padding of some layers only isn't checked",
        "tests/test_optim.py::test_one_column_of_padding_in_one_layer_is_enough",
    ),
    Mutant(
        "_optim.py",
        "used = (np.arange(leaf.a.shape[-1]) < used_ranks(leaf)[..., None]).astype(np.float32)",
        "used = (np.arange(leaf.a.shape[-1]) <= used_ranks(leaf)[..., None]).astype(np.float32)",
        "one column of the padding may move",
        "tests/test_optim.py::test_one_column_of_padding_in_one_layer_is_enough",
    ),
    Mutant(
        "_optim.py",
        "    if not any(jax.tree.leaves(flags)):",
        "    if False:",
        "nothing trains, and nobody is told",
        _in("optim", "nothing_to_train_is_an_error"),
    ),
]

STACK = [
    Mutant(
        "_stack.py",
        "if static and all(np.array_equal(node.scale, nodes[0].scale) for node in nodes):",
        "if static:",
        "all adapters of a stack get the first one's scale",
        _in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "return trim_rank(_with_static_scale(one)) if isinstance(one, LoRA) else one",
        "return _with_static_scale(one) if isinstance(one, LoRA) else one",
        "unstacked adapters keep their padding",
        _in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "isinstance(scale, Tracer | jax.ShapeDtypeStruct) else node.replace(scale=np.asarray(scale))",
        "True else node.replace(scale=np.asarray(scale))",
        "an unstacked scale is a leaf, which an optimizer may decay",
        _in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "for path in sorted(set(table) ^ set(first)):",
        "for path in sorted(set(table) - set(first)):",
        "an adapter that lacks a kernel is stacked",
        _in("stack", "what_cant_be_stacked_is_refused"),
    ),
    Mutant(
        "_stack.py",
        "        if ours != theirs:",
        "        if False:",
        "adapters of other kernels are stacked",
        _in("stack", "what_cant_be_stacked_is_refused"),
    ),
    Mutant(
        "_stack.py",
        "if isinstance(leaf, LoRA) and leaf.lead != 1:",
        "if False:",
        "a single adapter is cut along its inputs",
        _in("stack", "what_isnt_stacked_is_refused"),
    ),
]

PEFT = [
    Mutant(
        "peft/_factors.py",
        "if tensor.path != path or scale[tensor.index] == 0:",
        "if tensor.path != path:",
        "layers that aren't adapted are in the file",
        _in("peft", "a_subset_of_layers_is_named_in_full"),
    ),
    Mutant(
        "peft/_factors.py",
        "        scale[found.tensor.index] = found.scale",
        "        scale[found.tensor.index] = 1.0",
        "the adapter of a file has scale 1",
        _in("peft", "what_is_saved_is_what_is_loaded"),
    ),
    Mutant(
        "peft/_factors.py",
        "            a_i, b_i = a_i[:, used], b_i[used]",
        "            pass",
        "padding of a stack's other layers is written as ranks",
        "tests/test_peft.py::test_the_first_pattern_that_fits_wins",
    ),
    Mutant(
        "peft/_read.py",
        'problems = [f"{name} is missing" for name in self.expected if name not in there]',
        "problems = []",
        "a file that lacks tensors isn't refused by them",
        _in("peft", "all_faults_of_the_tensors_are_reported_together"),
    ),
    Mutant(
        "peft/_read.py",
        "            elif shape != expected.shape:",
        "            elif False:",
        "a tensor of another shape isn't refused by it",
        _in("peft", "all_faults_of_the_tensors_are_reported_together"),
    ),
    Mutant(
        "peft/_read.py",
        "* np.float32(self.config.scale(tensor.module))",
        "",
        "the bias of B is added without the scale",
        _in("peft_options", "the_bias_of_b_goes_into_the_modules_own"),
    ),
    Mutant(
        "peft/_read.py",
        "            embedding[list(rows)] = arrays[name]",
        "            embedding[: len(rows)] = arrays[name]",
        "trained rows of an embedding are put first",
        _in("peft_options", "rows_of_an_embedding_are_saved_and_loaded"),
    ),
    Mutant(
        "peft/_content.py",
        "        scaled = (b.astype(np.float32) * np.float32(scale)).astype(b.dtype)",
        "        scaled = b",
        "a portable file has lost its scale",
        _in("peft", "portable_has_one_rank_and_no_scale"),
    ),
    Mutant(
        "peft/_content.py",
        "return np.ascontiguousarray(value.T if tensor.transpose else value)",
        "return np.ascontiguousarray(value)",
        "a whole module is saved transposed",
        _in("peft", "whole_modules_and_biases"),
    ),
    Mutant(
        "peft/_read.py",
        'problems.append(f"{name[:200]!r} is unexpected")',
        "pass",
        "a file with tensors that nothing asks for is loaded without them",
        "tests/test_peft.py::test_all_faults_of_the_tensors_are_reported_together",
    ),
]

TRAINING = [
    Mutant(
        "train/_step.py",
        "mean = 1 / jnp.where(weight > 0, weight, 1)",
        "mean = 1 / weight",
        "a batch without targets makes nan of all that trains",
        _in("train", "a_batch_without_targets_moves_nothing"),
    ),
    Mutant(
        "train/_step.py",
        "part_key = None if key is None else jax.random.fold_in(key, number)",
        "part_key = key",
        "all parts of a batch drop the same elements",
        "--slow tests/test_train.py::test_dropout_is_drawn_anew_and_off_in_evaluation",
    ),
    Mutant(
        "train/_step.py",
        "metrics = StepMetrics(total * mean, weight, optax.tree.norm(grads))",
        "metrics = StepMetrics(total * mean, weight, optax.tree.norm(grads) / mean)",
        "the norm that is reported is that of the sum",
        "tests/test_train.py::test_the_step_is_the_one_written_by_hand_and_costs_the_same",
    ),
    Mutant(
        "train/_step.py",
        "return jax.tree.map(jnp.add, sums, gradient(adapter, base, part, part_key)), None",
        "return gradient(adapter, base, part, part_key), None",
        "of a batch in parts only the last one counts",
        _in("train", "parts_of_a_batch_add_up_to_the_batch"),
    ),
    Mutant(
        "train/_loss.py",
        "return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))",
        "return x",
        "each token predicts itself",
        _in("train", "each_token_is_predicted_from_those_before_it"),
    ),
    Mutant(
        "train/_loss.py",
        "jnp.where(weights > 0, losses * weights, 0.0)",
        "losses * weights",
        "what padding holds can make the loss nan",
        _in("train", "what_padding_holds_is_not_seen"),
    ),
    Mutant(
        "train/_loss.py",
        "((softmax - onehot) * cotangent[..., None])",
        "(softmax * cotangent[..., None])",
        "the gradient doesn't know the target",
        _in("train", "cross_entropy_and_its_gradient"),
    ),
    Mutant(
        "train/_optimizer.py",
        "jnp.ndim(x) > 1 and not is_vector(path)",
        "jnp.ndim(x) > 1",
        "weight decay shrinks the stacked scales of norms",
        _in("train", "weight_decay_is_for_matrices"),
    ),
    Mutant(
        "checkpoint.py",
        "jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)",
        "jnp.sum(bits, dtype=jnp.uint32)",
        "two bases with their entries in another order look alike",
        _in("checkpoint", "a_fingerprint_sees_every_change"),
    ),
    Mutant(
        "checkpoint.py",
        '        ("adapter axes of", facts["axes"], _axes(template.adapter)),\n',
        "",
        "a square kernel's adapter is resumed transposed",
        _in("checkpoint", "a_square_kernel_with_other_axes_is_refused"),
    ),
    Mutant(
        "checkpoint.py",
        '    if facts["fingerprint"] != template.fingerprint:',
        "    if False:",
        "a run goes on with another base",
        _in("checkpoint", "a_checkpoint_of_another_run_is_refused"),
    ),
    Mutant(
        "checkpoint.py",
        "    return max(steps, default=None)",
        "    return min(steps, default=None)",
        "a run is resumed from its oldest checkpoint",
        "tests/test_checkpoint.py::test_the_adapter_of_a_checkpoint",
    ),
]

MUTANTS = [*FORWARD, *CONTROL_FLOW, *AXES, *TESTING, *INIT, *TREE, *MERGE, *OPTIM, *STACK, *PEFT, *TRAINING]
