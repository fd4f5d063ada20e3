"""One-line faults of the core that the tests must find; `make mutants` applies each by itself.

A fault is known by the text that it replaces, so that the list survives code that moves. None is equivalent: each gives
another number, another refusal or another program for somebody, as its reason says. `mutate.py` runs the tests.
"""

from mutants.base import NAMES, PLACES, QUANTIZED, REPORTS
from mutants.files import PEFT, TRAINING
from mutants.forward import AXES, CONTROL_FLOW, FORWARD, TESTING
from mutants.mutant import Mutant as Mutant
from mutants.runs import PACKED, PREFERENCES, SCHEDULES
from mutants.tree import INIT, MERGE, OPTIM, STACK, TREE

MUTANTS = [
    *FORWARD,
    *CONTROL_FLOW,
    *AXES,
    *TESTING,
    *INIT,
    *TREE,
    *MERGE,
    *OPTIM,
    *STACK,
    *PEFT,
    *TRAINING,
    *NAMES,
    *PLACES,
    *REPORTS,
    *QUANTIZED,
    *PACKED,
    *PREFERENCES,
    *SCHEDULES,
]
