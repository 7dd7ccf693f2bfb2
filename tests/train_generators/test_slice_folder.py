"""Collections of kernels in `.npy` files: as they are published, split by file, and what is no such file."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from collect.split import split_of
from generators.errors import ConfigError, DataError
from generators.local.groups import GroupKey
from train_generators.slice_folder import open_folder, split_of_file


def kernels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def save(path, array) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return array


def test_a_folder_as_the_deep_weight_prior_publishes_it(tmp_path):
    saved = {
        (size, side): save(tmp_path / f"conv{size}x{size}" / f"{side}.npy", kernels(count, 1, size, size, seed=size))
        for size in (5, 7) for side, count in (("train", 300), ("test", 40))
    }  # fmt: skip
    groups = open_folder(tmp_path)
    assert [str(key) for key in groups] == ["conv_weight-5x5-0", "conv_weight-7x7-0"]
    for key, group in groups.items():
        for slices, side in ((group.train, "train"), (group.held_out, "test")):
            array = saved[key.shape[0], side][:, 0]
            expected = torch.from_numpy(array / math.sqrt((array.astype(np.float64) ** 2).mean()))
            assert torch.allclose(slices.in_ram(), expected, rtol=1e-5)
            assert slices.networks == (f"conv{key.shape[0]}x{key.shape[0]}/{side}.npy",)
        assert math.isnan(group.gain), "no fan-in is known"
        assert group.std == pytest.approx(float(np.sqrt((saved[key.shape[0], "train"] ** 2).mean())), rel=1e-5)


def test_files_are_split_whole_by_their_path(tmp_path):
    names = [f"net{number}/layer{layer}.npy" for number in range(12) for layer in range(2)]
    for number, name in enumerate(names):
        save(tmp_path / name, kernels(20, 1, 3, 3, seed=number))
    group = open_folder(tmp_path)[GroupKey("conv_weight", (3, 3), 0)]
    assert group.train.networks == tuple(sorted(name for name in names if split_of(name) == "train"))
    assert set(group.held_out.networks) == set(names) - set(group.train.networks) != set()
    assert split_of_file(tmp_path / "a" / "test.npy", tmp_path) == "test"


def test_other_types_of_float_and_other_numbers_of_axes(tmp_path):
    arrays = {
        "double/train.npy": kernels(50, 1, 4, 4).astype(np.float64),
        "half/train.npy": kernels(50, 1, 3, 3).astype(np.float16),
        "swapped/train.npy": kernels(50, 1, 5).astype(">f4"),
        "solid/train.npy": kernels(50, 1, 2, 3, 3),
    }
    for name, array in arrays.items():
        save(tmp_path / name, array)
    groups = {key.shape: group for key, group in open_folder(tmp_path).items()}
    assert set(groups) == {(4, 4), (3, 3), (5,), (2, 3, 3)}
    for shape, array in zip(((4, 4), (3, 3), (5,), (2, 3, 3)), arrays.values(), strict=True):
        found, expected = groups[shape].train.in_ram(), torch.from_numpy(array.astype(np.float32)).reshape(-1, *shape)
        assert torch.allclose(found, expected / expected.square().mean().sqrt(), rtol=1e-4)
        batch = next(groups[shape].train.batches(8, seed=0))
        assert batch.shape == (8, *shape) and batch.dtype == torch.float32
        assert all(torch.eq(found, each).flatten(1).all(1).any() for each in batch)


def test_slices_of_small_norm_can_be_pruned_and_large_files_limited(tmp_path):
    save(
        tmp_path / "train.npy",
        kernels(100, 1, 3, 3) * np.linspace(0.001, 1, 100, dtype=np.float32)[:, None, None, None],
    )
    whole, pruned = (next(iter(open_folder(tmp_path, prune=prune).values())).train for prune in (0.0, 0.3))
    assert (len(whole), len(pruned)) == (100, 70)
    assert torch.equal(whole.pruned(0.3).in_ram(), pruned.in_ram())
    assert len(next(iter(open_folder(tmp_path, slices_per_file=60).values())).train) == 60
    with pytest.raises(ConfigError, match="share of slices to prune"):
        open_folder(tmp_path, prune=-1.0)


def write_objects(path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def write_archive(path) -> None:
    np.savez(path.with_suffix(".npz"), a=kernels(4, 1, 3, 3))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_objects, "is no array that can be mapped"),
        (lambda path: path.write_bytes(pickle.dumps([1.0])), "is no array that can be mapped"),
        (write_archive, "is no array that can be mapped"),
        (lambda path: path.write_bytes(b""), "is no array that can be mapped"),
        (lambda path: path.write_bytes(path.with_name("good.npy").read_bytes()[:200]), "no array that can be mapped"),
        (lambda path: np.save(path, np.ones((4, 1, 3, 3), dtype=np.int64)), "holds numbers of type int64"),
        (lambda path: np.save(path, kernels(16, 8, 3, 3)), "[16, 8, 3, 3], not [slices, 1, height, width]"),
        (lambda path: np.save(path, kernels(16)), "has shape [16]"),
        (lambda path: np.save(path, kernels(16, 3, 3)), "has shape [16, 3, 3]"),
        (lambda path: np.save(path, kernels(16, 1, 1, 1)), "has shape [16, 1, 1, 1]"),
        (lambda path: np.save(path, kernels(0, 1, 3, 3)), "has shape [0, 1, 3, 3]"),
        (lambda path: np.save(path, np.asfortranarray(kernels(16, 1, 3, 3))), "Fortran order"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_named_with_the_reason_and_the_way_out(tmp_path, write, reason):
    save(tmp_path / "good.npy", kernels(20, 1, 3, 3))
    write(tmp_path / "bad.npy")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)
    message = str(caught.value)
    assert "bad.npy" in message and "good.npy" not in message and reason in message and "np.save(" in message


def test_all_bad_files_are_named_at_once(tmp_path):
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(b"no array")
    with pytest.raises(DataError, match=r"a\.npy.*b\.npy.*save them anew") as told:
        open_folder(tmp_path)
    assert str(told.value).count("np.save(") == 1, "the way out is told once"


def test_a_folder_without_a_file_for_training_says_why(tmp_path):
    np.save(tmp_path / "test.npy", np.ones((300, 1, 3, 3), dtype=np.float32))
    with pytest.raises(DataError, match=r"held out by their names \(test\.npy\).*call the one for training train\.npy"):
        open_folder(tmp_path)


def test_folders_without_slices(tmp_path):
    with pytest.raises(DataError, match=r"there is no \.npy file in"):
        open_folder(tmp_path)
    save(tmp_path / "zeros.npy", np.zeros((5, 1, 3, 3), dtype=np.float32))
    with pytest.raises(DataError, match="neither zero nor not finite"):
        open_folder(tmp_path)
