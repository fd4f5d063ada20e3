# ruff: noqa: E501
"""The page docs/section-7.md, written from the results alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import questions
from claims import claims
from questions import NOT_RUN, table
from results import TITLES, Results
from settings import FULL, SMALL, tokens
from statistics_of import LEVEL, layered

COMMAND = "python benchmarks/section_7 --minilm DIR --llama DIR --glue DIR --wikisql DIR --scale full"
TIMES = "two_cores"
DIRECTIONS = ("1", "4", "8", "64")
LAYERED = (
    "the mean over layers and seeds ± the standard deviation over seeds of the layers' mean, and in brackets the standard "
    "deviation over layers, averaged over seeds"
)


def write(results: Path, output: Path) -> None:
    """Write the page, and its pictures into the folder of the results."""
    found = Results(results)
    drawn = pictures.draw(found, results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text(found, {name: f"{results.name}/{name}" for name in drawn}))


def keep_times(small: Path, results: Path) -> None:
    """Copy the seconds of each run in another folder of results beside these results."""
    named = ("seconds", "cpu_seconds", "device", "cores")
    times = {
        name: {key: {field: run[field] for field in named} for key, run in runs.items()}
        for name, runs in Results(small).experiments.items()
    }
    (results / f"{TIMES}.json").write_text(json.dumps(times, indent=1) + "\n")


def text(found: Results, images: dict[str, str]) -> str:
    """The page's Markdown.

    Args:
        found: The results.
        images: The pictures' paths, relative to the page.
    """

    def picture(name: str, said: str) -> str:
        return f"![{said}]({images[name]})\n\n" if name in images else ""

    parts = [
        _opening(found),
        "## The paper's claims\n\n" + _claims(found),
        "## Which kernels, under one budget? (table 5)\n\n" + questions.table_5(found),
        "### Is one rank-8 matrix as good as two of rank 4, or four of rank 2?\n\n" + questions.one_two_or_four(found),
        "### Is W_o good because it is large?\n\n" + questions.is_o_good_because_it_is_large(found),
        "### Does a score before training predict the gain?\n\n"
        + picture("kernels.png", "gain of each kernel alone against its gradient score")
        + questions.does_the_score_choose(found),
        "## What rank? (table 6)\n\n" + picture("ranks.png", "dev loss by rank") + questions.table_6(found),
        "### Does rank 1 suffice?\n\n" + questions.does_rank_1_suffice(found),
        "### Is rank 2 enough for a budget like Llama 2 13B's?\n\n" + questions.is_rank_2_enough_for_13b(found),
        "## What is α?\n\n### Is it only a learning rate?\n\n" + questions.is_alpha_a_rate(found),
        "### Does it matter where the scale is?\n\n" + questions.where_the_scale_is(found),
        "## Does dropout on the LoRA path matter, when B starts at zero?\n\n" + questions.does_dropout_matter(found),
        "## Do prefix embeddings add to LoRA?\n\n" + questions.does_a_prefix_add(found),
        "## What is ΔW to W?\n\n"
        + picture("similarity.png", "subspace similarity of ranks, of seeds and of random matrices")
        + _similarities(found),
        "### Does ΔW amplify what W has but doesn't stress? (table 7)\n\n" + _amplifications(found),
        "### Is ΔW rank-deficient below its rank?\n\n"
        + picture("spectra.png", "singular values of ΔW and W")
        + _spectra(found),
        _limits(),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(found: Results) -> str:
    sizes = []
    for task in found.tasks:
        runs = [run for key, run in found.runs("grid").items() if key.startswith(f"{task}/")]
        sizes.append(
            [TITLES[task], str(runs[0]["steps"]), str(runs[0]["batch_size"]),
             f"{runs[0]['steps'] * runs[0]['batch_size']:,}", str(len(found.points(task))), str(len(runs))]
        )  # fmt: skip
    paragraphs = [
        "# Section 7 of the LoRA paper, on models of your own",
        "This page asks the questions of section 7 of [Hu et al. 2021](https://arxiv.org/abs/2106.09685) of small pretrained "
        "models on real data: which weights to adapt, at what rank, and how ΔW relates to W. It adds some questions that "
        "the paper leaves open. The numbers come from",
        f"    {COMMAND}",
        "which writes them and this page into out/section-7; `--page --results docs/section-7 --output docs/section-7.md` "
        "writes the page anew from the numbers that are here. The encoder is all-MiniLM-L6-v2 (22.7M parameters, 6 layers of width 384) "
        "with a linear head on the mean of its last states; the decoder a Llama of 10M parameters, pretrained on about "
        "10M tokens of English. MiniLM's makers list MNLI among its training data, so MNLI is no clean result.",
        table(["task", "steps", "batch", "rows seen", "adapters a seed", "seeds"], sizes) if sizes else NOT_RUN,
        _time(found),
        "These are short runs of small models. They train on far fewer rows than the paper's, with A as loralib starts it "
        "(uniform, U(±1/√inputs)), α = 16 at every rank, Adam without decay, and one learning rate that was set once and not "
        "searched. A point whose best rate lies elsewhere is at a disadvantage.",
        f"*How to read it.* `a ± b` is a mean and the standard deviation of a sample, over seeds. A seed decides A's start and "
        f"the order of the rows; all points of one seed see the same rows, so differences are taken seed by seed, and "
        f"`± c` after a difference is half of Student's {LEVEL:.0%} interval. With three seeds that is 2.5 standard "
        "deviations of the differences: an interval that holds zero is no evidence of equality. Verdicts by the "
        "dev loss and their bounds were written before the figures were seen; those by the score were added afterwards, "
        "because on MRPC and CoLA the loss rises where the score does too: the model grows too sure of what it gets wrong. "
        "Verdicts on subspaces are of the mean over layers, for each seed, or for each pair of seeds where two are "
        "compared (three pairs of three seeds are not independent); their bounds, which stand in the rows, are ours. "
        "Nothing is corrected for the number of comparisons: of verdicts by an interval, one in twenty reports a difference where "
        "there is none.",
    ]
    return "\n\n".join(paragraphs)


def _time(found: Results) -> str:
    total, cpu = (sum(run[key] for runs in found.experiments.values() for run in runs.values() if key in run)
                  for key in ("seconds", "cpu_seconds"))  # fmt: skip
    devices = sorted({run["device"] for runs in found.experiments.values() for run in runs.values()} - {"cpu"})
    text = (
        f"Time: {total / 60:.0f} minutes, were one run made after the other, on {', '.join(devices) or 'CPU cores'}, with "
        f"{cpu / 60:.0f} minutes of processor time{' (products in TF32, as XLA computes float32 there)' * bool(devices)}."
    )
    if found.two_cores:
        text += " " + _time_on_two_cores(found.two_cores)
    return text


def _time_on_two_cores(times: dict[str, Any]) -> str:
    first = {name: [run for key, run in runs.items() if key.endswith("/0")] for name, runs in times.items()}
    seconds = {name: sum(run["seconds"] for run in runs) for name, runs in first.items() if runs}
    runs = [run for runs in first.values() for run in runs]
    cores = ", ".join(str(n) for n in sorted({run["cores"] for run in runs}))
    ratio = tokens(FULL) / tokens(SMALL)
    hours = sum(seconds.values()) * len(SMALL.seeds) / 3600
    days = ratio * seconds["grid"] * len(FULL.seeds) / 86_400
    return (
        f"`--scale small` runs all of it with fewer steps and points, enough to see that it works and too few to conclude anything: "
        f"its first seed took {sum(seconds.values()) / 60:.0f} minutes on {cores} CPU cores "
        f"({', '.join(f'{name} {each / 60:.1f}' for name, each in seconds.items())}), with "
        f"{sum(run['cpu_seconds'] for run in runs) / 60:.0f} minutes of processor time; by that, its {len(SMALL.seeds)} seeds "
        f"take {hours:.1f} hours. The grid of one seed at `--scale full` has {ratio:.0f} times as many tokens at most: by that, two "
        f"cores would be at it for {days:.0f} days, for {len(FULL.seeds)} seeds."
    )


def _claims(found: Results) -> str:
    rows = [list(claim) for claim in claims(found)]
    return table(["the paper's claim", "its figure", "here", "held"], rows) if rows else NOT_RUN


def _similarities(found: Results) -> str:
    rows = []
    for task, run in found.runs("subspaces").items():
        for path, kernel in run["kernels"].items():
            for name, said in (
                ("ranks_top", "rank 8 and rank 64, one seed"),
                ("seeds8_top", "two seeds, rank 8"),
                ("seeds_top", "two seeds, rank 64"),
                ("left_top", "two seeds, rank 64, B's side"),
                ("start_top", "A of rank 64 before and after training"),
                ("random_top", "two random matrices"),
            ):
                rows.append([f"{TITLES[task]}, {pictures.short(path)}", said,
                             *(layered(kernel[name][i], 2) if i in kernel[name] else "–" for i in DIRECTIONS)])  # fmt: skip
    if not rows:
        return NOT_RUN
    return (
        "φ(A, A', i, j) = ‖U_iᵀ U'_j‖² / min(i, j) is 1 where one subspace lies in the other and about max(i, j) / width "
        "for two random ones (the paper's equation 4). The picture is of CoLA's q,v adapters: the middle layer of seed "
        f"0, or of seeds 0 and 1. The table has φ(i, i) of q,v adapters: {LAYERED}. Where two seeds are compared, "
        "pairs of them stand for seeds, and for random matrices, which are drawn for each layer, three draws.\n\n"
        + table(["", "between", *(f"i = {i}" for i in DIRECTIONS)], rows)
        + "\n\nOne seed draws the factors of rank 8 and of rank 64 apart, so what they share was learned. "
        "`before and after training` is to be read at i = 64 alone: a newly initialised A has no directions larger than others, so its "
        "first few are arbitrary. 1 there says that A still spans what was drawn, which two seeds can't share; what it "
        "learned shows in the first directions."
    )


def _amplifications(found: Results) -> str:
    rows, draws = [], []
    for task, run in found.runs("subspaces").items():
        for path, kernel in run["kernels"].items():
            for rank, values in kernel["amplification"].items():
                draws = values["projected_random"]
                names = ("projected", "projected_own", "projected_random", "w_norm", "delta_norm", "factor")
                rows.append([f"{TITLES[task]}, {pictures.short(path)}", rank,
                             *(layered(values[name], 3) for name in names)])  # fmt: skip
    if not rows:
        return NOT_RUN
    head = ["", "rank", "‖UᵀWVᵀ‖, ΔW's", "W's own", "random", "‖W‖", "‖ΔW‖", "factor"]
    return (
        table(head, rows)
        + f"\n\nThe table has {LAYERED}; W has no seed, and random subspaces have {len(draws)} draws for seeds. Where W's part in "
        "ΔW's subspace is above that in a random one, ΔW's directions are ones that W has; where it is below that in W's own "
        "top directions, ones that it doesn't stress. The factor ‖ΔW‖ / ‖UᵀWVᵀ‖ grows with how long and how fast one trains, so it compares "
        "ranks and kernels, not papers."
    )


def _spectra(found: Results) -> str:
    rows, lines = [], []
    for task, run in found.runs("subspaces").items():
        for path, kernel in run["kernels"].items():
            for name, said in (("8", "ΔW, rank 8"), ("64", "ΔW, rank 64"), ("W", "W")):
                values = kernel["spectrum"][name]
                rows.append([f"{TITLES[task]}, {pictures.short(path)}", said,
                             *(layered(values[key], 1) for key in ("effective_rank", "stable_rank", "energy_rank_0.9",
                                                                  "energy_rank_0.99"))])  # fmt: skip
            needed = np.array(kernel["spectrum"]["64"]["energy_rank_0.9"])
            lines.append(
                f"{TITLES[task]}, {pictures.short(path)}: {needed.min()} to {needed.max()} of 64 directions, by layer and "
                "seed, hold 90 % of ΔW's energy."
            )
    if not rows:
        return NOT_RUN
    head = ["", "of", "effective rank", "stable rank", "rank at 90 %", "rank at 99 %"]
    return (
        table(head, rows)
        + f"\n\nThe picture is of {TITLES[next(iter(found.runs('subspaces')))]}, seed 0 and the middle layer. "
        f"The table has {LAYERED}; W has no seed. The effective rank is exp of the entropy of σ / Σσ, the stable rank "
        "‖·‖²_F / σ₁².\n\n" + "\n".join(f"- {line}" for line in lines)
    )


def _limits() -> str:
    return (
        "## What this page doesn't show\n\n"
        "The paper's models are up to four orders of magnitude larger and were trained to the end with a searched learning "
        "rate. That a claim isn't borne out here says that it doesn't hold of every model and run, not "
        "that the paper is wrong; that one is undecided says that these runs don't decide it. Per-kernel gains are of training loss over few steps. On WikiSQL hardly any "
        "query is right to the letter: a model of 10M parameters doesn't learn in 1,000 steps to copy names and values, so "
        "logical form says nothing there and the loss must do."
    )
