"""Agreement with a reference, leaf by leaf: |ours − ref64| ≤ max(4·|ref32 − ref64|, 1e-5·max|ref64|).

`ref64` and `ref32` are the reference run in float64 and float32. What the reference's own rounding costs is what ours
may cost; a fixed tolerance is too strict for a deep model (torch itself is 5e-5 off float64 at 30M parameters) and too
weak for a tiny one. |ref32 − ref64| is the leaf's largest: that one entry happens to round well says nothing of us.
"""

import jax
import numpy as np


def tolerance(ref32, ref64) -> float:
    """How far from `ref64` an entry of the leaf may be."""
    ref32, ref64 = np.asarray(ref32, np.float64), np.asarray(ref64, np.float64)
    return max(4 * np.max(np.abs(ref32 - ref64), initial=0), 1e-5 * np.max(np.abs(ref64), initial=0))


def disagreements(ours, ref32, ref64) -> list[str]:
    """One line for each leaf of `ours` that is too far from the reference, or of another shape, or not finite.

    The three are trees of one structure (a bare array is one).

    >>> disagreements({"w": np.ones(3)}, {"w": np.ones(3)}, {"w": np.ones(3)})
    []
    >>> disagreements({"w": np.ones(3)}, {"w": np.full(3, 2.0)}, {"w": np.full(3, 2.0)})
    ["['w']: off by 1, allowed 2e-05; largest 2"]
    """
    assert jax.tree.structure(ours) == jax.tree.structure(ref32) == jax.tree.structure(ref64)
    found = []
    rows = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(ref32), jax.tree.leaves(ref64), strict=True)
    for (path, mine), low, high in rows:
        mine, high = np.asarray(mine, np.float64), np.asarray(high, np.float64)
        name = jax.tree_util.keystr(path) or "array"
        if mine.shape != high.shape:
            found.append(f"{name}: shape {mine.shape}, expected {high.shape}")
            continue
        allowed, off = tolerance(low, high), np.max(np.abs(mine - high), initial=0)
        if not off <= allowed:  # NaN too
            found.append(f"{name}: off by {off:.3g}, allowed {allowed:.3g}; largest {np.max(np.abs(high)):.3g}")
    return found


def assert_agrees(ours, ref32, ref64) -> None:
    """Fail with every leaf that disagrees."""
    found = disagreements(ours, ref32, ref64)
    assert not found, "\n".join(found)
