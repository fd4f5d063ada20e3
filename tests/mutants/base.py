"""Faults of what the tree and the forward stand on: names, settings, shardings, reports and quantized kernels."""

from mutants.mutant import Mutant, tests_in

NAMES = [
    Mutant(
        "_paths.py",
        "    return parts[-len(suffix) :] == suffix",
        '    return "/".join(parts).endswith("/".join(suffix))',
        "a pattern matches the end of a name",
        tests_in("paths", "parts_of_components_dont_match"),
    ),
    Mutant(
        "_paths.py",
        "            chosen.setdefault(path, index)",
        "            chosen[path] = index",
        "the last pattern counts",
        tests_in("paths", "the_first_match_wins"),
    ),
    Mutant(
        "_paths.py",
        "if parts[-1] in LEAF_NAMES and len(parts) > 1 else",
        "if len(parts) > 1 else",
        "any last name may be left out of a pattern",
        tests_in("paths", "a_component_of_plain_dicts_is_no_final_leaf_name"),
    ),
    Mutant(
        "_paths.py",
        "        return [path for path in paths if regex.fullmatch(path)]",
        "        return [path for path in paths if regex.search(path)]",
        "a regular expression matches a part of a path",
        tests_in("paths", "a_pattern_matches", "patterns_of_others_are_told_how_to_write_them_here"),
    ),
    Mutant(
        "_paths.py",
        "            if all((*parent, name) in modules for name in anchors):",
        "            if any((*parent, name) in modules for name in anchors):",
        'a policy\'s "value" head counts as attention',
        tests_in("paths", "the_attention_preset_knows_the_usual_names"),
    ),
    Mutant(
        "_config.py",
        'return alpha / (rank if self.scaling == "standard" else math.sqrt(rank))',
        "return alpha / rank",
        "rank-stabilized scaling is the paper's",
        tests_in("peft", "scales_survive_bit_for_bit_with_whole_alphas"),
    ),
    Mutant(
        "_config.py",
        "isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < least:",
        "isinstance(rank, bool) or not isinstance(rank, numbers.Integral):",
        "rank 0 is accepted",
        tests_in("init", "a_bad_setting_is_a_one_line_error"),
    ),
    Mutant(
        "_config.py",
        "not isinstance(alpha, numbers.Real) or not 0 < float(alpha) < math.inf:",
        "not isinstance(alpha, numbers.Real):",
        "an alpha of 0 or infinity is accepted",
        tests_in("init", "a_bad_setting_is_a_one_line_error"),
    ),
    Mutant(
        "_config.py",
        "        if not self.targets and not self.also_train:",
        "        if False:",
        "settings with which nothing trains are accepted",
        tests_in("init", "a_bad_setting_is_a_one_line_error"),
    ),
    Mutant(
        "_config.py",
        "    return (x,) if isinstance(x, str) or not isinstance(x, Sequence) else tuple(x)",
        "    return tuple(x)",
        "a pattern alone is read letter by letter",
        tests_in("init", "settings_go_by_name", "a_config_can_be_hashed_and_compared", "the_default_is_attention"),
    ),
]

PLACES = [
    Mutant(
        "_sharding.py",
        "        return dataclasses.replace(leaf, value=sharding_at(path)) if isinstance(leaf, Trained) else",
        "        return",
        "the shardings of a tree with leaves trained in full have another structure than the tree",
        tests_in("sharding", "shapes_are_enough_and_split_takes_shardings_apart", "specs_follow_the_kernels_axes"),
    ),
    Mutant(
        "_sharding.py",
        "            return place(unbox(sharding_at(kernel_path(path))), leaf)",
        "            return place(jax.P(), leaf)",
        "factors are copied to every device",
        tests_in("sharding", "specs_follow_the_kernels_axes"),
    ),
    Mutant(
        "_sharding.py",
        "            return rebox(leaf, place_quantized(unbox(sharding_at(path)), unbox(leaf)))",
        "            return sharding_at(path)",
        "the scales of a quantized kernel have the sharding of its values",
        tests_in("quantize", "data_lie_on_a_mesh_as_the_kernel_does"),
    ),
    Mutant(
        "_quantize/placement.py",
        "        part if node.scales.shape[stack + k] % parts_of(part, mesh) == 0 else None",
        "        part",
        "groups are cut that a mesh doesn't divide",
        tests_in("quantize", "data_lie_on_a_mesh_as_the_kernel_does"),
    ),
    Mutant(
        "_quantize/placement.py",
        "    return tuple(full[axis] for group in node.own_axes for axis in group)",
        "    return full",
        "the data of a kernel with its outputs first are cut along other axes than the kernel",
        tests_in("quantize", "outputs_that_come_first_are_cut_as_outputs"),
    ),
]

REPORTS = [
    Mutant(
        "_describe.py",
        "    trainable = int(ranks.sum()) * sum(sides)",
        "    trainable = int(node.a.size + node.b.size)",
        "padding counts as parameters that train",
        tests_in("describe", "rows_hold_what_is_known_of_each_kernel"),
    ),
    Mutant(
        "_describe.py",
        "        trainable += int(np.count_nonzero(ranks)) * sides[1]",
        "        pass",
        "DoRA's magnitudes aren't counted",
        tests_in("describe", "rows_hold_what_is_known_of_each_kernel")
        + " tests/test_dora.py::test_magnitudes_are_part_of_the_adapter",
    ),
    Mutant(
        "_describe.py",
        "        elif path in in_full:",
        "        elif False:",
        "leaves trained in full aren't counted",
        tests_in("describe", "leaves_that_train_whole_are_named_or_known"),
    ),
    Mutant(
        "_describe.py",
        "    lost = update - (rounded - before)",
        "    lost = update - (rounded - kernel)",
        "the rounding of W itself counts as a loss of the update",
        tests_in("merge", "the_rounding_of_the_kernel_itself_is_no_loss_of_the_update"),
    ),
    Mutant(
        "_describe.py",
        "    return max(0.0, 1 - lost / moved) if moved else 1.0",
        "    return 1 - lost / moved if moved else 1.0",
        "a negative share of an update survives",
        tests_in("merge", "the_rounding_of_the_kernel_itself_is_no_loss_of_the_update"),
    ),
]

QUANTIZED = [
    Mutant(
        "_quantize/schemes.py",
        "    middles = (codes[:-1] + codes[1:]) / np.float32(2)",
        "    middles = codes[1:]",
        "numbers are rounded down to a code",
        tests_in("quantize", "the_error_is_within_the_scheme_s_bound"),
    ),
    Mutant(
        "_quantize/schemes.py",
        "        lambda codes: (codes.astype(jnp.float32) - 8) / 7,",
        "        lambda codes: (codes.astype(jnp.float32) - 8) / 8,",
        "int4 shrinks every number",
        tests_in("quantize", "the_error_is_within_the_scheme_s_bound"),
    ),
    Mutant(
        "_quantize/schemes.py",
        "    flat = flat - offset[..., None]",
        "    flat = flat * 1",
        "nested scales have the mean added that wasn't taken away",
        tests_in(
            "quantize", "the_error_is_within_the_scheme_s_bound", "quantizing_what_was_dequantized_changes_nothing_more"
        ),
    ),
    Mutant(
        "_quantize/kernel.py",
        "        if at_once or count == 1 or count * each <= _AT_ONCE:",
        "        if True:",
        "all of a large stack is in float32 at once",
        tests_in("quantize", "a_large_stack_is_encoded_in_parts"),
    ),
    Mutant(
        "models/_packed.py",
        "        return np.stack([data >> 4, data & 15], -1)",
        "        return np.stack([data & 15, data >> 4], -1)",
        "two 4-bit numbers of a file's byte change places",
        tests_in("quantized_folders", "numbers_are_those_of_the_reference"),
    ),
    Mutant(
        "_residual.py",
        "jnp.asarray(-node.start.b, node.b.dtype)",
        "jnp.asarray(node.start.b, node.b.dtype)",
        "the part that PiSSA took out of W is added to the saved adapter, not taken away",
        tests_in("residual", "the_saved_adapter_belongs_beside_the_plain_model"),
    ),
    Mutant(
        "_residual.py",
        "    return w - update_of(node, w.dtype)",
        "    return w",
        "PiSSA leaves in W what it puts into A and B",
        tests_in("residual", "the_function_is_the_same_and_the_tree_says_what_was_taken"),
    ),
    Mutant(
        "_forward/lazy.py",
        "    if name in TAKING_IN or name in PRODUCTS:",
        "    if name in PRODUCTS:",
        "a stack that a loop takes in is dequantized ahead of it",
        tests_in("quantized_forward", "no_stack_is_alive_in_sixteen_bits"),
    ),
    Mutant(
        "_forward/integers.py",
        "        return multiply(x, codes, w), bind(eqn, operands)[0]",
        "        return multiply(x, codes, w), multiply(tangents[0], codes, w)",
        "the gradient of activations is rounded as they are",
        tests_in("integer_products", "the_derivative_passes_the_rounding_by"),
    ),
    Mutant(
        "_forward/integers.py",
        "    if codes is None or any(codes.scales.shape[k] != 1 for k in contracting[side]):",
        "    if codes is None:",
        "a transposed kernel has its scales of each output taken out of a sum over the outputs",
        tests_in("integer_products", "where_products_stay_of_floats"),
    ),
    Mutant(
        "_forward/integers.py",
        "    return lax.transpose(scales, (*range(kept), *(kept + k for k in step.arguments[0])))",
        "    return scales",
        "scales don't follow the kernel through a transpose",
        tests_in("integer_products", "where_products_stay_of_floats", "functions_of_the_battery[transposed]"),
    ),
    Mutant(
        "_forward/integers.py",
        "jnp.max(jnp.abs(wide), axis=tuple(contracted), keepdims=True)",
        "jnp.max(jnp.abs(wide), keepdims=True)",
        "all rows of activations share the largest one's scale",
        tests_in("integer_products", "numbers_written_out", "functions_of_the_battery[dense]"),
    ),
    Mutant(
        "checkpoint/_state.py",
        "    rounding = [(path, node) for path, node in nodes if is_quantized(node) and node.activations is not None]",
        "    rounding = []",
        "a run goes on with other products than it had",
        tests_in("integer_products", "the_tree_says_it"),
    ),
]
