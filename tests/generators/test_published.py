"""Where checkpoints come from: names, pretended https and hub, the cache, the index."""

from __future__ import annotations

import email.message
import io
import json
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import nn

from generators import published
from generators.checkpoint import CARD, CONFIG, WEIGHTS, load, save
from generators.errors import CheckpointError, UnknownNameError
from generators.generator import GENERATOR_KINDS, Generator
from generators.initialiser import Kind, Proposal, Request
from generators.pointwise import HE
from generators.published import list_generators, looks_like_location


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4


class Toy(Generator):
    """The smallest generator with weights of its own."""

    Config: ClassVar[type] = ToyConfig
    kind: ClassVar[Kind] = Kind.GLOBAL

    def __init__(self, config: ToyConfig, *, name: str = "", card: dict | None = None) -> None:
        super().__init__(config, name=name, card=card)
        self.linear = nn.Linear(config.width, config.width)

    @property
    def kind_name(self) -> str:
        return "toy"

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        return HE.propose(model, request)


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATOR_KINDS, "toy", f"{__name__}:Toy")


@pytest.fixture
def toy() -> Toy:
    return Toy(ToyConfig(), name="toy-digits", card={"data": "digits", "licence": "Apache-2.0", "metrics": {"a": 0.7}})


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    return save(toy, tmp_path / "toy")


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
    entry = published.index_entry(folder)
    rows = {"toy-path": entry | {"path": "toy"}, "toy-url": entry | {"url": URL}, "toy-none": entry}
    path = folder.parent / "index.json"
    path.write_text(json.dumps({"format": 1, "generators": rows}))
    monkeypatch.setattr(published, "index_path", lambda: path)
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
    assert published.index_path().is_file()
    for entry in list_generators():
        if entry.path:
            folder = published.index_path().parent / entry.path
            row = {key: getattr(entry, key) for key in published.index_entry(folder)}
            assert row == published.index_entry(folder)
            assert load(entry.name).name == entry.name
        else:
            assert entry.url
            assert entry.url.startswith("https://")
