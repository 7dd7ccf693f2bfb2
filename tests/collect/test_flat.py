"""Rows of weights by every way of reading, against single state dicts."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from collect import data, packed, zoo_file
from collect.flat import Flat
from collect.plan import plan, sweep
from collect.population import train
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo, scan
from generators.errors import ConfigError, UnknownNameError

RUNS, TOGETHER = 7, 3


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Seven small ResNets in three populations, and two MLPs."""
    path = tmp_path_factory.mktemp("zoo")
    base = Recipe(epochs=1, batch_size=256, saved="all", architecture="resnet-8-w2")
    collect(plan([base], runs=RUNS, together=TOGETHER), path, workers=0)
    collect(plan(sweep(base, architecture=["mlp-1-w4", "mlp-1-w8"]), runs=1), path, workers=0)
    return Zoo(path)


@pytest.fixture(scope="module")
def chosen(zoo: Zoo) -> Zoo:
    """Six of the seven ResNets, so that the rows of one population are not consecutive."""
    return zoo.where(architecture="resnet-8-w2", seed__ne=1)


def slow(zoo: Zoo, flat: Flat, checkpoint: int = -1) -> np.ndarray:
    """Row by row from state dicts."""
    states = [zoo.state_dict(index, checkpoint=checkpoint) for index in range(len(zoo))]
    return np.stack([np.concatenate([s[spec.name].numpy().ravel() for spec in flat.layout]) for s in states])


def zoo_tensors(zoo: Zoo, asked: dict) -> list[str]:
    """Names of what `Zoo.tensors` gives of the first run, in its order."""
    return [spec.name for run, _, spec, *_ in zoo.tensors(**asked) if run == zoo.runs[0]["id"]]


@pytest.mark.parametrize(
    "asked",
    [{}, dict(role="conv_weight", kernel=(3, 3)), dict(role="norm_scale", checkpoint=0), dict(role="linear_weight")],
)
def test_ram_mapped_and_block_shuffle_agree_with_state_dicts(chosen: Zoo, asked: dict) -> None:
    flat = chosen.flat(**asked)
    wanted = zoo_tensors(chosen, asked)
    assert [spec.name for spec in flat.layout] == wanted and len(wanted) > 0
    expected = slow(chosen, flat, asked.get("checkpoint", -1))
    np.testing.assert_array_equal(flat.matrix(), expected)
    np.testing.assert_array_equal(chosen.matrix(**asked), expected)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(flat.batch(order), expected[order])
    np.testing.assert_array_equal(flat[-1], expected[-1])
    for block in (1, 4, 1000):
        seen = []
        for indices, rows in flat.blocks(2, torch.Generator().manual_seed(1), block=block):
            np.testing.assert_array_equal(rows, expected[indices])
            seen.append(indices)
        assert sorted(np.concatenate(seen)) == list(range(RUNS - 1))
        assert [len(each) for each in seen] == [2, 2, 2]
        assert np.concatenate(seen).tolist() != list(range(RUNS - 1))


def test_all_columns_are_the_rows_of_the_file(chosen: Zoo) -> None:
    rows = np.concatenate([population.weights[:, -1] for population in chosen.populations])
    np.testing.assert_array_equal(chosen.matrix(), rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_every_run_once_in_whole_batches(chosen: Zoo, workers: int) -> None:
    """The worker process is spawned, so the data set is pickled and its files are opened there."""
    flat = chosen.flat(role="conv_weight")
    flat[0]  # maps that are open here must not be in the way
    loader = DataLoader(
        flat,
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    batches = list(loader)
    assert [tuple(batch.shape) for batch in batches] == [(4, flat.columns), (2, flat.columns)]
    found = torch.cat(batches).numpy()
    expected = flat.matrix()
    assert not np.array_equal(found, expected)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_labels_come_with_their_rows(chosen: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs in shuffled batches against the columns of the zoo; one read per batch."""
    flat = chosen.flat(role="conv_weight", labels=("test_acc", "seed"))
    expected = {
        row.tobytes(): (np.float32(run["test_accuracy"]), np.float32(run["seed"]))
        for row, run in zip(flat.matrix(), chosen.runs, strict=True)
    }
    assert len(expected) == len(chosen)
    reads: list[int] = []
    real = Flat.batch
    monkeypatch.setattr(Flat, "batch", lambda self, indices: (reads.append(len(indices)), real(self, indices))[1])
    batches = list(DataLoader(pickle.loads(pickle.dumps(flat)), batch_size=4, shuffle=True))
    assert reads == [4, 2]
    assert [(len(rows), labels.shape) for rows, labels in batches] == [(4, (4, 2)), (2, (2, 2))]
    pairs = [pair for rows, labels in batches for pair in zip(rows.numpy(), labels.numpy(), strict=True)]
    found = {row.tobytes(): tuple(each) for row, each in pairs}
    assert found == expected
    row, label = flat[-1]
    assert torch.equal(row, flat.batch([-1])[0]) and torch.equal(label, flat.labels[-1])
    assert label.dtype == torch.float32
    for indices, rows in flat.blocks(2, torch.Generator()):
        for one, each in zip(rows, flat.labels[indices], strict=True):
            assert tuple(each.numpy()) == expected[one.numpy().tobytes()]


def test_labels_are_numbers(chosen: Zoo) -> None:
    with pytest.raises(ConfigError, match="'init' is text"):
        chosen.flat(labels=("lr", "init"))
    with pytest.raises(UnknownNameError, match="'lr'"):
        chosen.flat(labels=("lrr",))


def test_states_in_half_precision_by_every_way_of_reading(tmp_path: Path) -> None:
    """The same networks stored in single precision, rounded, are the reference; what is read is float32."""
    recipe = Recipe(epochs=2, batch_size=256, saved="all", architecture="resnet-8-w2")
    trained = train(recipe, (0, 1, 2), data.load("digits"))
    zoo_file.write(trained, tmp_path / "single")
    zoo_file.write(replace(trained, recipe=replace(recipe, trajectory="float16")), tmp_path / "half")
    packed.write(scan(tmp_path / "half", verify=True)[0], tmp_path / "packed.h5")
    single = Zoo(tmp_path / "single").where(seed__ne=1)
    for checkpoint in (0, 1, 2, -1, -3):
        asked = dict(role="conv_weight", checkpoint=checkpoint)
        expected = single.matrix(**asked)
        if checkpoint not in (2, -1):
            assert not np.array_equal(expected, expected.astype(np.float16))
            expected = expected.astype(np.float16).astype(np.float32)
        for half in (Zoo(tmp_path / "half").where(seed__ne=1), Zoo(tmp_path / "packed.h5").where(seed__ne=1)):
            flat = half.flat(**asked)
            assert flat.batch([0]).dtype == torch.float32
            np.testing.assert_array_equal(flat.matrix(), expected)
            np.testing.assert_array_equal(slow(half, flat, checkpoint), expected)
            for indices, rows in flat.blocks(1, torch.Generator()):
                assert rows.dtype == torch.float32
                np.testing.assert_array_equal(rows, expected[indices])
            values = [values for *_, values in half.tensors(**asked)]
            assert {each.dtype for each in values} == {np.dtype(np.float32)}
            np.testing.assert_array_equal(np.concatenate([each.ravel() for each in values]), expected.ravel())
            assert half.populations[0].weights.dtype == np.float32 and half.populations[0].weights.shape[1] == 3
    with pytest.raises(ConfigError, match="no checkpoint 3"):
        half.flat(checkpoint=3)


def test_files_are_opened_when_they_are_needed(chosen: Zoo) -> None:
    """What is pickled is small, whatever was read before: no weights and no maps are in it."""
    flat = chosen.flat()
    flat.matrix()
    sent = pickle.loads(pickle.dumps(flat))
    assert sent._mapped.cache_info().currsize == 0
    first = int(np.flatnonzero(flat._file == 2)[0])
    np.testing.assert_array_equal(sent[first], flat[first])
    assert sent._mapped.cache_info().currsize == 1
    assert len(pickle.dumps(flat)) < flat.matrix().nbytes


def test_requests_that_have_no_answer(zoo: Zoo, chosen: Zoo) -> None:
    with pytest.raises(ConfigError, match=r"mlp-1-w[48] .*several layouts|several layouts .*mlp-1-w"):
        zoo.matrix()
    with pytest.raises(ConfigError, match="has no tensor .*kernel=\\(5, 5\\)"):
        chosen.matrix(kernel=(5, 5))
    with pytest.raises(UnknownNameError, match="'conv_weight'"):
        chosen.matrix(role="conv_weights")
    with pytest.raises(ConfigError, match="no checkpoint 2"):
        chosen.matrix(checkpoint=2)
    with pytest.raises(ConfigError, match="no run was chosen"):
        chosen.where(seed=99).matrix()
    with pytest.raises(ConfigError, match=r"as in \(3, 3\), got 3"):
        chosen.matrix(kernel=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"as in \('lr',\)"):
        chosen.flat(labels="lr")
    with pytest.raises(IndexError):
        chosen.flat()[6]
    with pytest.raises(ConfigError, match="at least 1"):
        next(chosen.flat().blocks(0, torch.Generator()))
