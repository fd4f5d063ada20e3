"""Faults of the parameter tree: `init`, splitting, merging, optimizers and stacks."""

from mutants.mutant import Mutant, forward, tests_in

INIT = [
    Mutant(
        "_init.py",
        "std = 1 / np.maximum(each, 1).reshape(",
        "std = 1 / np.sqrt(np.maximum(each, 1)).reshape(",
        "a Gaussian start is √r times as wide as PEFT's",
        tests_in("init", "the_start_is_that_of_peft_and_loralib", "each_layer_starts_by_its_own_rank"),
    ),
    Mutant(
        "_init.py",
        "1 / math.sqrt(math.prod(inputs))",
        "math.sqrt(6 / math.prod(inputs))",
        "a uniform start is √6 times as wide as loralib's",
        tests_in("init", "the_start_is_that_of_peft_and_loralib"),
    ),
    Mutant(
        "_init.py",
        "        if kernel.embedding:",
        "        if False:",
        "an embedding starts as a matrix does",
        tests_in("init", "shapes_and_the_start_of_every_kind_of_kernel"),
    ),
    Mutant(
        "_init.py",
        'for word in np.frombuffer(digest[:8], "<u4"):',
        "for word in ():",
        "all kernels of a shape start with the same factors",
        tests_in("init", "stacked_kernels_have_factors_of_their_own", "a_kernels_factors_depend_on_its_path_alone")
        + " "
        + tests_in("others_get_wrong", "convolutions_have_random_factors_of_their_own"),
    ),
    Mutant(
        "_init.py",
        "used = np.arange(rank) < each[..., None]",
        "used = np.arange(rank) <= each[..., None]",
        "one column of the padding isn't zero",
        tests_in("init", "layers_of_a_stack_differ_by_padding_and_scale"),
    ),
    Mutant(
        "_init.py",
        "config.alpha if override.alpha is None else override.alpha",
        "config.alpha",
        "an override's alpha is ignored",
        tests_in("init", "overrides_change_rank_and_alpha"),
    ),
    Mutant(
        "_init.py",
        "if path in chosen and path not in excluded",
        "if path in chosen",
        "exclude excludes nothing",
        tests_in("init", "exclude_takes_kernels_out"),
    ),
    Mutant(
        "_init.py",
        "if not entry.embedding and not entry.head}",
        "if not entry.embedding}",
        "all-linear adapts the head",
        tests_in("init", "all_linear_leaves_heads_and_embeddings_out"),
    ),
]

TREE = [
    Mutant(
        "_tree.py",
        "same = list(new) == list(old) and all(new[key] is old[key] for key in old)",
        "same = False",
        "what isn't touched is rebuilt",
        tests_in("tree", "untouched_parts_stay_the_very_same_object"),
    ),
    Mutant(
        "_tree.py",
        "return leaf.cast() if isinstance(leaf, Trained) else leaf",
        "return leaf.value if isinstance(leaf, Trained) else leaf",
        "the function sees a leaf that is trained in full in float32",
        forward("without_nodes_the_function_still_gets_its_own_dtypes")
        + " "
        + tests_in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_tree.py",
        "return bool(nodes) and paths.isdisjoint(nodes)",
        "return bool(nodes)",
        "a whole tree counts as an adapter, and its base trains",
        tests_in("optim", "a_mask_of_a_whole_tree"),
    ),
    Mutant(
        "_tree.py",
        "adapter = _pruned(params, lambda path, leaf: isinstance(leaf, LoRA) or path in in_full)",
        "adapter = _pruned(params, lambda path, leaf: isinstance(leaf, LoRA))",
        "leaves trained in full are in neither part",
        tests_in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_tree.py",
        "return type(tree)(tree.default_factory, entries)",
        "return entries",
        "a defaultdict becomes a dict",
        tests_in("tree", "a_defaultdict_stays_one"),
    ),
    Mutant(
        "_node.py",
        "return (flat[0],) if len(set(flat)) == 1 else tuple(flat)",
        "return (flat[0],)",
        "all layers of a stack get the first one's scale",
        tests_in("tree", "a_scale_is_an_array_by_stack_index_whether_static_or_data"),
    ),
    Mutant(
        "_node.py",
        "if axes is not None and Axes(**numbers) != axes:",
        "if False:",
        "a square kernel's adapter comes back transposed",
        tests_in("tree", "a_dictionary_with_other_axes_is_refused"),
    ),
    Mutant(
        "_trained.py",
        "kept = wide(dtype)",
        "kept = dtype",
        "a bfloat16 leaf trains in bfloat16",
        tests_in("tree", "leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32"),
    ),
    Mutant(
        "_ranks.py",
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
        tests_in("sharding", "specs_follow_the_kernels_axes"),
    ),
]

MERGE = [
    Mutant(
        "_merge.py",
        "        moved = move(jnp.asarray(whole(kernel), wide(kernel.dtype)), nodes[path])",
        "        moved = move(jnp.asarray(whole(kernel), kernel.dtype), nodes[path])",
        "a merged bfloat16 kernel is rounded more than once",
        tests_in("merge", "rounding_happens_once"),
    ),
    Mutant(
        "_merge.py",
        "        return kernel - update_of(node, kernel.dtype)",
        "        return kernel + update_of(node, kernel.dtype)",
        "unmerge adds once more",
        tests_in("merge", "unmerge_undoes_merge"),
    ),
    Mutant(
        "_merge.py",
        "moved.astype(kernel.dtype if dtype is None else dtype)",
        "moved.astype(kernel.dtype)",
        "merging to float32 on request rounds to the kernel's dtype",
        tests_in("merge", "merge_in_float32_on_request"),
    ),
    Mutant(
        "_update.py",
        "    return product.transpose([order.index(axis) for axis in range(len(order))])",
        "    return product.transpose(order)",
        "an update whose axes move in a circle is added to the wrong entries",
        tests_in("merge", "delta_is_the_update_and_none_elsewhere", "unmerge_undoes_merge")
        + " "
        + tests_in("forward", "equals_merged"),
    ),
    Mutant(
        "_update.py",
        "        node.a.astype(dtype) * scale,",
        "        node.a.astype(dtype),",
        "merge forgets alpha / r",
        forward("equals_merged"),
    ),
    Mutant(
        "_dora.py",
        "norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))",
        "norm = jnp.sqrt(squares)",
        "an output whose kernel is zero becomes nan",
        tests_in("dora", "an_output_without_a_kernel_makes_no_nan"),
    ),
    Mutant(
        "_dora.py",
        "return _gain(node, _squares(w, axes) + 2 * s * cross + s**2 * square)",
        "return _gain(node, _squares(w, axes) + s * cross + s**2 * square)",
        "the norm that the forward divides by isn't that of W + ΔW",
        "tests/test_battery_dora.py::test_adapted_is_merged[dense]",
    ),
    Mutant(
        "_update.py",
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
        "return rebox(leaf, everything or path in in_full)",
        "return rebox(leaf, path in in_full)",
        "extra leaves of an adapter stay as they are",
        "tests/test_optim.py::test_what_split_was_told_to_train_trains",
    ),
    Mutant(
        "_optim.py",
        "lambda trains: not trains",
        "lambda trains: False",
        "the base moves by its raw gradients",
        tests_in("optim", "masked_composes_with_optax", "whole_trees_and_adapter_trees_train_alike"),
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
        tests_in("optim", "nothing_to_train_is_an_error"),
    ),
]

STACK = [
    Mutant(
        "_stack.py",
        "if static and all(np.array_equal(node.scale, nodes[0].scale) for node in nodes):",
        "if static:",
        "all adapters of a stack get the first one's scale",
        tests_in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "return trim_rank(_with_static_scale(one)) if isinstance(one, LoRA) else one",
        "return _with_static_scale(one) if isinstance(one, LoRA) else one",
        "unstacked adapters keep their padding",
        tests_in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "isinstance(scale, Tracer | jax.ShapeDtypeStruct) else node.replace(scale=np.asarray(scale))",
        "True else node.replace(scale=np.asarray(scale))",
        "an unstacked scale is a leaf, which an optimizer may decay",
        tests_in("stack", "unstack_gives_each_adapter_back"),
    ),
    Mutant(
        "_stack.py",
        "for path in sorted(set(table) ^ set(first)):",
        "for path in sorted(set(table) - set(first)):",
        "an adapter that lacks a kernel is stacked",
        tests_in("stack", "what_cant_be_stacked_is_refused"),
    ),
    Mutant(
        "_stack.py",
        "        if ours != theirs:",
        "        if False:",
        "adapters of other kernels are stacked",
        tests_in("stack", "what_cant_be_stacked_is_refused"),
    ),
    Mutant(
        "_stack.py",
        "if isinstance(leaf, LoRA) and leaf.lead != 1:",
        "if False:",
        "a single adapter is cut along its inputs",
        tests_in("stack", "what_isnt_stacked_is_refused"),
    ),
]
