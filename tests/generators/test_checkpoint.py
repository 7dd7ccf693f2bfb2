"""Checkpoints: round trip, damage of any byte, foreign folders, what saving leaves when it fails."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import nn

from generators import checkpoint
from generators.checkpoint import CARD, CONFIG, EXAMINED_MEMBERS, WEIGHTS, load, save, verify
from generators.errors import CheckpointError, ConfigError, UnknownNameError
from generators.filling import init
from generators.generator import GENERATOR_KINDS, Generator
from generators.initialiser import Kind, Proposal, Request


@dataclass(frozen=True)
class PartConfig:
    width: int = 3


@dataclass(frozen=True)
class ToyConfig:
    scale: float = 0.5
    parts: tuple[PartConfig, ...] = (PartConfig(2), PartConfig(4))
    kernel: tuple[int, int] = (3, 3)
    names: dict[str, tuple[int, ...]] | None = None


class Toy(Generator):
    """Fills every parameter with `scale * level`; two of its own tensors are shared."""

    Config: ClassVar[type] = ToyConfig
    kind: ClassVar[Kind] = Kind.GLOBAL

    def __init__(self, config: ToyConfig, *, name: str = "", card: dict | None = None) -> None:
        super().__init__(config, name=name, card=card)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    @property
    def kind_name(self) -> str:
        return "toy"

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        proposal = Proposal()
        for info in request.inventory:
            noise = torch.linspace(-1, 1, info.numel).reshape(info.shape)
            proposal.values[info.name] = self.config.scale * self.first.weight.detach().std() * noise
            proposal.sources[info.name] = "toy"
        return proposal


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATOR_KINDS, "toy", f"{__name__}:Toy")


@pytest.fixture
def toy() -> Toy:
    config = ToyConfig(parts=(PartConfig(7),), names={"a": (1, 2)})
    return Toy(
        config, name="toy-digits", card={"data": "digits", "licence": "Apache-2.0", "metrics": {"accuracy": 0.7}}
    )


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    return save(toy, tmp_path / "toy")


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- round trip


def test_round_trip(toy: Toy, folder: Path) -> None:
    """Class, config (with nested dataclasses and tuples), card, name, weights and proposals survive."""
    state = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (type(loaded), loaded.config, loaded.card, loaded.name) == (Toy, toy.config, toy.card, "toy-digits")
    assert not loaded.training
    assert loaded.second.weight is loaded.first.weight
    for key, value in toy.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    init(first, toy)
    report = init(second, str(folder))
    assert torch.equal(first.weight, second.weight)
    assert report.generated == {"weight": "toy", "bias": "toy"}


def test_saving_twice_gives_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    assert _contents(save(toy, tmp_path / "a")) == _contents(save(toy, tmp_path / "b"))


def test_a_folder_can_be_a_step_of_a_chain(folder: Path) -> None:
    model = nn.Linear(4, 4)
    report = init(model, f"{folder}+lsuv", data=[(torch.eye(4), None)])
    assert report.generated["weight"].startswith("toy, then lsuv")


def test_card_is_readable(folder: Path) -> None:
    text = (folder / CARD).read_text()
    assert text.startswith("# toy-digits\n")
    assert "**data**: digits" in text
    assert "- **metrics**:\n  - **accuracy**: 0.7" in text


def test_files_have_the_permissions_of_the_umask(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


# ---- damage


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
def test_one_flipped_byte_is_found(folder: Path, name: str) -> None:
    """Every byte of the small files, every 7th of the weights, flipped in turn: verification always refuses."""
    path = folder / name
    content = path.read_bytes()
    for position in range(0, len(content), 7 if name == WEIGHTS else 1):
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{CONFIG}|{name}|format"):
            verify(folder)
    path.write_bytes(content)
    verify(folder)


def test_changes_that_json_does_not_see_are_found(folder: Path) -> None:
    """A newline that becomes a space leaves the same JSON values, and is damage all the same."""
    content = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(content.replace(b"\n", b" ", 1))
    assert json.loads((folder / CONFIG).read_bytes()) == json.loads(content)
    with pytest.raises(CheckpointError, match="digest"):
        load(folder)


def test_load_refuses_damage(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256 of weights.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD])
def test_missing_and_truncated_files(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(folder)


def _rewrite(folder: Path, **changes: object) -> None:
    """Change config.json consistently, as another version of the package would write it."""
    description = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_bytes(checkpoint._render({**description, "digest": checkpoint._digest(description)}))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format": 2}, CheckpointError, "format 2"),
        ({"kind": "toyy"}, UnknownNameError, "did you mean 'toy'"),
        ({"config": {"size": 1}}, CheckpointError, "has no size"),
        ({"files": {}}, CheckpointError, "must list"),
        ({"files": {"../weights.safetensors": "0", WEIGHTS: "0"}}, CheckpointError, "plain file names"),
    ],
)
def test_other_versions_and_foreign_files(folder: Path, changes: dict, error: type[Exception], words: str) -> None:
    _rewrite(folder, **changes)
    with pytest.raises(error, match=words):
        load(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    safetensors.torch.save_file({"first.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    files = {WEIGHTS: checkpoint._sha256(folder / WEIGHTS)}
    _rewrite(folder, files=files)
    with pytest.raises(CheckpointError, match="do not fit"):
        load(folder)


# ---- saving


def test_replaces_a_checkpoint_and_keeps_other_files(toy: Toy, folder: Path) -> None:
    (folder / "log.jsonl").write_text("{}")
    with torch.no_grad():
        toy.first.weight.fill_(2.0)
    save(toy, folder)
    assert load(folder).first.weight.eq(2).all()
    assert (folder / "log.jsonl").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"toy"}


def test_does_not_overwrite_what_is_no_checkpoint(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        save(toy, tmp_path)
    assert _contents(tmp_path) == {"README.md": b"my project"}
    with pytest.raises(CheckpointError, match="is a file"):
        save(toy, tmp_path / "README.md")


def test_broken_generators_are_not_saved(toy: Toy, tmp_path: Path) -> None:
    """NaN weights, cards that JSON cannot hold, and a disk that fails leave nothing behind."""
    toy.card = {"when": object()}
    with pytest.raises(ConfigError, match="JSON"):
        save(toy, tmp_path / "x")
    toy.card = {"loss": float("nan")}
    with pytest.raises(ConfigError, match="JSON"):
        save(toy, tmp_path / "x")
    toy.card = {}
    with torch.no_grad():
        toy.first.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save(toy, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_leaves_nothing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save(toy, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("direction", "refused"), [(0.2, False), (1.0, True)])
def test_collapsed_spectra_are_not_saved(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: float, refused: bool
) -> None:
    """White noise plus one direction, that takes over or not; small matrices and other tensors are not judged."""

    def propose(model: nn.Module, request: Request) -> Proposal:
        proposal, draws = Proposal(), torch.Generator().manual_seed(0)
        for info in request.inventory:
            value = torch.randn(info.shape, generator=draws)
            proposal.values[info.name] = value + direction * (info.name == "0.weight")
            proposal.sources[info.name] = "toy"
        return proposal

    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3), nn.Linear(3, 1))
    monkeypatch.setattr(toy, "propose", propose)
    monkeypatch.setattr(toy, "probes", lambda: {"mlp": (model, torch.zeros(1, 40))})
    if refused:
        with pytest.raises(CheckpointError, match=r"0.weight \(50, 40\) .* model 'mlp' has stable rank 1\.\d+"):
            save(toy, tmp_path / "x")
        assert not list(tmp_path.iterdir())
    else:
        save(toy, tmp_path / "x")


def test_spectra_are_examined_in_several_members_and_in_what_the_training_was_for(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White noise in all matrices but one, of the last member, of a model that is not among the probes."""

    def propose(model: nn.Module, request: Request) -> Proposal:
        proposal, draws = Proposal(), torch.Generator().manual_seed(request.member)
        for info in request.inventory:
            collapsed = info.shape == (60, 40) and request.member == EXAMINED_MEMBERS - 1
            proposal.values[info.name] = torch.randn(info.shape, generator=draws) + 1.0 * collapsed
            proposal.sources[info.name] = "toy"
        return proposal

    example = torch.zeros(1, 40)
    monkeypatch.setattr(toy, "propose", propose)
    monkeypatch.setattr(toy, "probes", lambda: {"probe": (nn.Sequential(nn.Linear(40, 50)), example)})
    with pytest.raises(CheckpointError, match=r"\(60, 40\) of member 2 .* model 'own' has stable rank 1\.\d+"):
        save(toy, tmp_path / "x", examined={"own": (nn.Sequential(nn.Linear(40, 60)), example)})
    assert not list(tmp_path.iterdir())
    save(toy, tmp_path / "x", examined={"own": (nn.Sequential(nn.Linear(40, 61)), example)})
