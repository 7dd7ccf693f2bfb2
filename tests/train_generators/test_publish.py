"""Publishing, against what a user then sees: the name in the index, the same weights, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import generators
from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from train_generators.publish import publish

SMALL = GHNConfig(hidden=16, heads=2, layers=1, rank=8, cells=8, width=8)


def test_a_published_generator_is_listed_and_loads_with_the_same_weights(tmp_path: Path) -> None:
    ghn = GHN(SMALL, card={"data": "digits", "summary": "toy", "licence": "Apache-2.0"})
    folder = publish(generators.save(ghn, tmp_path / "fit"), "ghn-toy", into=tmp_path / "checkpoints")
    index = json.loads((tmp_path / "checkpoints" / "index.json").read_text())
    row = index["generators"]["ghn-toy"]
    loaded = generators.load(folder)
    assert row["path"] == "ghn-toy" and row["data"] == "digits" and row["digest"] == loaded.digest
    assert loaded.name == "ghn-toy"
    assert all(torch.equal(value, ghn.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["", "a+b", "a/b", "a b", ".", "..", "-x", "_a", "A", "a\n", "index.json"])
def test_names_that_a_chain_could_not_hold_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="published name"):
        publish(generators.save(GHN(SMALL), tmp_path / "fit"), name, into=tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["he", "nio", "torch"])
def test_names_of_registered_initialisers_are_refused(tmp_path: Path, name: str) -> None:
    """A chain would go on meaning the initialiser."""
    assert name in {info.name for info in generators.list_initialisers()}
    with pytest.raises(ConfigError, match=f"'{name}' is a registered initialiser"):
        publish(generators.save(GHN(SMALL), tmp_path / "fit"), name, into=tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_published_name_may_be_published_again(tmp_path: Path) -> None:
    folder = publish(generators.save(GHN(SMALL), tmp_path / "fit"), "noise-ghn-digits", into=tmp_path / "checkpoints")
    assert generators.load(folder).name == "noise-ghn-digits"
