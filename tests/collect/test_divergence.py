"""A member that diverges is frozen and flagged, and does no harm to the others."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from torch import nn

from collect import training
from collect.data import ImageSet, load
from collect.population import train
from collect.recipe import Recipe
from generators import initialiser
from generators.initialiser import Kind, Proposal, Request
from generators.pointwise import HE
from generators.seeds import derive


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load("digits")


@dataclasses.dataclass(frozen=True)
class Poison:
    """He, but the weights of one seed are `scale` times too large."""

    seed: int
    scale: float
    name: str = "poison"
    kind: Kind = Kind.POINTWISE

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        proposal = HE.propose(model, request)
        if request.seed == derive(self.seed, "init"):
            proposal.values = {key: value * self.scale for key, value in proposal.values.items()}
        return proposal


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make the initialiser "poison" known for this test; it spoils seed 4."""

    def register(scale: float) -> None:
        info = initialiser.InitialiserInfo("poison", "pointwise", (), "", "")
        monkeypatch.setitem(initialiser._REGISTRY, "poison", (info, lambda: Poison(4, scale)))

    return register


MLP = Recipe(architecture="mlp-2-w16", epochs=2, batch_size=128, lr=0.05, saved="all")


@pytest.mark.parametrize(("scale", "evaluated"), [(1e25, 0), (1e6, 1)])
def test_a_diverged_member_is_frozen_and_the_others_are_untouched(
    images: ImageSet, poison: Callable[[float], None], scale: float, evaluated: int
) -> None:
    """Spoiled from the start, or exploding during training; the others equal, bit for bit, a healthy population."""
    poison(scale)
    healthy = train(MLP, [3, 4, 5], images)
    found = train(dataclasses.replace(MLP, init="poison"), [3, 4, 5], images)
    assert found.status == ("ok", "diverged", "ok")
    assert healthy.status == ("ok",) * 3
    for member in (0, 2):
        assert np.array_equal(found.weights[member], healthy.weights[member])
        assert np.array_equal(found.metrics[member], healthy.metrics[member])
    assert np.isfinite(found.metrics[1, :evaluated]).all()
    assert np.isnan(found.metrics[1, evaluated:]).all()
    assert np.array_equal(found.weights[1, 1], found.weights[1, 2], equal_nan=True)  # frozen since


def test_looking_seldom_for_divergence_changes_only_the_weights_of_who_diverged(
    images: ImageSet, poison: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, done on the CPU."""
    poison(1e6)
    recipe = dataclasses.replace(MLP, init="poison")
    often = train(recipe, [3, 4, 5], images)
    monkeypatch.setattr(training, "LOOK_EVERY", {})
    seldom = train(recipe, [3, 4, 5], images)
    assert seldom.status == often.status == ("ok", "diverged", "ok")
    assert np.array_equal(seldom.metrics, often.metrics, equal_nan=True)
    assert np.array_equal(seldom.weights[[0, 2]], often.weights[[0, 2]])


def test_a_population_of_diverged_members_ends_early_and_is_whole(
    images: ImageSet, poison: Callable[[float], None]
) -> None:
    poison(1e25)
    found = train(dataclasses.replace(MLP, init="poison"), [4], images)
    assert found.status == ("diverged",)
    assert found.weights.shape[:2] == (1, 3)
    assert np.isnan(found.metrics).all()
