"""Arms, learning rates and horizons, on small stand-ins for population views with real recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from collect.recipe import Recipe
from generators.errors import ConfigError, UnknownNameError, ZooError
from train_generators.compare.curves import choose_rates, format_steps, horizon_indices, read_arms, short_labels

STEPS = np.array([0, 20, 40])


@dataclass
class StandIn:
    """What `curves` reads of a `collect.view.PopulationView`; one accuracy per run, at every evaluation."""

    recipe: Recipe
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    status: tuple[str, ...] = ()
    metric_names: tuple[str, ...] = ("validation_accuracy", "test_accuracy")
    evaluation_steps: np.ndarray = field(default_factory=lambda: STEPS)

    def __post_init__(self):
        self.status = self.status or ("ok",) * len(self.seeds)
        self.evaluation_epochs = self.evaluation_steps / 20
        shape = (len(self.seeds), len(self.evaluation_steps), len(self.metric_names))
        self.metrics = np.broadcast_to(np.array(self.accuracies, np.float32)[:, None, None], shape)


def population(init: str, *accuracies: float, first_seed: int = 0, status=(), **choices) -> StandIn:
    seeds = tuple(range(first_seed, first_seed + len(accuracies)))
    return StandIn(Recipe(architecture="mlp-1-w8", init=init, **choices), seeds, accuracies, status)


def test_runs_of_several_populations_are_pooled_by_seed_and_count_once():
    """Seeds 3, 4 come first in the list but last in the arm; seed 1 is there twice and is taken once."""
    he = [
        population("he", 0.4, 0.5, first_seed=3),
        population("he", 0.1, 0.2, 0.3),
        population("he", 0.9, first_seed=1),
    ]
    (arm, other), notes = read_arms([*he, population("xavier", 0.5)], baseline="he")
    assert (arm.seeds, other.seeds) == ((0, 1, 2, 3, 4), (0,))
    assert arm.final == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert arm.curves.shape == (5, 3)
    assert [source.accuracies[index] for source, index in arm.sources] == pytest.approx(arm.final)
    assert notes == []


def test_rate_is_chosen_on_validation_and_divergence_counts_as_chance():
    """Rate 0.1 has the better survivors, but half its runs are lost: 0.5 * 0.9 + 0.5 * 0.1 < 0.8."""
    arms, _ = read_arms(
        [
            population("he", 0.8, 0.8, lr=0.01),
            population("he", 0.9, 0.9, lr=0.1, status=("ok", "diverged")),
            population("xavier", 0.7, 0.7, lr=0.01),
        ],
        baseline="he",
    )
    he, xavier = choose_rates(arms, classes=10)
    assert (he.arm.lr, he.scores) == (0.01, pytest.approx((0.8, 0.5)))
    assert he.at_edge
    assert not xavier.at_edge
    assert [spread.n for spread in he.validation] == [2, 1]
    assert math.isnan(he.tried[1].final[1])


def test_only_initialiser_and_rate_may_differ():
    with pytest.raises(ConfigError, match=r"differ in epochs \(20 with init he, 30 with init xavier\)"):
        read_arms([population("he", 0.5), population("xavier", 0.5, epochs=30)], baseline="he")
    read_arms([population("he", 0.5), population("xavier", 0.5, lr=1.0, saved="all")], baseline="he")


def test_other_evaluation_steps_cannot_be_averaged():
    odd = StandIn(population("he", 0.5).recipe, (7,), (0.5,), evaluation_steps=np.array([0, 10, 20, 30]))
    with pytest.raises(ZooError, match="different steps"):
        read_arms([population("he", 0.5), odd, population("xavier", 0.5)], baseline="he")


def test_missing_metrics_are_named():
    bare = StandIn(population("he", 0.5).recipe, (0,), (0.5,), metric_names=("train_loss", "test_accuracy"))
    with pytest.raises(ZooError, match="no validation_accuracy"):
        read_arms([bare, population("xavier", 0.5)], baseline="he")


def test_unknown_names_and_nothing_to_compare():
    zoo = [population("he", 0.5), population("xavier", 0.5)]
    with pytest.raises(UnknownNameError, match="did you mean 'xavier'"):
        read_arms(zoo, baseline="he", inits=("xaver",))
    with pytest.raises(UnknownNameError, match="unknown architecture in the zoo 'vgg-4-w8'"):
        read_arms(zoo, baseline="he", architectures=("vgg-4-w8",))
    with pytest.raises(ConfigError, match="nothing to compare.*nothing but he"):
        read_arms(zoo[:1], baseline="he")


def test_architectures_without_the_baseline_are_left_out_aloud():
    lonely = StandIn(Recipe(architecture="vgg-4-w8", init="xavier"), (0,), (0.5,))
    arms, notes = read_arms([population("he", 0.5), population("xavier", 0.5), lonely], baseline="he")
    assert {arm.architecture for arm in arms} == {"mlp-1-w8"}
    assert notes == ["vgg-4-w8 is left out: the zoo holds no run with the baseline he for it."]


def test_labels_are_short_and_unique():
    assert short_labels(["he", "runs/demo/noise-ghn", "he+lsuv"]) == {
        "he": "he",
        "runs/demo/noise-ghn": "noise-ghn",
        "he+lsuv": "he+lsuv",
    }
    assert short_labels(["runs/a/ghn", "runs/b/ghn", "he"]) == {
        "runs/a/ghn": "a/ghn",
        "runs/b/ghn": "b/ghn",
        "he": "he",
    }


def test_horizons_are_the_nearest_evaluations():
    """Every 20 steps: 100 is there, 50 lies between 40 and 60 (the earlier), 800 lies beyond the end."""
    steps = np.arange(0, 181, 20)
    assert steps[horizon_indices(steps, (0, 50, 100, 800))].tolist() == [0, 20, 40, 100, 180]
    assert horizon_indices(np.array([0]), (0, 100)) == [0]


def test_median_steps_are_never_where_most_runs_never_arrive():
    assert format_steps((20.0, 40.0, 60.0)) == "40 (3/3)"
    assert format_steps((20.0, 40.0, math.inf)) == "40 (2/3)"
    assert format_steps((20.0, math.inf, math.inf)) == "never (1/3)"
