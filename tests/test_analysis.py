"""The measures of section 7 against a plain numpy reading of the paper, and against planted truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig, analysis
from lora_jax.analysis import _svd

PLAIN = Axes()


def node(a, b, scale=1.0, axes=PLAIN):
    return LoRA(a=jnp.asarray(a), b=jnp.asarray(b), scale=scale, axes=axes)


def orthonormal(rng, features, count):
    return np.linalg.qr(rng.standard_normal((features, count)))[0]


def paper_similarity(a, other):
    """Section 7.2, equation 4, word for word: A is r × d, U_A are its right singular vectors."""
    u = np.linalg.svd(a)[2]
    v = np.linalg.svd(other)[2]
    table = np.empty((len(a), len(other)))
    for i in range(1, len(a) + 1):
        for j in range(1, len(other) + 1):
            table[i - 1, j - 1] = np.linalg.norm(u[:i] @ v[:j].T) ** 2 / min(i, j)
    return table


def test_similarity_reads_as_the_paper_does():
    rng = np.random.default_rng(0)
    a, other = rng.standard_normal((3, 20)), rng.standard_normal((7, 20))
    np.testing.assert_allclose(analysis.subspace_similarity(a.T, other.T), paper_similarity(a, other), atol=1e-12)


def test_similarity_finds_a_planted_overlap():
    """Two of the left's three directions lie in the right's span: φ(3, 4) = 2 / 3."""
    rng = np.random.default_rng(1)
    basis = orthonormal(rng, 64, 5)
    left = basis[:, :3] * np.array([3.0, 2.0, 1.0])
    right = np.concatenate([basis[:, :2], basis[:, 3:]], 1) @ rng.standard_normal((4, 4))
    phi = analysis.subspace_similarity(left.astype(np.float32), right.astype(np.float32))
    np.testing.assert_allclose(phi[:, -1], [1.0, 1.0, 2 / 3], atol=1e-5)


def test_similarity_counts_no_direction_that_is_not_there():
    """A factor padded with zero columns (or a B still at zero) has no more directions than it spans."""
    rng = np.random.default_rng(2)
    padded = np.pad(rng.standard_normal((16, 2)), [(0, 0), (0, 2)])
    phi = analysis.subspace_similarity(padded, padded)
    np.testing.assert_allclose(np.diag(phi), [1.0, 1.0, 2 / 3, 2 / 4], atol=1e-12)
    assert not analysis.subspace_similarity(np.zeros((16, 2)), padded).any()


def test_similarity_keeps_the_stack():
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((4, 12, 2)), rng.standard_normal((4, 12, 3))
    phi = analysis.subspace_similarity(left, right)
    assert phi.shape == (4, 2, 3)
    np.testing.assert_allclose(phi[2], paper_similarity(left[2].T, right[2].T), atol=1e-12)


def test_random_similarity_is_the_share_of_the_space():
    phi = analysis.random_similarity(jax.random.key(0), 512, 8, 64)
    assert abs(phi[-1, -1] - 64 / 512) < 0.02


@pytest.mark.parametrize("bad", [np.ones((4, 2)), np.ones(5), np.full((5, 2), np.nan)])
def test_similarity_refuses_what_cannot_be_compared(bad):
    with pytest.raises(ValueError, match=r"shape"):
        analysis.subspace_similarity(np.ones((5, 2)), bad)


def paper_amplification(w, delta, rank):
    """Table 7: W is out × in; U and V hold the top left and right singular vectors."""
    u, _, vt = np.linalg.svd(delta)
    own_u, _, own_vt = np.linalg.svd(w)
    projected = np.linalg.norm(u[:, :rank].T @ w @ vt[:rank].T)
    own = np.linalg.norm(own_u[:, :rank].T @ w @ own_vt[:rank].T)
    return projected, own, np.linalg.norm(delta) / projected


def test_amplification_reads_as_the_paper_does():
    rng = np.random.default_rng(4)
    w, a, b = (rng.standard_normal(shape) for shape in [(20, 30), (20, 3), (3, 30)])
    found = analysis.amplification(jax.random.key(0), w, node(a, b, 2.0))
    a32, b32 = np.float32(a).astype(float), np.float32(b).astype(float)
    projected, own, factor = paper_amplification(w.T, (2 * a32 @ b32).T, 3)
    np.testing.assert_allclose([found.projected, found.projected_own, found.factor], [projected, own, factor], 1e-6)


def test_amplification_finds_a_planted_factor():
    """W holds 0.25 along a direction that the update moves by 5: the factor is 20."""
    rng = np.random.default_rng(5)
    u, v = orthonormal(rng, 48, 48), orthonormal(rng, 32, 32)
    w = (u[:, :32] * np.linspace(4, 0.25, 32)) @ v.T
    found = analysis.amplification(jax.random.key(0), w, node(u[:, 31:32] * 5, v[:, 31:32].T))
    np.testing.assert_allclose(found.factor, 20.0, rtol=1e-5)
    assert found.projected_own == pytest.approx(4.0)
    assert found.delta_norm == pytest.approx(5.0, rel=1e-6)


def test_amplification_of_a_random_projection():
    """For an isotropic W each of the r × r entries has W's own mean square."""
    w = np.random.default_rng(6).standard_normal((256, 256))
    a, b = np.random.default_rng(7).standard_normal((2, 256, 16))
    found = analysis.amplification(jax.random.key(1), w, node(a, b.T))
    assert found.projected_random == pytest.approx(16.0, rel=0.15)


def test_amplification_of_stacked_kernels_with_unequal_ranks():
    """A stack axis that is not the first, zero padding in one layer, scale 0 in another."""
    rng = np.random.default_rng(8)
    w = rng.standard_normal((10, 3, 12))
    a, b = rng.standard_normal((3, 10, 4)), rng.standard_normal((3, 4, 12))
    a[1, :, 2:], b[1, 2:] = 0, 0
    lora = node(a, b, np.array([1.0, 2.0, 0.0]), Axes(stack=(1,), inputs=(0,), outputs=(2,)))
    found = analysis.amplification(jax.random.key(0), w, lora)
    alone = analysis.amplification(jax.random.key(0), w[:, 1], node(a[1, :, :2], b[1, :2], 2.0))
    assert found.projected.shape == (3,)
    assert np.isnan(found.factor[2])
    np.testing.assert_allclose([found.projected[1], found.factor[1]], [alone.projected, alone.factor], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_large_kernels_take_a_krylov_space_and_agree_with_known_values(decay, monkeypatch):
    """Values that hardly differ are the hardest to tell apart. LAPACK is never asked."""
    rng = np.random.default_rng(9)
    values = np.linspace(2, 1, 300) * np.arange(1, 301) ** -decay
    w = (orthonormal(rng, 310, 300) * values) @ orthonormal(rng, 300, 300).T
    monkeypatch.setattr(_svd, "FULL_SVD_LIMIT", 256)
    monkeypatch.setattr(_svd, "singular_values", None)
    np.testing.assert_allclose(_svd.top_singular_values(w, 4), values[:4], rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("rank", [3, 300])
def test_large_kernels_of_any_size_and_rank(size, rank, monkeypatch):
    """A zero kernel, fewer directions than are asked for, and values whose squares float32 doesn't hold."""
    rng = np.random.default_rng(10)
    values = size * np.pad(np.linspace(2, 1, rank) ** 3, (0, 300 - rank))
    w = (orthonormal(rng, 310, 300) * values) @ orthonormal(rng, 300, 300).T
    monkeypatch.setattr(_svd, "FULL_SVD_LIMIT", 256)
    found = _svd.top_singular_values(w, 6)
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(values[:6]), rtol=1e-5)


def test_values_that_never_settle_are_asked_of_lapack(monkeypatch):
    w = np.random.default_rng(13).standard_normal((310, 300))
    monkeypatch.setattr(_svd, "FULL_SVD_LIMIT", 256)
    monkeypatch.setattr(_svd, "MOST_BLOCKS", 2)
    np.testing.assert_allclose(_svd.top_singular_values(w, 2), np.linalg.svd(w, compute_uv=False)[:2], rtol=1e-9)


def test_no_decomposition_is_of_an_updates_size(monkeypatch):
    """Of an update of 310 × 300 at rank 3, every SVD and QR is of a factor, or of 3 × 3."""
    rng, sizes = np.random.default_rng(14), []
    for name in ("svd", "qr"):
        real = getattr(np.linalg, name)
        monkeypatch.setattr(
            np.linalg, name, lambda x, *a, real=real, **k: (sizes.append(np.shape(x)), real(x, *a, **k))[1]
        )
    monkeypatch.setattr(_svd, "FULL_SVD_LIMIT", 256)
    lora = node(np.float32(rng.standard_normal((310, 3))), np.float32(rng.standard_normal((3, 300))))
    analysis.spectrum(lora)
    analysis.subspace_similarity(*(analysis.matrices(lora)[0],) * 2)
    assert sizes
    w = rng.standard_normal((310, 300))
    analysis.amplification(jax.random.key(0), w, lora)
    assert max(min(size) for size in sizes) <= 3 + _svd.OVERSAMPLED


def test_amplification_refuses_another_kernels_node():
    with pytest.raises(ValueError, match="does not fit"):
        analysis.amplification(jax.random.key(0), np.ones((4, 4)), node(np.ones((5, 2)), np.ones((2, 4))))


def test_spectrum_of_an_update_comes_from_its_factors():
    rng = np.random.default_rng(10)
    a, b = rng.standard_normal((2, 18, 4)), rng.standard_normal((2, 4, 14))
    lora = node(a, b, np.array([0.5, 2.0]), Axes(stack=(0,), inputs=(1,), outputs=(2,)))
    delta = np.asarray(lora.scale)[:, None, None] * (np.float32(a).astype(float) @ np.float32(b))
    expected = np.linalg.svd(delta, compute_uv=False)[:, :4]
    np.testing.assert_allclose(analysis.spectrum(lora).singular_values, expected, rtol=1e-6)


def test_spectrum_of_planted_values():
    rng = np.random.default_rng(11)
    values = np.array([4.0, 2.0, 1.0, 0.0])
    w = (orthonormal(rng, 9, 4) * values) @ orthonormal(rng, 7, 4).T
    found = analysis.spectrum(w)
    np.testing.assert_allclose(found.singular_values[:4], values, atol=1e-12)
    p = values[:3] / 7
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert found.stable_rank == pytest.approx(21 / 16)
    assert [int(found.energy_rank(share)) for share in (0.7, 0.9, 0.99, 1.0)] == [1, 2, 3, 3]


def test_rank_deficiency_shows():
    """A rank-8 adapter whose update spans two directions has two singular values."""
    rng = np.random.default_rng(12)
    a = rng.standard_normal((20, 2)) @ rng.standard_normal((2, 8))
    found = analysis.spectrum(node(np.float32(a), rng.standard_normal((8, 20))))
    assert int(found.energy_rank(0.999999)) == 2


def test_dora_is_not_taken_for_lora():
    dora = node(np.ones((5, 2)), np.ones((2, 5))).replace(magnitude=jnp.ones(5))
    with pytest.raises(ValueError, match="DoRA"):
        analysis.spectrum(dora)


def test_zero_update_has_rank_zero():
    found = analysis.spectrum(node(np.ones((5, 2)), np.zeros((2, 5))))
    assert not found.singular_values.any()
    assert found.effective_rank == 0 == found.stable_rank == found.energy_rank(0.9)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_energy_rank_refuses_a_share_outside_the_unit(share):
    with pytest.raises(ValueError, match="expected a share of the energy"):
        analysis.spectrum(np.eye(2)).energy_rank(share)


# Before training ----------------------------------------------------------------------------------------------------


def linear(params, x):
    """Kernels with a stack and with axes in another order, whose gradients are known by hand."""
    return sum(x @ w for w in params["stacked"]["kernel"]) + jnp.einsum("ti,oi->to", x, params["turned"]["kernel"])


def scored(rank, batches, seed=1):
    rng = np.random.default_rng(20)
    base = {
        "stacked": {"kernel": jnp.asarray(rng.standard_normal((2, 12, 9)), jnp.float32)},
        "turned": {"kernel": jnp.asarray(rng.standard_normal((9, 12)), jnp.float32)},
    }
    config = LoRAConfig(rank=3, alpha=3, targets=("stacked", "turned"))
    axes = {"stacked/kernel": Axes((0,), (1,), (2,)), "turned/kernel": Axes((), (1,), (0,))}
    params = lora_jax.init(jax.random.key(0), base, config, axes=axes)
    apply = lora_jax.adapt(linear)

    def loss(params, batch):
        return (apply(params, batch[0]) * batch[1]).sum()

    return analysis.gradient_scores(jax.random.key(seed), loss, params, batches, rank=rank)


def linear_batches(tokens, count=2):
    rng = np.random.default_rng(21)
    return [
        (np.float32(rng.standard_normal((tokens, 12))), np.float32(rng.standard_normal((tokens, 9))))
        for _ in range(count)
    ]


def test_score_is_the_energy_of_the_gradients_top_directions():
    """The gradient of the three kernels is xᵀy, averaged over batches: of rank 4, so that the sketch is exact."""
    batches = linear_batches(tokens=2)
    values = np.linalg.svd(np.mean([x.T @ y for x, y in batches], axis=0), compute_uv=False)
    found = scored(2, batches)
    assert found.keys() == {"stacked/kernel", "turned/kernel"}
    assert found["stacked/kernel"].best.shape == (2,)
    expected = np.linalg.norm(values[:2])
    np.testing.assert_allclose(found["stacked/kernel"].best, expected, rtol=1e-5)
    np.testing.assert_allclose(found["turned/kernel"].best, expected, rtol=1e-5)


def test_no_update_of_that_rank_and_norm_does_better():
    (x, y), *_ = batches = linear_batches(tokens=3, count=1)
    best = scored(2, batches)["turned/kernel"].best
    u, s, vt = np.linalg.svd(x.T @ y)
    update = (u[:, :2] * s[:2]) @ vt[:2]
    assert np.sum(x.T @ y * update) / np.linalg.norm(update) == pytest.approx(best, rel=1e-5)
    rng = np.random.default_rng(22)
    for _ in range(50):
        other = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 9))
        assert np.sum(x.T @ y * other) / np.linalg.norm(other) < best


@pytest.mark.slow
def test_first_step_and_norm_are_means_over_draws_of_a():
    """Of three kernels with one gradient, so of three draws."""
    (x, y), *_ = batches = linear_batches(tokens=40, count=1)
    gradient = x.T @ y
    found = scored(4, batches).values()
    assert np.mean([score.norm.mean() for score in found]) == pytest.approx(np.linalg.norm(gradient), rel=0.1)
    # E|aᵀg| of a standard normal a is √(2/π) ‖g‖
    steps = 4 * np.sqrt(2 / np.pi) * np.linalg.norm(gradient, axis=0).sum()
    assert np.mean([score.first_step.mean() for score in found]) == pytest.approx(steps, rel=0.1)


def test_score_of_a_gradient_of_full_rank_is_close():
    x, y = np.float32(np.diag(0.5 ** np.arange(12.0))), np.float32(np.eye(12, 9))
    found = scored(1, [(x, y)])["turned/kernel"].best
    assert found == pytest.approx(1.0, rel=0.05)


def test_what_cannot_be_scored_is_said():
    with pytest.raises(ValueError, match="batches: none given"):
        scored(1, [])
    with pytest.raises(ValueError, match="rank: 0 given"):
        scored(0, linear_batches(2))
    with pytest.raises(ValueError, match=r"gradient of .*kernel .* not finite"):
        scored(1, [(np.full((1, 12), np.inf, np.float32), np.ones((1, 9), np.float32))])
    with pytest.raises(ValueError, match="there is no node"):
        analysis.gradient_scores(jax.random.key(0), linear, {"w": jnp.eye(2)}, [], rank=1)
