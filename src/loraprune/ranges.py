"""Ranges: where a setting's number may lie.

Reads    nothing
Gives    Range, and those that settings share
Source   -
Symbols  -
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Where a finite number may lie; a bound is part of the range unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        if math.isinf(self.high):
            return f"> {self.low:g}" if self.open_low else f">= {self.low:g}"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
UNIT = Range(0, 1)
INSIDE_UNIT = Range(0, 1, open_low=True, open_high=True)
