"""Many adapters in one program: a grid of ranks, targets, learning rates, seeds, ... over one copy of the base.

    points = grid({"targets": [("q",), ("q", "v")], "rank": [1, 8]}, model.params, seeds=3)
    config = TrainConfig(max_steps=200)
    results = run(model.apply, model.params, points, train_examples, valid_examples, config)
    print(results)

Each adapter's result equals that of a run alone, within float32 reordering; `Point.settings` gives that run's settings.
"""

from lora_jax._extras import require

require(__name__, train=("grain", "orbax.checkpoint", "rich", "sklearn"))

from lora_jax.sweep._grid import grid as grid
from lora_jax.sweep._grid import parse as parse
from lora_jax.sweep._point import Point as Point
from lora_jax.sweep._results import Result as Result
from lora_jax.sweep._results import Results as Results
from lora_jax.sweep._run import check_config as check_config
from lora_jax.sweep._run import check_selection as check_selection
from lora_jax.sweep._run import run as run
