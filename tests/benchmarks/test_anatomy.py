"""Dissections of a start: what each leaves and what it replaces, and a tiny study from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from collect.architectures import build
from generators import init, initialiser
from generators.errors import UnknownNameError
from generators.initialiser import list_initialisers
from scripts import BENCHMARKS, load_script

WIDE = next(
    name
    for name, value in build("resnet-8-w4", shape=(3, 8, 8), classes=10).named_parameters()
    if value.shape == (4, 4, 3, 3)
)


@pytest.fixture
def anatomy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which registers its dissections."""
    list_initialisers()
    monkeypatch.setattr(initialiser, "_REGISTRY", dict(initialiser._REGISTRY))
    return load_script(BENCHMARKS / "anatomy.py")


def before_and_after(chain: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a small ResNet, as they are and dissected."""
    model = build("resnet-8-w4", shape=(3, 8, 8), classes=10)
    init(model, "orthogonal", seed=1)
    nn.init.uniform_(model.get_parameter(WIDE), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init(model, initialiser.resolve(f"he+{chain}")[1], seed=2)
    return before, dict(model.state_dict())


def singular_values(value: Tensor) -> Tensor:
    return torch.linalg.svdvals(value.flatten(1))


def test_shuffled_leaves_the_histogram_alone(anatomy: ModuleType) -> None:
    before, after = (found[WIDE] for found in before_and_after("shuffled"))
    assert before.flatten().sort().values.equal(after.flatten().sort().values) and not before.equal(after)


def test_rotated_leaves_the_singular_values_alone(anatomy: ModuleType) -> None:
    before, after = (found[WIDE] for found in before_and_after("rotated"))
    torch.testing.assert_close(singular_values(after), singular_values(before))
    assert not torch.allclose(after.flatten(1).T @ after.flatten(1), before.flatten(1).T @ before.flatten(1), atol=0.1)


def test_mixed_outputs_leave_what_a_layer_reads(anatomy: ModuleType) -> None:
    before, after = (found[WIDE].flatten(1) for found in before_and_after("mixed-outputs"))
    torch.testing.assert_close(after.T @ after, before.T @ before)
    assert not torch.allclose(after, before, atol=0.1)


def test_permuted_inputs_leave_filters_whole(anatomy: ModuleType) -> None:
    before, after = (found[WIDE] for found in before_and_after("permuted-inputs"))
    order = [next(j for j in range(4) if after[0, i].equal(before[0, j])) for i in range(4)]
    assert after.equal(before[:, order]) and order != [0, 1, 2, 3]


@pytest.mark.parametrize("chain", ["classifier-he", "body-he"])
def test_he_for_a_part_leaves_the_other(anatomy: ModuleType, chain: str) -> None:
    before, after = before_and_after(chain)
    weights = [name for name, value in before.items() if value.ndim > 1]
    replaced = {name for name in weights if not before[name].equal(after[name])}
    (classifier,) = (name for name in weights if before[name].ndim == 2)
    assert replaced == ({classifier} if chain == "classifier-he" else set(weights) - {classifier})


def test_small_classifiers(anatomy: ModuleType) -> None:
    """The spread of torch's own default, and nothing."""
    wide = nn.Linear(400, 100)
    init(wide, initialiser.resolve("he+classifier-torch")[1])
    assert wide.weight.std().item() == pytest.approx((1 / 1200) ** 0.5, rel=0.02)
    init(wide, initialiser.resolve("he+classifier-zero")[1])
    assert not wide.weight.any()


def test_only_some_starts(anatomy: ModuleType, tmp_path: Path) -> None:
    """Those that are named, from the same seeds; one that is not known is refused before anything is trained."""
    given = dict(json_file=tmp_path / "a.json", start="he", data="digits", quick=True, runs=1, out=tmp_path / "out")
    anatomy.benchmark(**given, only=("he", "he+classifier-zero"))
    starts = {key.split("/")[1] for key in json.loads((tmp_path / "a.json").read_text()) if "/" in key}
    assert starts == {"he", "he+classifier-zero"}
    with pytest.raises(UnknownNameError, match="did you mean.*classifier-zero"):
        anatomy.benchmark(**given, only=("he+classifier-zer",))


def test_a_tiny_study(anatomy: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "anatomy.json"
    anatomy.benchmark(json_file=file, start="he", data="digits", quick=True, runs=1, he_lr=0.1, out=tmp_path / "out")
    figures = json.loads(file.read_text())
    assert figures["runs"] == 1 and "git_commit" in figures
    for chain in ("he", *(f"he+{each.name}" for each in (*anatomy.DISSECTIONS, *anatomy.CONTROLS))):
        assert 0 < figures[f"resnet-8-w4/{chain}/0.1/accuracy_10"] < 1
    assert (tmp_path / "out" / "anatomy.md").read_text().count("\n") == 2 + 9
    assert (tmp_path / "out" / "anatomy.png").read_bytes().startswith(b"\x89PNG")
