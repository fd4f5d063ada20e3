"""Load every damaged or hostile model folder of tests/hostile_models.py, also with `models.load_abstract`.

    python benchmarks/hostile_models.py      # two cores: two minutes; no accelerator needed

Expected: 313 folders, about 45 of them still models; 0 faults (tracebacks, messages of several lines or without the
folder's name, more than 5 s of a core, more than 1 GiB beyond what the process had held); the peak grows by 0.4 GiB.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hostile_models import peak_bytes, run


def main() -> int:
    began, start, seen, loaded, slowest, faulty = time.monotonic(), 0, 0, 0, 0.0, 0
    for found in run():
        start = start or peak_bytes()
        seen, loaded, slowest = seen + 1, loaded + (found.outcome == "loaded"), max(slowest, found.seconds)
        if found.faults:
            faulty += 1
            print(found.what, json.dumps(found.faults))
    print(
        f"{seen} folders, {loaded} of them still models, {faulty} with faults; {time.monotonic() - began:.0f} s in all"
    )
    print(f"slowest: {slowest:.1f} s for both functions; the peak grew by {(peak_bytes() - start) / 2**20:.0f} MiB")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(main())
