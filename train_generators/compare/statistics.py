"""Paired statistics over seeds, and what may be said about two curves in words.

Runs of equal seed share the order of the data and its augmentation, so differences are taken seed by seed (paired
t-test, Student 1908) and the family of tests is corrected by Holm's step-down rule (Holm 1979): the i-th smallest of m
p-values is multiplied by m - i + 1, made monotone, capped at 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1 in the denominator; NaN for n = 1) over the n finite values."""

    n: int
    mean: float
    std: float


@dataclass(frozen=True)
class Paired:
    """A paired difference: n pairs, mean difference, 95 % interval and two-sided p-value of Student's t.

    For one pair, or for pairs that all differ by the same amount, there is no spread to judge by: interval and p are
    NaN (p is 1 if that amount is 0).
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Crossing:
    """A step, interpolated on the mean curves, where the sign of the difference to the baseline changes."""

    step: float
    to_positive: bool


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Mean and standard deviation of the finite `values`."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return Spread(0, math.nan, math.nan)
    return Spread(len(finite), float(finite.mean()), float(finite.std(ddof=1)) if len(finite) > 1 else math.nan)


def paired(values: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> Paired:
    """`values - baseline`, both `[n]` in the same order of seeds; pairs with a NaN on either side are left out."""
    difference = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    difference = difference[np.isfinite(difference)]
    n = len(difference)
    if n == 0:
        return Paired(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(difference.mean())
    if n == 1 or np.ptp(difference) <= 1e-12:
        return Paired(n, mean, math.nan, math.nan, 1.0 if n > 1 and abs(mean) <= 1e-12 else math.nan)
    test = stats.ttest_rel(difference, np.zeros(n))
    interval = test.confidence_interval(CONFIDENCE)
    return Paired(n, mean, float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order. NaN (no test was possible) stays NaN and does not count in the family."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), math.nan)
    order = [int(index) for index in np.argsort(p) if np.isfinite(p[index])]
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, float(p[index]) * (len(order) - rank)))
        adjusted[index] = largest
    return [float(value) for value in adjusted]


def steps_to(curve: np.ndarray, steps: np.ndarray, target: float) -> float:
    """The first of the evaluated `steps` [E] where `curve` [E] is at least `target`; infinity if there is none."""
    reached = np.flatnonzero(np.asarray(curve) >= target)
    return float(steps[reached[0]]) if len(reached) else math.inf


def crossings(steps: np.ndarray, difference: np.ndarray) -> list[Crossing]:
    """Where the mean difference `[E]` changes sign; evaluations with a difference of 0 belong to the side before."""
    found: list[Crossing] = []
    kept = [index for index in range(len(steps)) if np.isfinite(difference[index]) and difference[index] != 0]
    for before, after in itertools.pairwise(kept):
        if (difference[before] > 0) != (difference[after] > 0):
            share = difference[before] / (difference[before] - difference[after])
            step = float(steps[before] + share * (steps[after] - steps[before]))
            found.append(Crossing(step, bool(difference[after] > 0)))
    return found


def _points(value: float) -> str:
    return f"{100 * abs(value):.1f} points"


def story(name: str, baseline: str, steps: np.ndarray, differences: Sequence[Paired]) -> str:
    """Who leads when, in sentences made from the paired differences `[E]` of accuracies at `steps` [E].

    "Clear" means that the pointwise 95 % interval of the difference does not hold 0.
    """
    mean = np.array([difference.mean for difference in differences])
    finite = np.flatnonzero(np.isfinite(mean))
    if not len(finite):
        return f"{name}: no seed has a finished run of both {name} and {baseline}, so nothing can be said."
    low = np.array([difference.low for difference in differences])
    high = np.array([difference.high for difference in differences])
    first, last = int(finite[0]), int(finite[-1])

    def standing(index: int) -> str:
        if mean[index] == 0:
            return f"level with {baseline}"
        return f"{_points(mean[index])} {'above' if mean[index] > 0 else 'below'} {baseline}"

    parts = [f"{name} starts {standing(first)} (step {steps[first]})."]
    found = crossings(steps, mean)
    if not found:
        if (mean[finite] == 0).all():
            parts.append("The mean curves never part.")
        else:
            leader = name if mean[finite].sum() > 0 else baseline
            other = baseline if leader == name else name
            parts.append(f"The mean curves never cross: {other} is never ahead of {leader}.")
    else:
        one = found[0]
        overtaker, overtaken = (name, baseline) if one.to_positive else (baseline, name)
        parts.append(f"The mean curves cross at step {one.step:.0f}, where {overtaker} overtakes {overtaken}.")
        if len(found) > 1:
            leader = name if found[-1].to_positive else baseline
            parts.append(f"They cross {len(found)} times in all; from step {found[-1].step:.0f} on {leader} is ahead.")
    for leader, clear in ((name, low > 0), (baseline, high < 0)):
        where = np.flatnonzero(clear)
        if len(where):
            first_clear, last_clear = steps[where[0]], steps[where[-1]]
            when = (
                f"first at step {first_clear}, last at step {last_clear}" if len(where) > 1 else f"step {first_clear}"
            )
            parts.append(f"{leader} is clearly ahead at {len(where)} of {len(finite)} evaluations ({when}).")
    end = differences[last]
    if math.isfinite(end.low):
        verdict = "which is clear of 0" if end.low > 0 or end.high < 0 else "which holds 0: no clear difference"
        interval = f"95 % interval {100 * end.low:+.1f} to {100 * end.high:+.1f}, {verdict}; n = {end.n}"
    else:
        interval = f"no interval: n = {end.n} without spread"
    parts.append(f"At the end (step {steps[last]}) {name} is {standing(last)} ({interval}).")
    return " ".join(parts)
