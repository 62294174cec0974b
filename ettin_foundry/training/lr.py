"""The learning-rate schedules of the recipe as plain functions of time, so that a plan can draw them without torch."""

from __future__ import annotations

import math


def warmup_stable_decay(t: float, *, warmup: float, decay: float, total: float, alpha_f: float) -> float:
    """Factor on the peak lr at time t: linear from 1e-10 to 1, flat, then linear to `alpha_f` over the last `decay`.

    All times in one unit. Past `total` it stays at alpha_f. Source: ModernBERT's src/scheduler.py, lines 81-131, which
    divides by zero at t >= total when decay is 0; here that is flat.
    """
    if t < warmup:
        return 1e-10 + (1 - 1e-10) * (t / warmup)
    if decay == 0 or t < total - decay:
        return 1.0
    return 1.0 - min(1.0, (t - (total - decay)) / decay) * (1.0 - alpha_f)


def one_minus_sqrt(t: float, *, decay: float, total: float, alpha_f: float) -> float:
    """Factor on the peak lr at time t: flat, then alpha_f + (1 - alpha_f)(1 - sqrt(x)) over the last `decay`.

    x runs from 0 to 1 in that stretch. All times in one unit. Source: ModernBERT's src/scheduler.py, lines 258-289.
    """
    x = min(1.0, max(0.0, (t - (total - decay)) / decay))
    return alpha_f + (1.0 - alpha_f) * (1.0 - math.sqrt(x))
