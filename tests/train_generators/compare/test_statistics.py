"""Statistics against their textbook formulas and a worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from train_generators.compare.statistics import crossings, holm, paired, spread, steps_to, story

HE = np.array([0.91, 0.93, 0.92, 0.95, 0.90])
OTHER = np.array([0.93, 0.94, 0.92, 0.97, 0.93])


def test_paired_is_the_textbook_t_test():
    """Against mean, standard error and the t quantile written out."""
    found = paired(OTHER, HE)
    difference = OTHER - HE
    error = difference.std(ddof=1) / math.sqrt(5)
    reach = stats.t.ppf(0.975, 4) * error
    assert found.n == 5
    assert (found.mean, found.low, found.high) == pytest.approx(
        (difference.mean(), difference.mean() - reach, difference.mean() + reach)
    )
    assert found.p == pytest.approx(2 * stats.t.sf(difference.mean() / error, 4))


def test_paired_beats_unpaired_when_seeds_share_their_luck():
    """Pairing by seed sees a constant gain that an unpaired test on the same numbers cannot see."""
    luck = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    gain = np.array([0.010, 0.011, 0.009, 0.012, 0.010])
    assert paired(luck + gain, luck).p < 0.001 < 0.5 < stats.ttest_ind(luck + gain, luck).pvalue


def test_paired_leaves_out_pairs_with_a_diverged_run():
    with_nan = np.where(np.arange(5) == 2, np.nan, OTHER)
    kept = [0, 1, 3, 4]
    assert paired(with_nan, HE) == paired(OTHER[kept], HE[kept])
    assert paired(with_nan, HE).n == 4


@pytest.mark.parametrize(
    ("values", "baseline", "p"),
    [([0.9], [0.8], math.nan), ([0.9, 0.9], [0.8, 0.8], math.nan), ([0.8] * 3, [0.8] * 3, 1)],
)
def test_no_spread_gives_no_interval(values, baseline, p):
    """One pair, or pairs that all differ alike, must not be called significant."""
    found = paired(values, baseline)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.p == pytest.approx(p, nan_ok=True)


def test_holm_worked_example_and_slow_definition():
    """0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, made monotone; NaN is no member of the family."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)
    p = np.random.default_rng(0).random(20) ** 3
    ordered = np.sort(p)
    slow = [min(1, max(ordered[j] * (20 - j) for j in range(20) if ordered[j] <= one)) for one in p]
    assert holm(p) == pytest.approx(slow)


def test_spread():
    found = spread([0.9, math.nan, 0.8])
    assert (found.n, found.mean, found.std) == pytest.approx((2, 0.85, math.sqrt(0.005)))
    assert math.isnan(spread([0.9]).std)
    assert spread([math.nan]).n == 0


def test_steps_to_target_is_censored_not_guessed():
    steps = np.array([0, 20, 40, 60])
    assert steps_to(np.array([0.1, 0.8, 0.7, 0.9]), steps, 0.75) == 20
    assert steps_to(np.array([0.8, 0.7, 0.7, 0.7]), steps, 0.75) == 0
    assert steps_to(np.array([0.1, 0.5, np.nan, np.nan]), steps, 0.75) == math.inf


def test_crossings_are_interpolated_on_the_mean_curve():
    steps = np.array([0, 100, 200, 300])
    (one,) = crossings(steps, np.array([0.6, 0.1, -0.1, -0.2]))
    assert (one.step, one.to_positive) == (pytest.approx(150), False)
    assert crossings(steps, np.array([0.6, 0.0, 0.1, 0.2])) == []
    assert [c.to_positive for c in crossings(steps, np.array([0.1, -0.1, 0.1, -0.1]))] == [False, True, False]


def _story(means: list[float], wobble: float = 0.01) -> str:
    steps = np.arange(len(means)) * 100
    noise = wobble * np.array([-1, -0.5, 0, 0.5, 1])
    return story("ghn", "he", steps, [paired(mean + noise, np.zeros(5)) for mean in means])


def test_story_says_where_the_baseline_overtakes():
    told = _story([0.7, 0.1, -0.1, -0.05])
    assert "ghn starts 70.0 points above he (step 0)" in told
    assert "cross at step 150, where he overtakes ghn" in told
    assert "ghn is clearly ahead at 2 of 4 evaluations (first at step 0, last at step 100)" in told
    assert "he is clearly ahead at 2 of 4 evaluations (first at step 200, last at step 300)" in told
    assert "At the end (step 300) ghn is 5.0 points below he" in told
    assert "clear of 0" in told


def test_story_does_not_claim_what_the_interval_does_not_show():
    told = _story([0.7, 0.1, 0.01, 0.001])
    assert "never cross: he is never ahead of ghn" in told
    assert "holds 0: no clear difference; n = 5" in told


def test_story_turns_with_the_data():
    """The same words with the roles exchanged: nothing about the verdict is fixed."""
    told = _story([-0.7, -0.1, 0.1, 0.05])
    assert "where ghn overtakes he" in told
    assert "5.0 points above he" in told
    assert "never part" in _story([0, 0, 0], wobble=0)
    assert "nothing can be said" in story("ghn", "he", np.arange(2), [paired([np.nan], [1])] * 2)
