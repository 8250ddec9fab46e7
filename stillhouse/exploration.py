"""Exploration: the epsilon schedule and epsilon-greedy actions."""

from __future__ import annotations

import numpy as np


def linear_schedule(start: float, end: float, duration: float, now: float) -> float:
    """Linear from ``start`` at 0 to ``end`` at ``duration``, then ``end``."""
    if now >= duration:
        return end
    return start + (end - start) * now / duration


def epsilon_greedy(outputs: np.ndarray, epsilon: float, generator: np.random.Generator) -> np.ndarray:
    """With probability ``epsilon`` a uniform action, else the first best one.

    Args:
        outputs: [B, A], one output per action.
        epsilon: in 0..1.
        generator: two numbers a row are drawn from it, whatever ``epsilon`` is.

    Returns:
        int64 [B].
    """
    rows, actions = outputs.shape
    explore = generator.random(rows) < epsilon
    uniform = generator.integers(actions, size=rows)
    return np.where(explore, uniform, outputs.argmax(axis=1))
