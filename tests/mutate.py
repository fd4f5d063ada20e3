"""Applies the faults of `mutants` one at a time and runs the tests named beside each: `make mutants`.

Every fault must fail one of its tests. Each worker has a copy of the package and of the tests in a temporary folder, so
that the checkout stays as it is. Exit status 1: a fault survived, a line isn't in the package exactly once (it has
changed: let the list follow), or the tests don't run or don't pass without any fault.

    python tests/mutate.py            all of them, 5 minutes on two cores
    python tests/mutate.py control    those in whose file, line or reason this word is
"""

import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
PACKAGE = "lora_jax"
COPIED = (PACKAGE, "tests", "pyproject.toml")
WORKERS = 2
# Statuses of pytest's: no other says that tests ran. A package that can't be imported is no fault found by a test.
PASSED, FAILED = 0, 1
SLOW = "--slow"  # among a mutant's tests: they are of the long tail


class Result(NamedTuple):
    """What became of one mutant: `caught`, `SURVIVED`, or why its tests couldn't say."""

    verdict: str
    seconds: float


def locate(mutant: Mutant) -> Path | str:
    """The file, relative to the root, that has the mutant's line exactly once; or why there is none.

    Looked for in the file that the mutant names; where it isn't there, in the whole package, for code moves.
    """
    named = ROOT / PACKAGE / mutant.file
    for candidates in ([named] if named.is_file() else [], sorted((ROOT / PACKAGE).rglob("*.py"))):
        counts = {path: count for path in candidates if (count := path.read_text().count(mutant.old))}
        if sum(counts.values()) == 1:
            return next(iter(counts)).relative_to(ROOT)
        if counts:
            break
    return f"its text is {sum(counts.values())} times in the package, expected once"


def copy(folder: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / ".pytest_cache").symlink_to(ROOT / ".pytest_cache")  # programs that were compiled before


def pytest(folder: Path, tests: list[str]) -> tuple[int, str]:
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=unshrunk",
    ]
    done = subprocess.run([*command, *tests], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def tried(mutant: Mutant, folder: Path) -> Result:
    """Runs the mutant's tests on the copy in `folder` with its fault in it, and takes the fault out again."""
    found, start = locate(mutant), time.monotonic()
    if isinstance(found, str):
        return Result(found, 0.0)
    text = (folder / found).read_text()
    (folder / found).write_text(text.replace(mutant.old, mutant.new))
    try:
        status, output = pytest(folder, mutant.tests.split())
    finally:
        (folder / found).write_text(text)
    verdict = {FAILED: "caught", PASSED: "SURVIVED"}.get(status)
    return Result(verdict or f"pytest exits {status}: {output.strip()[-300:]}", time.monotonic() - start)


def main() -> int:
    (ROOT / ".pytest_cache").mkdir(exist_ok=True)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutant for mutant in MUTANTS if any(word in text for text in (mutant.file, mutant.old, mutant.why))]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(WORKERS) as workers:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(WORKERS):
            copy(Path(temporary, str(number)))
            folders.put(Path(temporary, str(number)))

        def on_a_copy(function, *args):
            folder = folders.get()
            try:
                return function(*args, folder)
            finally:
                folders.put(folder)

        for slow in (False, True):
            tests = {test for mutant in chosen if (SLOW in mutant.tests) is slow for test in mutant.tests.split()}
            if tests and (ran := on_a_copy(lambda folder, tests=tests: pytest(folder, sorted(tests))))[0] != PASSED:
                print(ran[1], "The tests don't pass without any fault.", sep="\n")
                return 1
        print(f"The tests pass without a fault; {len(chosen)} faults:", flush=True)
        caught = 0
        for mutant, result in zip(chosen, workers.map(lambda mutant: on_a_copy(tried, mutant), chosen), strict=True):
            caught += result.verdict == "caught"
            print(f"{result.verdict:<8}  {result.seconds:4.0f} s  {mutant.file:<26}  {mutant.why}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
