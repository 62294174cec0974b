"""Sizes, counts, durations and quantiles as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmgt]?b)?", re.IGNORECASE)


def parse_bytes(key: str, value: Any) -> int | None:
    """A number of bytes given as an integer or as text such as "200gb" (1 gb = 2**30); None stays None."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match:
        value = int(float(match[1].replace("_", "")) * _UNITS[(match[2] or "").lower()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a number of bytes, as an integer or a text such as 200gb, got {value!r}")
    return value


def format_bytes(number: float) -> str:
    """4_750_000_000 as "4.75 GB" (1 GB = 1e9)."""
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 999.5:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:.3g} TB"


def format_count(number: float) -> str:
    """1_700_002_529_280 as "1.7T"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.99995:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """3_725.0 seconds as "1:02:05"."""
    minutes, second = divmod(round(min(seconds, 3.6e9)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def quantiles(histogram: np.ndarray, shares: Sequence[float] = (0.1, 0.5, 0.9)) -> tuple[int, ...]:
    """The smallest lengths that at least `shares` of the pieces do not exceed, of (L + 1,) counts by length."""
    below = np.cumsum(histogram)
    return tuple(int(np.searchsorted(below, share * int(histogram.sum()))) for share in shares)


def length_cells(histogram: np.ndarray) -> tuple[str, ...]:
    """Mean, 10%, median, 90% and share of the full length, as texts, of (L + 1,) counts of chunks by length."""
    total = max(1, int(histogram.sum()))
    mean = int(histogram @ np.arange(len(histogram))) / total
    return f"{mean:,.1f}", *(f"{value:,}" for value in quantiles(histogram)), f"{int(histogram[-1]) / total:.1%}"
