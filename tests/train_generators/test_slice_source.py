"""Slices read from files against slow loops: batches, shares, pruning, and what stays out of memory."""

from __future__ import annotations

import collections
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from collect import data, zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.errors import ConfigError, ZooError
from generators.local.groups import GroupKey
from generators.seeds import stream
from train_generators.slice_source import STRIP, WINDOW, Slices, TensorStack, strongest
from train_generators.slices import open_groups

SIZES = dict(patch=8, depth_buckets=3, slices_per_tensor=4096)
KERNELS, PATCHES = GroupKey("conv_weight", (3, 2), 0), GroupKey("matrix", (1, 8), 1)


def stack(key: GroupKey, *shapes: tuple[int, ...], networks: int = 3) -> list[TensorStack]:
    """Tensors of random numbers, one after the other in the rows of a file, with a gap before each."""
    sizes = [5 + math.prod(shape) for shape in shapes]
    numbers = np.random.default_rng(0).standard_normal((networks + 2, sum(sizes)), dtype=np.float32)
    names, rows = tuple(f"net{index}" for index in range(networks)), tuple(range(2, networks + 2))
    return [
        TensorStack(lambda: numbers, names, rows, f"t{i}", shape, sum(sizes[:i]) + 5, 0.5, 9.0, key).measured(0.0)
        for i, shape in enumerate(shapes)
    ]


CASES = {
    "kernels": Slices(KERNELS, stack(KERNELS, (16, 8, 3, 2), (4, 3, 3, 2)), per_tensor=4096),
    "patches": Slices(PATCHES, stack(PATCHES, (20, 64), (3, 8)), per_tensor=4096),
    "patches with a rest": Slices(PATCHES, stack(PATCHES, (40, 35), (9, 8, 3, 3)), per_tensor=4096),
    "a limit per tensor": Slices(KERNELS, stack(KERNELS, (32, 32, 3, 2), (4, 3, 3, 2)), per_tensor=50),
    "pruned kernels": Slices(KERNELS, stack(KERNELS, (16, 8, 3, 2), (4, 3, 3, 2)), per_tensor=4096).pruned(0.3),
    "pruned patches": Slices(PATCHES, stack(PATCHES, (40, 35), (9, 8)), per_tensor=4096).pruned(0.5),
}


def slow_tensors(slices: Slices) -> list[Tensor]:
    """Every tensor's kept slices of unit second moment, one at a time."""
    found = []
    for each in slices.stacks:
        for index in range(len(each.networks)):
            whole = each.values()[each.rows[index], each.offset : each.offset + math.prod(each.shape)]
            cut = list(each.key.cut(torch.from_numpy(whole.copy()).reshape(each.shape)))
            dropped = sorted(range(len(cut)), key=lambda i: cut[i].double().square().sum().item())
            for place in sorted(dropped[: math.floor(each.pruned * len(cut))], reverse=True):
                del cut[place]
            kept = torch.stack(cut)
            found.append(kept / kept.square().mean().sqrt())
    return found


def slow_batch(slices: Slices, size: int, *, seed: int, step: int) -> Tensor:
    """What the docstring of the module says, slice by slice."""
    tensors = slow_tensors(slices)
    most = max(WINDOW // (size * 4 * math.prod(slices.key.shape)), 1)
    length, wide = min(most, STRIP), most // min(most, STRIP)
    window, place = divmod(step, length * wide)
    position, part = divmod(place, wide)
    draws = torch.randint(2**62, (2, size * wide), generator=stream(seed, "window", str(slices.key), window)).tolist()
    batch = []
    for which, start in list(zip(*draws, strict=True))[part * size : (part + 1) * size]:
        left = which % sum(min(len(tensor), slices.per_tensor) for tensor in tensors)
        for tensor in tensors:
            if left < min(len(tensor), slices.per_tensor):
                batch.append(tensor[(start + position) % len(tensor)])
                break
            left -= min(len(tensor), slices.per_tensor)
    return torch.stack(batch)


def strangeness(some: Tensor, known: Tensor) -> float:
    """The largest distance of one of `some` slices from the nearest of those that are known."""
    return max((known - each).flatten(1).norm(dim=1).min().item() for each in some)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [0, 1, 1000, 12345])
def test_a_batch_is_that_of_a_slow_loop(name, step):
    batch = next(CASES[name].batches(16, seed=3, first=step))
    assert torch.allclose(batch, slow_batch(CASES[name], 16, seed=3, step=step), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_readers_give_the_numbers_of_the_file_bit_for_bit(name, dtype):
    for each in CASES[name].stacks:
        numbers = each.values().astype(dtype)
        each = replace(each, values=lambda numbers=numbers: numbers)
        for index, row in enumerate(each.rows):
            whole = torch.from_numpy(numbers[row, each.offset : each.offset + math.prod(each.shape)].copy())
            wanted = each.key.cut(whole.reshape(each.shape)).flatten(1)
            wanted = wanted if each.kept is None else wanted[each.kept[index].tolist()]
            for start, stop in ((0, each.count), (1, each.count - 1), (each.count // 2, each.count // 2 + 1)):
                out = torch.full((stop - start, each.size), math.nan)
                each.reader()(out.numpy(), index, start)
                assert torch.equal(out, wanted[start:stop].float())
                stored = each.stored(index, start, stop)
                assert stored.dtype == dtype and torch.equal(torch.from_numpy(stored), wanted[start:stop])


@pytest.mark.parametrize("size", [1, 3000, WINDOW // 16])
def test_batches_of_any_size(size):
    """The window of the last would be many times larger with whole strips."""
    slices, step = CASES["kernels"], 2
    batch = next(slices.batches(size, seed=0, first=step))
    assert batch.shape == (size, 3, 2) and batch.untyped_storage().nbytes() <= max(WINDOW, 24 * size)
    if size < WINDOW // 16:
        assert torch.allclose(batch, slow_batch(slices, size, seed=0, step=step), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_whole_tensors_are_those_of_a_slow_loop(name):
    slices = CASES[name]
    expected = slow_tensors(slices)
    found = list(slices.tensors())
    assert len(found) == len(expected) and len(slices) == sum(len(tensor.slices) for tensor in found)
    for tensor, wanted in zip(found, expected, strict=True):
        if len(wanted) <= slices.per_tensor:
            assert torch.allclose(tensor.slices, wanted, rtol=1e-5)
        else:
            assert len(tensor.slices) == slices.per_tensor == len(torch.unique(tensor.slices, dim=0))
            assert strangeness(tensor.slices, wanted) < 1e-5
    assert torch.equal(slices.in_ram(), torch.cat([tensor.slices for tensor in found]))


def test_a_fit_that_goes_on_sees_the_batches_that_it_would_have_seen():
    slices = CASES["kernels"]
    whole = [batch for batch, _ in zip(slices.batches(8, seed=1), range(2000), strict=False)]
    for first in (0, 7, 128, 1999):
        assert torch.equal(next(slices.batches(8, seed=1, first=first)), whole[first])
    assert not torch.equal(whole[0], next(slices.batches(8, seed=2)))


def test_without_networks_there_are_no_batches():
    none = CASES["kernels"].of([])
    assert len(none) == 0 and none.in_ram().shape == (0, 3, 2)
    with pytest.raises(ZooError, match=r"conv_weight-3x2-0 has no slices on this side"):
        next(none.batches(8, seed=0))


def test_every_slice_of_a_tensor_is_as_likely_and_tensors_count_by_their_slices_up_to_the_limit():
    slices = CASES["a limit per tensor"]  # 3 networks of tensors that count 50 and 12
    lookup = {tuple(row.tolist()): (number, place) for number, tensor in enumerate(slices.tensors())
              for place, row in enumerate(tensor.slices.flatten(1)) if number >= 3}  # fmt: skip
    seen = collections.Counter()
    drawn = 0
    for number in range(24):
        for row in next(slices.batches(512, seed=5, first=number * 10**6)).flatten(1):
            seen[lookup.get(tuple(row.tolist()))] += 1
            drawn += 1
    assert seen.pop(None) / drawn == pytest.approx(50 / 62, abs=0.02)
    assert len(seen) == 36
    expected = drawn / (3 * 62)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < 75, "36 equal cells: above 75 once in 10,000"


def test_a_share_in_ram_takes_no_more_than_the_limit_and_holds_real_slices():
    stacks = stack(KERNELS, (32, 32, 3, 2), (4, 3, 3, 2))
    slices, whole = (
        Slices(KERNELS, stacks, per_tensor=4096, ram_limit=limit) for limit in (4 * 6 * STRIP * 2, 1 << 20)
    )
    share = slices.in_ram(seed=1)
    assert share.shape == (2 * STRIP, 3, 2) and len(slices) == len(whole.in_ram()) > 2 * STRIP
    assert strangeness(share, whole.in_ram()) == 0
    assert torch.equal(share, slices.in_ram(seed=1)) and not torch.equal(share, slices.in_ram(seed=2))
    assert slices.of(["net0"]).ram_limit == slices.pruned(0.5).ram_limit == slices.ram_limit


def test_pruning_twice_is_pruning_once_and_the_larger_fraction_holds():
    slices = CASES["patches"]
    once = slices.pruned(0.25)
    assert len(once) == 3 * (120 + 3) < len(slices) == 3 * (160 + 3)
    for again in (once.pruned(0.25), once.pruned(0.1), once.pruned(0.0), slices.pruned(0.1).pruned(0.25)):
        assert torch.equal(again.in_ram(), once.in_ram())
    assert len(once.pruned(0.5)) == len(slices.pruned(0.5)) < len(once)
    assert once.in_ram().square().mean().item() == pytest.approx(1)
    least = min(once.of(["net0"]).in_ram().flatten(1).norm(dim=1))
    assert least > sorted(slices.of(["net0"]).in_ram().flatten(1).norm(dim=1))[20]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_shares_that_cannot_be_pruned(fraction):
    with pytest.raises(ConfigError, match=r"in \[0, 1\)"):
        CASES["kernels"].pruned(fraction)


def test_equal_norms_are_pruned_in_order():
    assert strongest(np.array([1.0, 2.0, 1.0, 0.0, 1.0]), 0.5).tolist() == [1, 2, 4]
    assert strongest(np.array([1.0, 2.0]), 0.49).tolist() == [0, 1]


def test_nothing_but_windows_is_copied_out_of_a_large_zoo(tmp_path):
    """79 MB of weights, a limit of 4 MB in RAM: the peak of all allocations is a small part."""
    few = train(Recipe(architecture="resnet-8-w16", epochs=1, batch_size=1024), (0,), data.load("digits"))
    weights = np.random.default_rng(0).standard_normal((256, *few.weights.shape[1:]), dtype=np.float32)
    tile = {name: np.repeat(getattr(few, name), 256, axis=0) for name in ("buffers", "metrics")}
    zoo_file.write(replace(few, seeds=tuple(range(256)), status=("ok",) * 256, weights=weights, **tile), tmp_path)
    zoo = Zoo(tmp_path)
    tracemalloc.start()
    try:
        for group in open_groups(zoo, **SIZES, ram_limit=1 << 22).values():
            next(group.train.batches(128, seed=0))
            group.train.in_ram()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weights.nbytes > 70e6 > 20e6 > peak
