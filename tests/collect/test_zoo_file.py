"""Schema 1: what is written is read back bit for bit, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from collect import data, zoo_file
from collect.population import Population, train
from collect.recipe import ADDED, Recipe, canonical_json, population_id, run_ids
from collect.zoo_file import read_header, verify, write
from full_disk import disk_of
from generators.errors import ZooError

SEEDS = (3, 5)


@pytest.fixture(scope="module")
def population() -> Population:
    """Two small ResNets (weights and buffers), three checkpoints."""
    recipe = Recipe(architecture="resnet-8-w2", epochs=2, batch_size=256, saved="all")
    return train(recipe, SEEDS, data.load("digits"))


@pytest.fixture(scope="module")
def stored(population: Population, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(population, tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(stored, tmp_path))


def test_the_header_says_what_the_population_says(population: Population, stored: Path) -> None:
    header = verify(stored)
    recipe, digest = population.recipe, population.data_digest
    assert header.id == stored.stem == population_id(recipe, digest, SEEDS)
    for name in ("layout", "buffer_layout", "metric_names", "architecture_json"):
        assert getattr(header, name) == getattr(population, name)
    for name in ("metrics", "evaluation_epochs", "evaluation_steps", "checkpoint_epochs"):
        np.testing.assert_array_equal(getattr(header, name), getattr(population, name))
    assert header.evaluation_epochs[0] == header.evaluation_steps[0] == 0
    assert [run["id"] for run in header.runs] == run_ids(recipe, digest, SEEDS)
    assert [run["seed"] for run in header.runs] == list(SEEDS)
    assert [run["status"] for run in header.runs] == ["ok", "ok"]
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        assert {run[field.name] for run in header.runs} == {json.dumps(value) if isinstance(value, tuple) else value}
    assert header.attributes["recipe"] == canonical_json(recipe)
    for name in ("torch_version", "git_commit", "device", "precision", "package_version", "form"):
        assert header.attributes[name]


def test_datasets_as_any_hdf5_reader_sees_them(population: Population, stored: Path) -> None:
    """Contiguous, unfiltered, typed; the memory map is compared with HDF5's own way of reading."""
    header = read_header(stored)
    with h5py.File(stored) as file:
        assert set(file) == {"weights", "buffers", "layout", "buffer_layout", "metrics", "evaluation_epochs",
                             "evaluation_steps", "checkpoint_epochs", "runs", "architecture"}  # fmt: skip
        for name in ("weights", "buffers"):
            dataset, block = file[name], getattr(header, name)
            assert dataset.chunks is None and dataset.compression is None and dataset.dtype == "<f4"
            assert list(dataset.attrs["axes"][:2]) == [b"run", b"checkpoint"]
            assert block.offset % 64 == 0
            np.testing.assert_array_equal(dataset[()], getattr(population, name))
            np.testing.assert_array_equal(block.map(stored), dataset[()])
        assert [name.decode() for name in file["metrics"].attrs["names"]] == list(population.metric_names)
        kinds = {name: file["runs"].dtype[name].kind for name in file["runs"].dtype.names}
        assert [kinds[name] for name in ("id", "seed", "lr", "nesterov", "init")] == ["S", "i", "f", "b", "S"]
        assert file.attrs["complete"] and file.attrs["schema"] == 1 and file.attrs["K"] == len(SEEDS)
        assert len(file.attrs["row_digests"]) == len(SEEDS)


def test_a_model_without_buffers(tmp_path: Path) -> None:
    recipe = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)
    header = verify(write(train(recipe, [0], data.load("digits")), tmp_path))
    assert header.buffers.map(header.path).shape == (1, 1, 0)


def half(population: Population) -> Population:
    return replace(population, recipe=replace(population.recipe, trajectory="float16"))


def test_states_before_the_last_in_half_precision(population: Population, tmp_path: Path) -> None:
    """The last is kept bit for bit; every way of reading gives float32."""
    header = verify(write(half(population), tmp_path))
    assert header.attributes["schema"] == 2 and header.checkpoints == 3
    assert header.weights.offset % 64 == header.trajectory.offset % 64 == 0
    with h5py.File(header.path) as file:
        assert file["weights"].shape[1] == 1 and file["weights"].dtype == "<f4"
        assert file["trajectory"].shape[1] == 2 and file["trajectory"].dtype == "<f2"
        assert file["trajectory"].chunks is None
    expected = population.weights.copy()
    expected[:, :-1] = expected[:, :-1].astype(np.float16)
    assert header.states().dtype == np.float32
    np.testing.assert_array_equal(header.states(), expected)
    for checkpoint in (0, 1, 2, -1, -2, -3):
        np.testing.assert_array_equal(header.state(checkpoint), expected[:, checkpoint])
    with pytest.raises(IndexError):
        header.state(3)
    whole = header.path.stat().st_size, read_header(write(population, tmp_path / "float32")).path.stat().st_size
    assert whole[1] - whole[0] == pytest.approx(population.weights[:, :-1].nbytes / 2, abs=4096)


def test_a_flipped_bit_in_a_trajectory_is_found(population: Population, tmp_path: Path) -> None:
    header = verify(write(half(population), tmp_path))
    content = bytearray(header.path.read_bytes())
    content[header.trajectory.offset] ^= 1
    header.path.write_bytes(content)
    with pytest.raises(ZooError, match=header.runs[0]["id"]):
        verify(header.path)


def test_weights_that_half_precision_cannot_hold_are_stored_in_float32(
    population: Population, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not finite anyway is no reason."""
    for value, schema in ((1e5, 1), (np.inf, 2), (np.nan, 2)):
        weights = population.weights.copy()
        weights[1, 0, 7] = value
        caplog.clear()
        header = verify(write(half(replace(population, weights=weights)), tmp_path / str(value)))
        assert header.attributes["schema"] == schema
        assert ("stored in float32" in caplog.text) == (schema == 1)
        np.testing.assert_array_equal(header.states()[1, 0, 7], np.float32(value))


def test_a_single_state_needs_no_trajectory(tmp_path: Path) -> None:
    recipe = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256, trajectory="float16")
    header = verify(write(train(recipe, [0], data.load("digits")), tmp_path))
    assert header.attributes["schema"] == 1 and header.checkpoints == 1


def test_how_it_was_trained_is_recorded(population: Population, stored: Path, tmp_path: Path) -> None:
    header = read_header(stored)
    assert header.attributes["stack"] == population.stack == len(SEEDS)
    assert header.attributes["precision"] == "float32"
    low = replace(population, recipe=replace(population.recipe, precision="bfloat16"))
    assert read_header(write(low, tmp_path)).attributes["precision"] == "bfloat16"


def test_digests_of_an_earlier_version_still_hold(population: Population, stored: Path, tmp_path: Path) -> None:
    """A file without the columns that recipes got later has the same digests as one that has them."""
    header = read_header(stored)
    older = tmp_path / stored.name
    with h5py.File(stored) as file, h5py.File(older, "w") as copy:
        for name in file.attrs:
            copy.attrs[name] = file.attrs[name]
        for name in set(file) - {"runs"}:
            file.copy(name, copy)
        table = file["runs"][()]
        copy["runs"] = table[[name for name in table.dtype.names if name not in ADDED]].copy()
    found = verify(older)
    assert found.digest == header.digest and not set(ADDED) & set(found.runs[0])


def test_runs_that_diverged_are_stored_with_their_nans(tmp_path: Path) -> None:
    recipe = Recipe(architecture="mlp-2-w4", epochs=1, lr=1e30, batch_size=256)
    header = verify(write(train(recipe, SEEDS, data.load("digits")), tmp_path))
    assert {run["status"] for run in header.runs} == {"diverged"}
    assert np.isnan(header.metrics[:, -1]).all() and np.isfinite(header.metrics[:, 0]).all()


def test_the_digest_names_the_networks_and_nothing_else(population: Population, stored: Path, tmp_path: Path) -> None:
    digest = read_header(stored).digest
    slower = replace(population, seconds=population.seconds + 1, form="loop")
    assert read_header(write(slower, tmp_path / "slower")).digest == digest
    for number, name in enumerate(("weights", "buffers", "metrics")):
        changed = getattr(population, name).copy()
        changed.flat[-1] += 1
        path = write(replace(population, **{name: changed}), tmp_path / str(number))
        assert verify(path).digest != digest
    assert verify(write(replace(population, status=("ok", "stopped")), tmp_path / "status")).digest != digest


def test_equal_content_is_kept_and_other_content_is_refused(population: Population, copied: Path) -> None:
    before = copied.stat()
    assert write(population, copied.parent) == copied
    assert copied.stat().st_mtime_ns == before.st_mtime_ns and copied.stat().st_ino == before.st_ino
    with pytest.raises(ZooError, match="other content"):
        write(replace(population, weights=population.weights + 1), copied.parent)
    np.testing.assert_array_equal(verify(copied).weights.map(copied), population.weights)
    copied.write_bytes(b"not a zoo")
    with pytest.raises(ZooError, match="damaged"):
        write(population, copied.parent)
    assert copied.read_bytes() == b"not a zoo"


def test_nothing_is_left_when_the_disk_is_full(population: Population, tmp_path: Path) -> None:
    for size in (100, 3000, 9000):  # fails in the tables, in the weights, at closing
        with disk_of(size), pytest.raises(ZooError, match="make room"):
            write(population, tmp_path)
        assert list(tmp_path.iterdir()) == []
    write(population, tmp_path)


def test_parts_that_do_not_fit_together_are_not_written(population: Population, tmp_path: Path) -> None:
    for wrong in (
        dict(weights=population.weights[:, :, :-1]),
        dict(metrics=population.metrics[:, :-1]),
        dict(checkpoint_epochs=population.checkpoint_epochs[:-1]),
        dict(layout=population.layout[1:]),
    ):
        with pytest.raises(ZooError, match="was not written"):
            write(replace(population, **wrong), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["weights", "buffers", "metrics", "layout", "buffer_layout", "runs",
                                     "evaluation_epochs", "evaluation_steps", "checkpoint_epochs"])  # fmt: skip
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_in_any_dataset_is_found(copied: Path, dataset: str, place: float) -> None:
    with h5py.File(copied) as file:
        identity = file[dataset].id
        offset = identity.get_offset() + int(place * (identity.get_storage_size() - 1))
    content = bytearray(copied.read_bytes())
    content[offset] ^= 1
    copied.write_bytes(content)
    with pytest.raises(ZooError, match=copied.name):
        verify(copied)


def test_random_damage_is_found_or_harmless(population: Population, copied: Path) -> None:
    """A flip may hit padding or the provenance; then all that matters must still read as it was."""
    content, generator, found = copied.read_bytes(), np.random.default_rng(0), 0
    whole = verify(copied).digest
    for position in generator.integers(len(content), size=60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(generator.integers(8))
        copied.write_bytes(damaged)
        try:
            header = verify(copied)
        except ZooError:
            found += 1
            continue
        assert header.digest == whole and header.attributes["recipe"] == canonical_json(population.recipe)
        np.testing.assert_array_equal(header.weights.map(copied), population.weights)
    assert found > 20


def test_a_truncated_file_never_opens(copied: Path) -> None:
    content = copied.read_bytes()
    for length in (0, 1, 100, 2048, len(content) // 2, len(content) - 1):
        copied.write_bytes(content[:length])
        with pytest.raises(ZooError, match=copied.name):
            read_header(copied)


def test_foreign_future_unfinished_and_renamed_files_say_what_they_are(copied: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["weights"] = [1.0]
    with pytest.raises(ZooError, match="not one of a zoo"):
        read_header(foreign)
    renamed = Path(shutil.copy(copied, tmp_path / "0123456789abcdef.h5"))
    with pytest.raises(ZooError, match=copied.name):
        read_header(renamed)
    with pytest.raises(ZooError, match="does not exist"):
        read_header(tmp_path / "missing.h5")
    with h5py.File(copied, "a") as file:
        del file.attrs["complete"]
    with pytest.raises(ZooError, match="never completed"):
        read_header(copied)
    with h5py.File(copied, "a") as file:
        file.attrs["schema"] = zoo_file.SCHEMA + 1
    with pytest.raises(ZooError, match="upgrade"):
        read_header(copied)


@pytest.mark.parametrize("missing", ["weights", "layout", "runs", "architecture", "metrics"])
def test_a_missing_part_is_named(copied: Path, missing: str) -> None:
    with h5py.File(copied, "a") as file:
        del file[missing]
    with pytest.raises(ZooError, match=missing):
        read_header(copied)
