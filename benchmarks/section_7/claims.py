"""The paper's claims: its values, ours, and whether ours agree. Section and table numbers are the paper's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pictures import short
from results import SCORES, TITLES, Results
from statistics_of import Difference, difference, spread

ONE_SEED = "not reported, of one seed,"


class Claim(NamedTuple):
    """One row of the page's first table."""

    said: str
    theirs: str
    ours: str
    held: str


def claims(results: Results) -> list[Claim]:
    """The claims for which there are results."""
    return [*_budget(results), *_ranks(results), *_alpha(results), *_subspaces(results), *_prefix(results)]


# --- differences of dev losses, task by task -------------------------------------------------------------------------


def _lower(found: Difference) -> str:
    """The verdict on a claim that a difference is negative."""
    return ONE_SEED if found.seeds < 2 else {-1: "yes", 0: "undecided", 1: "no"}[found.sign]


def _not_higher(found: Difference) -> str:
    """The verdict on a claim that a difference isn't positive."""
    return ONE_SEED if found.seeds < 2 else {-1: "yes", 0: "not contradicted", 1: "no"}[found.sign]


def by_task(
    results: Results, of: Callable[[str, str], Difference | None], verdict: Callable[[Difference], str]
) -> tuple[str, str]:
    """A claim on a difference for each task, with its values and verdicts; `of` returns it for a task and a metric.

    Verdicts are on the dev loss. Scores are shown beside it; for them the claim is that the difference is positive.
    """
    parts, held, scored = [], {}, {}
    for task in results.tasks:
        loss = of(task, "dev_loss")
        if loss is None:
            continue
        parts.append(f"{TITLES[task]} {loss}")
        held[TITLES[task]] = verdict(loss)
        score = of(task, "score")
        if score is not None and task in SCORES:
            scored[TITLES[task]] = verdict(Difference(-score.mean, score.half, score.seeds))
    return "; ".join(parts), f"by dev loss {_grouped(held)}; by score {_grouped(scored)}"


def _grouped(held: Mapping[str, str]) -> str:
    """
    >>> _grouped({"CoLA": "yes", "MNLI": "no", "MRPC": "yes"})
    'yes on CoLA, MRPC, no on MNLI'
    """
    verdicts = dict.fromkeys(held.values())
    if len(verdicts) == 1 and len(held) > 2:
        return f"{next(iter(verdicts))} on all {len(held)}"
    return ", ".join(f"{one} on {', '.join(name for name, own in held.items() if own == one)}" for one in verdicts)


def _budget(results: Results) -> Iterator[Claim]:
    def two_kinds(*of: str) -> Difference | None:
        return _between(results, of, ("q,v", 4), ("q", 8))

    def many_kinds(*of: str) -> Difference | None:
        best = _best_single(results, of[0])
        return None if best is None else _between(results, of, ("q,k,v,o", 2), (best, 8))

    yield Claim(
        "All parameters in ΔW_q are worse than the same number in q,v (7.1)",
        "WikiSQL 70.4 against 73.7, MNLI 91.0 against 91.3 (table 5)",
        *_said("dev loss of q,v at 4 minus q at 8: ", by_task(results, two_kinds, _lower)),
    )
    yield Claim(
        "More kinds at a low rank are better than one kind at a high one (7.1)",
        "q,k,v,o at 2: 73.7 and 91.7; the best single kind, o at 8: 73.2 and 91.3 (table 5)",
        *_said("dev loss of q,k,v,o at 2 minus the best single kind at 8: ", by_task(results, many_kinds, _lower)),
    )


def _ranks(results: Results) -> Iterator[Claim]:
    yield Claim(
        "A rank as small as one suffices for q,v (7.2)",
        "WikiSQL 73.4 at 1, 73.5 at 64; MNLI 91.3, 91.4 (table 6)",
        *_said(
            "dev loss of q,v at 1 minus at 64: ",
            by_task(results, lambda *of: _between(results, of, ("q,v", 1), ("q,v", 64)), _not_higher),
        ),
    )
    yield Claim(
        "q alone needs a larger rank (7.2)",
        "WikiSQL 68.8 at 1, 70.5 at 4, 70.0 at 64; MNLI 90.7, 91.1, 90.7 (table 6)",
        *_said(
            "dev loss of q at 64 minus at 1: ",
            by_task(results, lambda *of: _between(results, of, ("q", 64), ("q", 1)), _lower),
        ),
    )


def _said(what: str, found: tuple[str, str]) -> tuple[str, str]:
    return what + found[0], found[1]


def _between(results: Results, of: tuple[str, ...], one: tuple[str, int], other: tuple[str, int]) -> Difference | None:
    """The difference of two points, given as targets and ranks, for a task and a metric, `of`."""
    task, figure = of
    ours, theirs = (results.grid(task, *point, figure) for point in (one, other))
    return difference(ours, theirs) if ours and theirs else None


def _best_single(results: Results, task: str) -> str | None:
    """The one of q, k, v and o that has the lowest mean dev loss at rank 8."""
    found = {name: results.grid(task, name, 8) for name in "qkvo"}
    means = {name: np.mean(list(losses.values())) for name, losses in found.items() if losses}
    return min(means, key=lambda name: means[name]) if means else None


# --- the others ------------------------------------------------------------------------------------------------------


def _alpha(results: Results) -> Iterator[Claim]:
    if results.rows("place", "cola"):
        far = max(results.named("place", "place", "as a learning rate of A and B", "apart").values())
        near = max(results.named("place", "place", "as a learning rate of B", "apart").values())
        yield Claim(
            "Under Adam, tuning α is roughly tuning the learning rate (4.1)",
            "no figure",
            "CoLA: α as B's learning rate: "
            + (f"losses within {near:.1g}, relative" if near else "equal bit for bit")
            + f"; as that of A and B: losses differ by up to {far:.0%}",
            "yes, of B's alone" if near < 1e-2 else "no",
        )


def _subspaces(results: Results) -> Iterator[Claim]:
    runs = results.runs("subspaces")
    found = {
        f"ΔW_{short(path)[0]} of {TITLES[task]}": kernel
        for task in TITLES if task in runs for path, kernel in runs[task]["kernels"].items()
    }  # fmt: skip
    if not found:
        return

    kinds = dict.fromkeys(name.split()[0] for name in found)

    def claim(
        said: str,
        theirs: str,
        figures: Mapping[str, Callable[[dict], list[float]]],
        rule: str,
        holds: Callable[..., bool],
        over: str = "seeds",
    ) -> Claim:
        """A claim on `figures`: functions that return a kernel's values by seed, or by pair of seeds.

        `holds` takes one seed's values, in the order of `figures`.
        """
        parts = []
        for kind in kinds:
            of_kind = [kernel for name, kernel in found.items() if name.split()[0] == kind]
            ranges = (_range([x for kernel in of_kind for x in figure(kernel)]) for figure in figures.values())
            parts.append(f"{kind}: " + ", ".join(f"{what} {each}" for what, each in zip(figures, ranges, strict=True)))
        held = {
            name: _verdict(
                [holds(*each) for each in zip(*(figure(kernel) for figure in figures.values()), strict=True)], over
            )
            for name, kernel in found.items()
        }
        return Claim(said, theirs, f"over tasks and {over}, {'; '.join(parts)}; held where {rule}", _grouped(held))

    def phi(name: str, i: int) -> Callable[[dict], list[float]]:
        return lambda kernel: [float(np.mean(layers)) for layers in kernel[name][str(i)]]

    def amplification(name: str, rank: int = 4) -> Callable[[dict], list[float]]:
        return lambda kernel: [float(np.mean(layers)) for layers in kernel["amplification"][str(rank)][name]]

    def own(kernel: dict) -> list[float]:
        """W's own value, which is the same for all seeds."""
        return amplification("projected_own")(kernel) * len(amplification("projected")(kernel))

    def random(kernel: dict) -> list[float]:
        """The value that random subspaces seldom exceed."""
        draws = amplification("projected_random")(kernel)
        return [float(np.mean(draws) + 2 * np.std(draws, ddof=1))] * len(amplification("projected")(kernel))

    yield claim(
        "The top direction of rank 8 lies in rank 64's, the others don't (7.2, figure 3)",
        "φ above 0.5 for the first direction, in a subspace of dimension 1",
        {"φ(1, 1) is": phi("ranks_top", 1), "φ(8, 8)": phi("ranks_top", 8)},
        "φ(1, 1) > 0.5 > φ(8, 8)",
        lambda first, eighth: first > 0.5 > eighth,
    )
    yield claim(
        "Two seeds of rank 64 share top directions, two random matrices don't (7.2, figure 4)",
        "a common subspace; none for random matrices (a picture)",
        {"φ(1, 1) is": phi("seeds_top", 1), "of random matrices": phi("random_top", 1)},
        "φ(1, 1) > 0.5 and that of random matrices < 0.1",
        lambda seeds, random: seeds > 0.5 and random < 0.1,
        over="pairs",
    )
    yield from _more_of_q_than_of_v(runs)
    yield claim(
        "ΔW lies more in W than a random matrix does, but not in W's top directions (7.3, table 7)",
        "‖UᵀWVᵀ‖ at rank 4: 0.32; random 0.02; W's own 21.67",
        {"‖UᵀWVᵀ‖ is": amplification("projected"), "of random subspaces, mean + 2 standard deviations,": random,
         "W's own": own},
        "it lies between that of random subspaces and half of W's own",
        lambda ours, random, own: random < ours < 0.5 * own,
    )  # fmt: skip
    yield claim(
        "ΔW amplifies what W has there, and more so at the lower rank (7.3, table 7)",
        "‖ΔW‖ / ‖UᵀWVᵀ‖ = 21.5 at rank 4, 1.9 at rank 64",
        {"at rank 4 it is": amplification("factor"), "at rank 64": amplification("factor", 64)},
        "it is above 1 and above that at rank 64",
        lambda low, high: low > max(1, high),
    )


def _more_of_q_than_of_v(runs: Mapping[str, Any]) -> Iterator[Claim]:
    """The second claim of figure 4: ΔW_q has more common directions than ΔW_v."""
    parts, held = [], {}
    for task in (task for task in TITLES if task in runs):
        shared = {
            short(path)[0]: [float(np.mean(layers)) for layers in kernel["seeds_top"]["1"]]
            for path, kernel in runs[task]["kernels"].items()
        }
        more = [q - v for q, v in zip(shared["q"], shared["v"], strict=True)]
        parts.append(f"{TITLES[task]} {spread(more, 2)}")
        held[TITLES[task]] = _verdict([each > 0 for each in more], "pairs")
    yield Claim(
        "Two seeds share more of ΔW_q than of ΔW_v (7.2, figure 4)",
        "a picture",
        f"φ(1, 1) of ΔW_q minus that of ΔW_v, over pairs: {'; '.join(parts)}",
        _grouped(held),
    )


def _verdict(held: Sequence[bool], over: str) -> str:
    """
    >>> _verdict([True, True], "seeds"), _verdict([False, False], "seeds"), _verdict([True, False, True], "pairs")
    ('yes', 'no', 'for 2 of 3 pairs')
    """
    return "yes" if all(held) else f"for {sum(held)} of {len(held)} {over}" if any(held) else "no"


def _range(values: Sequence[float]) -> str:
    """
    >>> _range([0.271, 0.5, 0.333]), _range([23.18, 24.0])
    ('0.27 to 0.50', '23.2 to 24.0')
    """
    digits = 1 if min(values) >= 2 else 2
    ends = [f"{value:.{digits}f}" for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _prefix(results: Results) -> Iterator[Claim]:
    both, lora = (results.named("prefix", "name", name, "dev_loss") for name in ("both", "LoRA"))
    if both:
        found = difference(both, lora)
        scores = (spread(list(results.named("prefix", "name", name, "score").values())) for name in ("both", "LoRA"))
        yield Claim(
            "LoRA with prefix embeddings is better than LoRA (8, appendix E)",
            "better on WikiSQL, not on MNLI",
            f"CoLA: dev loss of both minus LoRA {found}; Matthews {' and '.join(scores)}",
            _lower(found),
        )
