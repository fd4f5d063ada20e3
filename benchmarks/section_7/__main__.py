"""Repeat section 7 of the LoRA paper (Hu et al. 2021, arXiv 2106.09685) on your own models and data.

    python benchmarks/section_7 --minilm DIR --llama DIR --glue DIR --wikisql DIR     # measures, then writes the page
    python benchmarks/section_7 --page --results DIR --output FILE                    # the page alone, from results

`--minilm` is all-MiniLM-L6-v2's folder, `--llama` a small Llama's; `--glue` holds GLUE's own files in the folders CoLA,
MRPC, SST-2 and MNLI, `--wikisql` WikiSQL's questions and the tables' headers. Experiments whose model or data aren't
given are left out. Each run's results are written into out/section-7/SCALE as it ends, and it isn't repeated, so the
command can be stopped and started again at any time. `--scale full` is for an accelerator, `small` runs all experiments
on two cores, and `check` takes minutes.
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

OUT = Path("out/section-7")
TASKS = (*tasks.FOLDERS, "wikisql")


def main() -> None:
    args = _arguments()
    if not args.page:
        jax.config.update("jax_compilation_cache_dir", str((OUT / "compiled").resolve()))
        _measure(args)
    if args.two_cores:
        page.keep_times(args.two_cores, args.results)
    page.write(args.results, args.output)
    print(f"page: {args.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("minilm", "model"), ("llama", "model"), ("glue", "data"), ("wikisql", "data")):
        parser.add_argument(f"--{name}", type=Path, help=f"{what} folder")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--results", type=Path, help="folder of the results (default: out/section-7/SCALE)")
    parser.add_argument("--output", type=Path, help="the page (default: beside the results, SCALE.md)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of the tasks, the ones to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="of the experiments, the ones to run")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument(
        "--two-cores", type=Path, help="results at scale small on two cores, whose times the page reports"
    )
    args = parser.parse_args()
    args.results = args.results or OUT / args.scale
    args.output = args.output or args.results.with_suffix(".md")
    return args


def _measure(args: argparse.Namespace) -> None:
    scale, makers = dataclasses.replace(SCALES[args.scale], seeds=tuple(args.seeds)), {}
    if args.minilm and args.glue:
        for name in tasks.FOLDERS:
            if name in scale.tasks and name in args.tasks:
                makers[name] = lambda name=name: tasks.glue(name, scale.tasks[name], args.minilm, args.glue)
    if args.llama and args.wikisql and "wikisql" in args.tasks:
        makers["wikisql"] = lambda: tasks.wikisql(scale.tasks["wikisql"], args.llama, args.wikisql, scale.questions)
    study = experiments.Study(scale, args.results, OUT / f"adapters-{args.scale}", makers)
    began = time.perf_counter()
    for name, run in experiments.plan(study):
        if args.only is None or name in args.only:
            run()
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
