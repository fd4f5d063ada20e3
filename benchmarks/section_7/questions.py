# ruff: noqa: E501
"""The questions of section 7 with answers as text, which come from the results alone."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from pictures import short
from results import NOTHING, SCORES, TITLES, Figures, Results
from statistics_of import Difference, difference, spread

SINGLES = ("q", "k", "v", "o")
NOT_RUN = "Not measured in this run."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lower(name: str, other: str, found: Difference) -> str:
    """The one of two that has the lower loss, if the interval of their difference decides it."""
    if math.isnan(found.half):
        return f"{name} minus {other}: {found.mean:+.4f}, of one seed, which says nothing of chance"
    verdicts = {
        -1: f"{name} is lower",
        1: f"{other} is lower",
        0: "the interval holds zero, so neither is shown to be lower",
    }
    return f"{name} minus {other}: {found} ({verdicts[found.sign]})"


# --- tables 5 and 6 --------------------------------------------------------------------------------------------------


def table_5(results: Results) -> str:
    budget = [("q", 8), ("k", 8), ("v", 8), ("o", 8), ("q,k", 4), ("q,v", 4), ("q,k,v,o", 2)]
    rows = []
    for task in results.tasks:
        points = [(NOTHING, 0), *(point for point in budget if results.grid(task, *point))]
        for targets, rank in points:
            losses = results.grid(task, targets, rank)
            if losses:
                rows.append(
                    [
                        TITLES[task],
                        targets,
                        str(rank or "–"),
                        _trainable(results, task, targets, rank),
                        spread(list(losses.values()), 4),
                        spread(list(results.grid(task, targets, rank, "score").values())),
                        str(len(losses)),
                    ]
                )
    text = table(["task", "adapted", "rank", "parameters", "dev loss", "score", "seeds"], rows) if rows else NOT_RUN
    return text + (
        "\n\nThe score is Matthews' correlation on CoLA, the share of greedy queries with the gold logical form on WikiSQL "
        "(conditions as a set), and accuracy elsewhere. `parameters` counts A and B and not the head, which all have "
        "alike. `nothing` trains the head alone, and on WikiSQL nothing at all."
    )


def _trainable(results: Results, task: str, targets: str, rank: int) -> str:
    if targets == NOTHING:
        return "0"
    return f"{next(iter(results.grid(task, targets, rank, 'trainable').values())):,}"


def table_6(results: Results) -> str:
    parts = []
    for task in results.tasks:
        points = results.points(task)
        if len({rank for _, rank in points}) <= 3:
            continue
        ranks = sorted({rank for _, rank in points})
        rows = [
            [targets, *(spread(list(results.grid(task, targets, rank).values()), 4) for rank in ranks)]
            for targets in ("q", "q,v", "q,k,v,o")
        ]
        parts.append(f"{TITLES[task]}, dev loss:\n\n" + table(["adapted", *(f"r = {rank}" for rank in ranks)], rows))
        if task in SCORES:
            rows = [
                [targets, *(spread(list(results.grid(task, targets, rank, "score").values())) for rank in ranks)]
                for targets in ("q", "q,v", "q,k,v,o")
            ]
            parts.append(
                f"{TITLES[task]}, {SCORES[task]}:\n\n" + table(["adapted", *(f"r = {r}" for r in ranks)], rows)
            )
    return "\n\n".join(parts) or NOT_RUN


# --- the reader's questions ------------------------------------------------------------------------------------------


def is_alpha_a_rate(results: Results) -> str:
    rows = results.rows("alpha", "cola")
    if not rows:
        return NOT_RUN
    alphas, rates = (sorted({row[name] for _, row in rows}) for name in ("alpha", "learning_rate"))

    def at(alpha: float, rate: float, figure: str = "dev_loss") -> Figures:
        return {seed: row[figure] for seed, row in rows if (row["alpha"], row["learning_rate"]) == (alpha, rate)}

    cells = [[f"α = {alpha:g}", *(spread(list(at(alpha, rate).values()), 4) for rate in rates)] for alpha in alphas]
    text = table(["dev loss", *(f"rate {rate:g}" for rate in rates)], cells)
    products: dict[float, list[float]] = {}
    for alpha in alphas:
        for rate in rates:
            products.setdefault(round(alpha * rate, 9), []).append(float(np.mean(list(at(alpha, rate).values()))))
    within = [max(each) - min(each) for each in products.values() if len(each) > 1]
    means = [np.mean(each) for each in products.values()]
    if within:
        text += (
            f"\n\nIf α were only a factor of the learning rate, cells of one product α · rate would be equal. They differ "
            f"by up to {max(within):.4f}; the means over products differ by up to {max(means) - min(means):.4f}."
        )
    return text


def where_the_scale_is(results: Results) -> str:
    rows = results.rows("place", "cola")
    if not rows:
        return NOT_RUN
    names = list(dict.fromkeys(row["place"] for _, row in rows))

    def of(name: str, figure: str) -> Figures:
        return results.named("place", "place", name, figure)

    cells = [
        [name, spread(list(of(name, "train_loss").values()), 4), f"{max(of(name, 'apart').values()):.2g}"]
        for name in names
    ]
    steps = next(iter(results.runs("place").values()))["steps"]
    same = max(of("as a learning rate of B", "apart").values())
    text = table(["α/r = 4 is put", f"training loss, last fifth of {steps} steps",
                  "largest relative distance from the first row's losses"], cells)  # fmt: skip
    text += (
        "\n\nAdam's step doesn't change when its gradients are multiplied by a constant. So s · A · B with B learning at "
        "rate λ is A · B' with B' = s · B learning at s · λ: the scale at every forward, as loralib computes it, is a "
        "learning rate of B alone, and A keeps its own. That holds while nothing else sees the size of B or of its "
        "gradient: ε, decay and clipping by a global norm do. Here, without these, the losses of the two "
        + (
            f"stay within {same:.1g} of one another, relative."
            if same
            else "are equal bit for bit: 4 is a power of two."
        )
    )
    found = [
        lower(
            f"`{name}`", "`at every forward`", difference(of(name, "train_loss"), of("at every forward", "train_loss"))
        )
        for name in ("as a learning rate of A and B", "once, in the start of A", "nowhere")
    ]
    return text + "\n\n" + "\n".join(f"- {line}." for line in found)


def does_dropout_matter(results: Results) -> str:
    rows = results.rows("dropout", "cola")
    if not rows:
        return NOT_RUN
    rates = sorted({row["dropout"] for _, row in rows})

    def of(rate: float, figure: str) -> Figures:
        return results.named("dropout", "dropout", rate, figure)

    cells = [
        [f"{rate:g}", spread(list(of(rate, "train_loss").values()), 4), spread(list(of(rate, "dev_loss").values()), 4),
         spread(list(of(rate, "score").values()))]
        for rate in rates
    ]  # fmt: skip
    text = table(["dropout", "training loss", "dev loss", "Matthews"], cells)
    first = [max(row["apart"][0] for _, row in rows), max(row["apart"][2] for _, row in rows if row["dropout"])]
    text += (
        f"\n\nWith B at zero what dropout does to x A reaches nothing: the first loss differs by {first[0]:.1g}. It "
        f"reaches B's gradient in the same step, though, and the tenth loss differs by up to {first[1]:.2g}."
    )
    found = [
        lower(f"dropout {rate:g}", "none", difference(of(rate, "dev_loss"), of(0.0, "dev_loss"))) for rate in rates[1:]
    ]
    return text + "\n\n" + "\n".join(f"- Dev loss, {line}." for line in found)


def is_o_good_because_it_is_large(results: Results) -> str:
    paragraphs = []
    rows = results.rows("kernels", "cola")
    if rows:
        kernels = list(dict.fromkeys(row["kernel"] for _, row in rows))
        cells = []
        for kernel in kernels:
            mine = [row for _, row in rows if row["kernel"] == kernel]
            norms = [row["w_norm"] for row in mine[: len({row["layer"] for row in mine})]]  # the same for each seed
            gains = _per_seed(rows, lambda row, kernel=kernel: row["kernel"] == kernel)
            cells.append([short(kernel), spread(norms, 2), spread(gains, 5)])
        paragraphs.append(table(["kernel", "‖W‖_F over layers", "training loss gained by one layer's alone"], cells))
        rank = _correlations(rows, "w_norm")
        paragraphs.append(f"Rank correlation of ‖W‖_F with that gain over all kernels, by seed: {spread(rank, 2)}.")
    for task in results.tasks:
        singles = {name: results.grid(task, name, 8) for name in SINGLES if results.grid(task, name, 8)}
        if len(singles) == 4:
            order = sorted(singles, key=lambda name: np.mean(list(singles[name].values())))
            paragraphs.append(
                f"{TITLES[task]}: the four kinds, of one size each, from the lowest dev loss: {', '.join(order)}; "
                + lower("o", "v", difference(singles["o"], singles["v"]))
                + "."
            )
    sizes = "All four have the same shape in these models, so one rank is one number of parameters."
    return "\n\n".join([*paragraphs, sizes]) if paragraphs else NOT_RUN


def _per_seed(rows: Sequence[tuple[int, dict]], of: Callable[[dict], bool]) -> list[float]:
    seeds = sorted({seed for seed, _ in rows})
    return [float(np.mean([row["gain"] for one, row in rows if one == seed and of(row)])) for seed in seeds]


def _correlations(rows: Sequence[tuple[int, dict]], figure: str) -> list[float]:
    found = []
    for seed in sorted({seed for seed, _ in rows}):
        mine = [row for one, row in rows if one == seed]
        found.append(float(scipy.stats.spearmanr([r[figure] for r in mine], [r["gain"] for r in mine]).statistic))
    return found


def one_two_or_four(results: Results) -> str:
    lines = []
    for task in results.tasks:
        singles = {name: results.grid(task, name, 8) for name in SINGLES if results.grid(task, name, 8)}
        two, four = results.grid(task, "q,v", 4), results.grid(task, "q,k,v,o", 2)
        if not (singles and two and four):
            continue
        best = min(singles, key=lambda name: np.mean(list(singles[name].values())))
        lines += [
            f"- {TITLES[task]}, {lower('q,v at 4', f'{best} at 8 (the best single kind of those run)', difference(two, singles[best]))}.",
            f"- {TITLES[task]}, {lower('q,k,v,o at 2', 'q,v at 4', difference(four, two))}.",
        ]
    return "\n".join(lines) or NOT_RUN


def does_rank_1_suffice(results: Results) -> str:
    lines = []
    for task in results.tasks:
        for targets in ("q", "q,v", "q,k,v,o"):
            ranks = sorted(rank for name, rank in results.points(task) if name == targets)
            if 1 not in ranks or len(ranks) < 3:
                continue
            best = min(ranks, key=lambda rank: np.mean(list(results.grid(task, targets, rank).values())))
            if best == 1:
                lines.append(f"- {TITLES[task]}, {targets}: rank 1 has the lowest mean of all ranks.")
            else:
                found = difference(results.grid(task, targets, 1), results.grid(task, targets, best))
                lines.append(
                    f"- {TITLES[task]}, {targets}, {lower('rank 1', f'rank {best} (the lowest mean)', found)}."
                )
    note = (
        "\n\nThe lowest of five means is low by chance too, which counts against rank 1 here. α is the same at all ranks, "
        "as in the paper, so rank 1 also learns with a scale 64 times that of rank 64."
    )
    return "\n".join(lines) + note if lines else NOT_RUN


def is_rank_2_enough_for_13b(results: Results) -> str:
    rows = next(iter(results.runs("counts").values()), {"rows": []})["rows"]
    if not rows:
        return NOT_RUN
    cells = [[row["targets"], str(row["rank"]), f"{row['trainable']:,}", f"{row['share']:.4%}",
              f"{16 * row['trainable'] / 2**20:,.0f} MiB"] for row in rows if row["rank"] in (1, 2, 8)]  # fmt: skip
    text = table(["adapted", "rank", "parameters", "of all", "weights, gradient and Adam in float32"], cells)
    by = {(row["targets"], row["rank"]): row["trainable"] for row in rows}
    text += (
        f"\n\nOn Llama 2 13B rank 2 on q,k,v,o has {by['q,k,v,o', 2]:,} parameters, as many as rank 8 on q alone "
        f"({by['q', 8]:,}) and rank 4 on q,v ({by['q,v', 4]:,}). The paper's budget on GPT-3 (18M, rank 2 on all four of "
        "96 layers of width 12,288) is of the same kind. Whether rank 2 is enough there isn't measured: no 13B model was "
        "trained. What the models here show of rank 2 is the table of ranks above."
    )
    return text


def does_the_score_choose(results: Results) -> str:
    rows = results.rows("kernels", "cola")
    if not rows:
        return NOT_RUN
    count = len(rows) // len({seed for seed, _ in rows})
    cells = [[f"`{name}`", spread(_correlations(rows, name), 2)] for name in ("first_step", "best", "norm")]
    text = table(["score before training", f"rank correlation with the gain, over {count} kernels, by seed"], cells)
    steps = next(iter(results.runs("kernels").values()))["steps"]
    return text + (
        f"\n\nEach kernel of each layer was adapted alone at rank 8 for {steps} steps; its gain is the training loss of "
        "the head alone minus its own, over the last fifth, on the same rows. The score is one backward pass over eight "
        "batches, at a head trained alone. It sees the start of training only, and says nothing of pairs of kernels."
    )


def does_a_prefix_add(results: Results) -> str:
    rows = results.rows("prefix", "cola")
    if not rows:
        return NOT_RUN

    def of(name: str, figure: str) -> Figures:
        return results.named("prefix", "name", name, figure)

    cells = [
        [{"both": "LoRA and prefix"}.get(name, name), f"{next(iter(of(name, 'trainable').values())):,}",
         spread(list(of(name, "dev_loss").values()), 4), spread(list(of(name, "score").values()))]
        for name in ("LoRA", "prefix", "both")
    ]  # fmt: skip
    length = next(iter(results.runs("prefix").values()))["length"]
    found = difference(of("both", "dev_loss"), of("LoRA", "dev_loss"))
    return (
        table(["trains", "parameters, head included", "dev loss", "Matthews"], cells)
        + f"\n\nq,v at rank 8, a prefix of {length} tokens after the first, one learning rate for all. Dev loss, "
        + lower("both", "LoRA alone", found)
        + "."
    )
