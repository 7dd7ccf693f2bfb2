"""Checkpoints: round trip, damage of any byte, foreign folders, downloads over pretended https, the index."""

from __future__ import annotations

import email.message
import io
import json
import os
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import nn

from generators import checkpoint
from generators.checkpoint import CARD, CONFIG, WEIGHTS, list_generators, load, looks_like_location, save, verify
from generators.errors import CheckpointError, ConfigError, UnknownNameError
from generators.generator import GENERATOR_KINDS, Generator
from generators.initialiser import Kind, Proposal, Request, init


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
    assert '**metrics**: {"accuracy": 0.7}' in text


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


# ---- names


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="list"):
        load("no-such-generator")
    with pytest.raises(CheckpointError, match="no such folder"):
        load("./no-such-folder")
    with pytest.raises(CheckpointError, match="config.json"):
        load(tmp_path)


def test_hub_id_that_cannot_be_had() -> None:
    """The hub is offline in tests: the message names both places that were looked at."""
    with pytest.raises(CheckpointError, match=r"no such folder here.*hub"):
        load("nobody/nothing@main")


def test_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id and revision reach huggingface_hub, and its folder is verified like any other."""
    import huggingface_hub

    asked = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load("owner/toy@v1").name == "toy-digits"
    assert asked == {"name": "owner/toy", "revision": "v1", "allow_patterns": [CONFIG, WEIGHTS, CARD]}


def test_what_looks_like_a_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(map(looks_like_location, ("here", "a/b", "./x", "https://x.org/y", str(tmp_path))))
    assert not any(map(looks_like_location, ("he", "noise-ghn-digits", "there")))


# ---- downloads


class _FakeHttps(urllib.request.HTTPSHandler):
    """Serves a folder as https://example.org/ and counts what is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.asked = root, []

    def https_open(self, request: urllib.request.Request) -> urllib.response.addinfourl:
        name = request.selector.lstrip("/")
        self.asked.append(name)
        if not (self.root / name).is_file():
            raise urllib.error.HTTPError(request.full_url, 404, "not found", email.message.Message(), io.BytesIO())
        content = io.BytesIO((self.root / name).read_bytes())
        answer = urllib.response.addinfourl(content, email.message.Message(), request.full_url, 200)
        answer.msg = "OK"
        return answer


@pytest.fixture
def server(folder: Path) -> Iterator[_FakeHttps]:
    before = urllib.request._opener
    handler = _FakeHttps(folder.parent)
    urllib.request.install_opener(urllib.request.build_opener(handler))
    yield handler
    urllib.request.install_opener(before)


URL = "https://example.org/toy"


def test_download_is_cached(server: _FakeHttps, own_cache: Path) -> None:
    """The second load asks for config.json only; a damaged cache is fetched again."""
    assert load(URL).name == "toy-digits"
    assert server.asked == [f"toy/{name}" for name in (CONFIG, CARD, WEIGHTS)]
    server.asked.clear()
    load(f"{URL}/")
    assert server.asked == [f"toy/{CONFIG}"]
    (cached,) = own_cache.iterdir()
    (cached / WEIGHTS).write_bytes(b"damaged")
    assert load(f"{URL}/{CONFIG}").name == "toy-digits"
    assert [path.name for path in own_cache.iterdir()] == [cached.name]


def test_damaged_download_is_not_kept(server: _FakeHttps, folder: Path, own_cache: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="sha256"):
        load(URL)
    assert not list(own_cache.iterdir())


def test_missing_url(server: _FakeHttps, own_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be downloaded.*404"):
        load("https://example.org/other")
    with pytest.raises(CheckpointError, match="no such folder"):
        load("http://example.org/toy")  # not https: never asked for
    assert not list(own_cache.iterdir())


# ---- the index


@pytest.fixture
def index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with the toy by path and by url."""
    entry = checkpoint.index_entry(folder)
    rows = {"toy-path": entry | {"path": "toy"}, "toy-url": entry | {"url": URL}, "toy-none": entry}
    path = folder.parent / "index.json"
    path.write_text(json.dumps({"format": 1, "generators": rows}))
    monkeypatch.setattr(checkpoint, "index_path", lambda: path)
    return path


def test_published_by_path_and_url(index: Path, server: _FakeHttps, folder: Path) -> None:
    entries = {entry.name: entry for entry in list_generators()}
    assert entries["toy-path"].size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (entries["toy-path"].kind, entries["toy-path"].data) == ("toy", "digits")
    load("toy-path")
    assert not server.asked
    load("toy-url")
    asked = len(server.asked)
    load("toy-url")
    assert len(server.asked) == asked  # the digest is known: nothing has to be asked
    with pytest.raises(UnknownNameError, match="'toy-path'"):
        load("toy-pth")
    with pytest.raises(CheckpointError, match="neither path nor url"):
        load("toy-none")


def test_published_digest_is_enforced(index: Path, server: _FakeHttps, toy: Toy, folder: Path, own_cache: Path) -> None:
    """A sound checkpoint that is not the published one is refused, from the disk and from the network."""
    toy.card["data"] = "other"
    save(toy, folder)
    for name in ("toy-path", "toy-url"):
        with pytest.raises(CheckpointError, match="not the published"):
            load(name)
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_download_larger_than_published_is_refused(index: Path, server: _FakeHttps, folder: Path) -> None:
    rows = json.loads(index.read_text())
    rows["generators"]["toy-url"]["size_bytes"] = 10
    index.write_text(json.dumps(rows))
    with pytest.raises(CheckpointError, match="larger than"):
        load("toy-url")


def test_damaged_index(index: Path) -> None:
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="install"):
        list_generators()


def test_everything_published_is_sound() -> None:
    """Each row of the real index agrees with its folder: kind, digest, size, data, licence and metrics."""
    assert checkpoint.index_path().is_file()
    for entry in list_generators():
        if entry.path:
            folder = checkpoint.index_path().parent / entry.path
            row = {key: getattr(entry, key) for key in checkpoint.index_entry(folder)}
            assert row == checkpoint.index_entry(folder)
            assert load(entry.name).name == entry.name
        else:
            assert entry.url
            assert entry.url.startswith("https://")
