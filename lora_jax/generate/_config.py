"""The settings of generation. The command line's flags are made from this class."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The settings of generation.

    Raises:
        ValueError: A setting is out of its range.

    >>> GenerateConfig(max_tokens=8, temperature=0.7, top_p=0.9).batch_size
    16
    >>> GenerateConfig(temperature=-1)
    Traceback (most recent call last):
    ValueError: temperature: -1 given, expected ...
    """

    max_tokens: int = 64
    """the most new tokens of a completion"""
    temperature: float = 0.0
    """0 selects the likeliest token; above 0, tokens are sampled from softmax(logits / temperature)"""
    top_p: float = 1.0
    """sample among the likeliest tokens that together have this probability"""
    batch_size: int = 16
    """prompts completed at once"""

    def __post_init__(self) -> None:
        check(self.max_tokens, self.temperature, self.top_p)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} given, expected at least 1")


def check(max_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse settings that are out of range."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} given, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} given, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} given, expected above 0 and at most 1")
