# ruff: noqa: E501
"""Section 7 of the LoRA paper (Hu et al. 2021, arXiv 2106.09685) on models and data of your own.

    python examples/section_7 --minilm DIR --llama DIR --glue DIR --wikisql DIR     # measures, then writes the page
    python examples/section_7 --page                                               # the page alone, from the results

`--minilm` is all-MiniLM-L6-v2's folder, `--llama` a small Llama's; `--glue` holds GLUE's own files in the folders CoLA,
MRPC, SST-2 and MNLI, `--wikisql` WikiSQL's questions and the tables' headers. What isn't given isn't run. Results are
written run by run into docs/section-7, and a run that is there is not repeated: stop it and start it as you like.
`--scale small` (docs/section-7.md) is for two cores, `full` for an accelerator, `check` shows in minutes that all works.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import experiments
import jax
import page
import tasks
from settings import SCALES, SEEDS

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
CACHE = Path("out/section-7")
TASKS = (*tasks.FOLDERS, "wikisql")


def main() -> None:
    args = _arguments()
    if not args.page:
        jax.config.update("jax_compilation_cache_dir", str((CACHE / "compiled").resolve()))
        _measure(args)
    page.write(args.results, args.output)
    print(f"page: {args.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("minilm", "model"), ("llama", "model"), ("glue", "data"), ("wikisql", "data")):
        parser.add_argument(f"--{name}", type=Path, help=f"{what} folder")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--results", type=Path, default=DOCS / "section-7", help="folder of the results")
    parser.add_argument("--output", type=Path, default=DOCS / "section-7.md", help="the page")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of the tasks, the ones to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="of the experiments, the ones to run")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> None:
    scale, makers = dataclasses.replace(SCALES[args.scale], seeds=tuple(args.seeds)), {}
    if args.minilm and args.glue:
        for name in tasks.FOLDERS:
            if name in scale.tasks and name in args.tasks:
                makers[name] = lambda name=name: tasks.glue(name, scale.tasks[name], args.minilm, args.glue)
    if args.llama and args.wikisql and "wikisql" in args.tasks:
        makers["wikisql"] = lambda: tasks.wikisql(scale.tasks["wikisql"], args.llama, args.wikisql, scale.questions)
    bench = experiments.Bench(scale, args.results, CACHE / f"adapters-{args.scale}", makers)
    began = time.perf_counter()
    for name, run in experiments.plan(bench):
        if args.only is None or name in args.only:
            run()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
