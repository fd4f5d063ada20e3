"""The `lora_alpha` under which PEFT computes the scale that a module has."""

import math
from collections.abc import Mapping


def alphas_of(ranks: Mapping[str, int], scales: Mapping[str, float]) -> tuple[bool, dict[str, float]]:
    """Choose between alpha/rank and alpha/√rank, and find each module's alpha: a whole number where one gives such.

    Returns:
        `(use_rslora, alphas)`: whether the scale is alpha/√rank, and each module's alpha.

    >>> alphas_of({"q_proj": 4}, {"q_proj": 2.0}), alphas_of({"q_proj": 8}, {"q_proj": 16 / 8**0.5})
    ((False, {'q_proj': 8.0}), (True, {'q_proj': 16.0}))
    """
    for stabilized in (False, True):
        divisors = {module: math.sqrt(rank) if stabilized else rank for module, rank in ranks.items()}
        alphas = {module: round(scales[module] * divisors[module]) for module in ranks}
        # A float32 scale is within half an ulp of alpha/rank; one ulp more for a division done in float32.
        if all(math.isclose(alphas[m] / divisors[m], scales[m], rel_tol=2**-22) for m in ranks):
            return stabilized, {module: float(alpha) for module, alpha in alphas.items()}
    return False, {module: scales[module] * rank for module, rank in ranks.items()}
