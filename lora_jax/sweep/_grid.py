"""Grids: points made from lists of settings, within a budget of parameters if one is given."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax._axes import Axes
from lora_jax._config import LoRAConfig
from lora_jax._init import init
from lora_jax._tree import leaf_paths, nodes_of
from lora_jax.sweep._point import Point
from lora_jax.sweep._start import check_init

AUTO = "auto"  # the highest rank within the budget
LEAST_SHARE = 0.9  # share of the budget that a point must use, so that points within one budget are comparable

Specs = Mapping[str, Sequence[Any]]


def grid(
    specs: Specs,
    params: Any,
    *,
    lora: LoRAConfig | None = None,
    axes: Mapping[str, Axes] | None = None,
    budget: int | None = None,
    seeds: int | None = None,
) -> list[Point]:
    """Combine the given settings in every way and return the combinations as points for `run`.

    With a `budget`, only points whose A and B together have at most that many parameters, and at least 90 % of that
    number, are returned: the paper's table 5 compares sets of targets at one budget. Rank `"auto"` is the highest rank
    that the budget and the smallest of the kernels allow, even if it uses less than 90 % of the budget. Prefixes and
    leaves trained in full (`lora.also_train`) aren't counted.

    Args:
        specs: A list of values for each setting of `Point` that varies. Besides numbers, rank may be `"auto"`, and
            alpha a multiple of the rank: `"2r"`.
        params: The model's tree, of arrays or `ShapeDtypeStruct`s.
        lora: Rank, alpha and targets where `specs` don't give them; its other settings as for `run`, without overrides.
        axes: How kernels are used, as for `lora_jax.init`.
        budget: Most parameters in A and B.
        seeds: Number of times that each point is repeated, with the seeds 0, ..., seeds - 1.

    Raises:
        ValueError: An unknown setting, or a value out of its range; targets that match nothing; rank `"auto"` without a
            budget; a budget that no point meets.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {name: {"kernel": jnp.ones((8, 8))} for name in ("query", "key", "value")}
        >>> specs = {"targets": [("q",), ("q", "v")], "rank": ["auto"]}
        >>> [point.label for point in grid(specs, params, budget=64, lora=LoRAConfig(rank=8, alpha=16))]
        ['q rank 4 alpha 16', 'q,v rank 2 alpha 16']

    Source: Hu et al. 2021, arXiv 2106.09685, section 7.1.
    """
    lora = lora or LoRAConfig(rank=8, alpha=16)
    check_init(lora)
    lists = _checked(specs, seeds)
    counts = _ParameterCounts(params, lora, axes)
    points = []
    for values in itertools.product(*lists.values()):
        settings: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
        settings |= dict(zip(lists, values, strict=True))
        per_rank = counts.at_rank_one(Point(rank=1, alpha=1, targets=settings["targets"]))
        if settings["rank"] == AUTO:
            if budget is None:
                raise ValueError("rank: 'auto' given, which is the highest rank within a budget; give a budget")
            settings["rank"] = min(budget // per_rank, counts.highest_rank(settings["targets"]))
            fits = settings["rank"] > 0
        else:
            fits = budget is None or LEAST_SHARE * budget <= settings["rank"] * per_rank <= budget
        if fits:
            settings["alpha"] = _alpha(settings["alpha"], settings["rank"])
            points.append(Point(**settings))
    if not points:
        fewest = min(counts.known.values())
        raise ValueError(
            f"budget: no point has {LEAST_SHARE * (budget or 0):,.0f} to {budget:,} parameters; at rank 1 the smallest"
            f" targets have {fewest:,}. Give other ranks, 'auto' for the highest within the budget, or another budget"
        )
    return list(dict.fromkeys(points))


class _ParameterCounts:
    """Counts the parameters of A and B at rank 1, once for each set of targets."""

    def __init__(self, params: Any, lora: LoRAConfig, axes: Mapping[str, Axes] | None):
        self.known: dict[tuple[str, ...], int] = {}
        self._smallest: dict[tuple[str, ...], int] = {}
        self._params, self._lora, self._axes, self._paths = params, lora, axes, leaf_paths(params)

    def at_rank_one(self, point: Point) -> int:
        """Return the number of parameters of A and B at rank 1, for the point's targets."""
        if point.targets not in self.known:
            config, _ = point.settings(self._lora, None, self._paths)
            adapted = jax.eval_shape(
                lambda params: init(jax.random.key(0), params, config, axes=self._axes), self._params
            )
            nodes = nodes_of(adapted).values()
            self.known[point.targets] = sum(node.a.size + node.b.size for node in nodes)
            sizes = [factor.size // node.scale.size for node in nodes for factor in (node.a, node.b)]
            self._smallest[point.targets] = min(sizes)
        return self.known[point.targets]

    def highest_rank(self, targets: tuple[str, ...]) -> int:
        """Return the smallest size of any targeted kernel; a higher rank adds nothing. `at_rank_one` comes first."""
        return self._smallest[targets]


def _checked(specs: Specs, seeds: int | None) -> dict[str, list[Any]]:
    names = [field.name for field in dataclasses.fields(Point)]
    for name, values in specs.items():
        if name not in names:
            raise ValueError(f"grid: no setting {name!r}; the settings are {', '.join(names)}")
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"grid: {name}: {values!r} given, expected a list of values")
        if not values:
            raise ValueError(f"grid: {name} has no values; give at least one")
    lists = {name: list(values) for name, values in specs.items()}
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"seeds: {seeds} given, expected at least 1")
        if "seed" in lists:
            raise ValueError("seeds: given together with seed in the grid; give one of them")
        lists["seed"] = list(range(seeds))
    if "targets" in lists:
        lists["targets"] = [(one,) if isinstance(one, str) else tuple(one) for one in lists["targets"]]
    return lists


def _alpha(value: Any, rank: int) -> float:
    """Convert an alpha that may be a multiple of the rank, such as "2r", to a number."""
    if not isinstance(value, str):
        return value
    if not value.endswith("r"):
        raise ValueError(f"grid: alpha: {value!r} given, expected a number, or a multiple of the rank such as '2r'")
    return rank * _number(float, value.removesuffix("r") or "1", "alpha", value)


# Text ----------------------------------------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> dict[str, list[Any]]:
    """Read the settings for `grid` from words such as `"rank=1,2,4"` and `"targets=q;v;q,v"`.

    Values are separated by semicolons if there are any, else by commas. Each value of `targets` is itself a list:
    semicolons separate the values, and commas the patterns within one value.

    Raises:
        ValueError: A word without "=", an unknown setting, a setting given twice, a value that isn't a number.

    >>> parse(["targets=q;v;q,v", "rank=1,8,auto", "alpha=2r", "learning_rate=1e-3;1e-2"])
    {'targets': [('q',), ('v',), ('q', 'v')], 'rank': [1, 8, 'auto'], 'alpha': ['2r'], 'learning_rate': [0.001, 0.01]}
    """
    specs: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"grid: {word!r} given, expected NAME=VALUES, such as rank=1,2,4")
        if name not in _READERS:
            raise ValueError(f"grid: no setting {name!r}; the settings are {', '.join(_READERS)}")
        if name in specs:
            raise ValueError(f"grid: {name} is given twice; give all its values at once")
        separator = ";" if ";" in text or name == "targets" else ","
        specs[name] = [_READERS[name](value.strip()) for value in text.split(separator)]
    return specs


def _number(convert: Callable[[str], Any], text: str, name: str, given: str) -> Any:
    try:
        return convert(text)
    except ValueError:
        expected = "a whole number" if convert is int else "a number"
        other = {"rank": ", or 'auto'", "alpha": ", or a multiple of the rank such as '2r'"}.get(name, "")
        raise ValueError(f"grid: {name}: {given!r} given, expected {expected}{other}") from None


def _reader(name: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: _number(convert, text, name, text)


def _read_targets(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_READERS: dict[str, Callable[[str], Any]] = {
    "rank": lambda text: AUTO if text == AUTO else _number(int, text, "rank", text),
    "alpha": lambda text: text if text.endswith("r") else _number(float, text, "alpha", text),
    "targets": _read_targets,
    "learning_rate": _reader("learning_rate", float),
    "weight_decay": _reader("weight_decay", float),
    "dropout": _reader("dropout", float),
    "seed": _reader("seed", int),
    "data_seed": _reader("data_seed", int),
    "prefix_length": _reader("prefix_length", int),
}
