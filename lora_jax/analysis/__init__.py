"""Measures of how ΔW relates to W, from section 7 of the LoRA paper (Hu et al. 2021, arXiv 2106.09685).

    phi = lora_jax.analysis.subspace_similarity(node.a, other.a)        # figures 3 and 4
    table7 = lora_jax.analysis.amplification(key, kernel, node)
    found = lora_jax.analysis.spectrum(node)                            # or spectrum(kernel)
    scores = lora_jax.analysis.gradient_scores(key, loss_fn, params, batches, rank=8)   # before training

The first three run on the host in float64, from the factors alone where that is possible: the singular vectors of ΔW
are computed by thin QR decompositions of A and B and one rank × rank SVD, so that a 4096 × 4096 kernel costs as much as
a matrix of 4096 × rank.

Shapes follow the tree's convention (`a`: inputs × rank, `b`: rank × outputs), which is the transpose of the paper's
(A: r × in, B: out × r). Frobenius norms and subspaces are the same in both. The paper's left singular vectors of ΔW are
those on the side of our outputs.
"""

from lora_jax.analysis._amplification import Amplification as Amplification
from lora_jax.analysis._amplification import amplification as amplification
from lora_jax.analysis._gradient import GradientScore as GradientScore
from lora_jax.analysis._gradient import gradient_scores as gradient_scores
from lora_jax.analysis._similarity import random_similarity as random_similarity
from lora_jax.analysis._similarity import subspace_similarity as subspace_similarity
from lora_jax.analysis._spectrum import Spectrum as Spectrum
from lora_jax.analysis._spectrum import spectrum as spectrum
from lora_jax.analysis._svd import matrices as matrices
