"""The probe models: every sort of layer is judged on one, and what is published is sound on all of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

import generators
from generators.checkpoint import NOISE_REACHES, check_spectrum
from generators.errors import CheckpointError
from generators.ghn.familiar import sort_of
from generators.ghn.ghn import GHN
from generators.ghn.probes import probes
from generators.graph import trace
from generators.inventory import inventory
from generators.statistics import noise_stable_rank
from small_ghn import SMALL

CONVOLUTIONS = [
    " ".join(
        [*(word for word, true in zip(("transposed", "grouped", "1-D"), facts, strict=True) if true), "convolution"]
    )
    for facts in itertools.product([False, True], repeat=3)
]
SORTS = ["classifier", "attention", "linear layer", *CONVOLUTIONS]
PUBLISHED = [entry.name for entry in generators.list_generators() if entry.kind in ("ghn", "noise-ghn")]


def test_every_sort_is_large_enough_to_be_judged_somewhere() -> None:
    judged = set()
    for model, example in probes(10).values():
        for info in inventory(model, trace(model, example)):
            if len(info.shape) > 1 and noise_stable_rank(info.shape[0], info.numel // info.shape[0]) >= NOISE_REACHES:
                judged.add(sort_of(info))
    assert judged == set(SORTS)


@pytest.mark.parametrize("sort", SORTS)
def test_a_generator_that_collapses_in_all_that_it_met_is_refused(sort: str) -> None:
    """Of rank 2, whatever the one sort of layers is that it knows."""
    with pytest.raises(CheckpointError, match="stable rank [12]"):
        check_spectrum(GHN(replace(SMALL, rank=2, met=(sort,))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_sound(name: str) -> None:
    """In what it knows, and in what it would make if it were told to decode all."""
    ghn = generators.load(name)
    check_spectrum(ghn)
    ghn.config = replace(ghn.config, met=())
    check_spectrum(ghn)
