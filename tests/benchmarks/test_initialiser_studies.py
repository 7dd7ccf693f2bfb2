"""What the studies of initialisers compare, and for how long."""

from __future__ import annotations

from benchmarks import initialiser_studies as studies
from generators.published import list_generators


def test_learned_starts_are_compared_on_the_data_that_they_have_seen() -> None:
    published = {entry.name: entry.data for entry in list_generators()}
    for data, chains in studies.LEARNED.items():
        assert {published[chain.removesuffix("+lsuv")] for chain in chains} == {data}
        assert set(chains) < set(studies.methods(f"folder/{data}.npz"))


def test_the_short_studies_take_a_hundred_steps() -> None:
    for name, study in studies.STUDIES.items():
        if name.startswith("short"):
            training = study.images - round(0.1 * study.images)
            assert training // study.recipe.batch_size * study.recipe.epochs == study.horizons[-1] == 100
