"""Kernel collections made elsewhere: a folder of `.npy` files, as the Deep Weight Prior repositories publish them.

A file holds slices `[N, 1, h, w]` (or `[N, 1, k]`, or `[N, 1, d, h, w]`) of any float type, without pickled objects.
Which network and layer a slice is of is not known: a file stands for one network, one tensor and a depth of 0, and the
split is by file. `train.npy` is for training and `test.npy` is held out, as their names say; any other file goes where
its path below the folder puts it, as the id of a run does (`collect.split.split_of`).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from collect.flat import MAPS
from collect.split import split_of
from generators.errors import DataError
from generators.inventory import Role
from generators.local.groups import GroupKey
from train_generators.slice_source import RAM_LIMIT, TensorStack, check_fraction
from train_generators.slices import SliceGroup, gather

SUFFIX = ".npy"
NAMED = {"train": "train", "test": "test"}  # files that say on which side they belong


def read(path: Path) -> np.ndarray:
    """The slices of a file, mapped, `[N, *shape]`.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # unlike `np.load`, it opens neither pickles nor archives
    except (OSError, ValueError) as error:
        raise _unusable(path, f"is no array that can be mapped ({error})") from error
    if array.dtype.kind != "f":
        raise _unusable(path, f"holds numbers of type {array.dtype}, not floats")
    shape = array.shape[2:]
    if array.shape[1:2] != (1,) or not 1 <= len(shape) <= 3 or not array.size or math.prod(shape) < 2:
        raise _unusable(path, f"has shape {list(array.shape)}, not [slices, 1, height, width]")
    if not array.flags.c_contiguous:
        raise _unusable(path, "is stored column by column (Fortran order)")
    return array.reshape(len(array), *shape)


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(f"{path} {reason}")


def split_of_file(path: Path, folder: Path) -> str:
    """The split of a file of the folder: "train", "validation" or "test"."""
    return NAMED.get(path.stem, split_of(path.relative_to(folder).as_posix()))


def open_folder(
    folder: str | Path, *, slices_per_file: int = 1 << 62, prune: float = 0.0, ram_limit: int = RAM_LIMIT
) -> dict[GroupKey, SliceGroup]:
    """The slices of all `.npy` files in a folder and in the folders in it, by shape: groups "conv_weight-...-0".

    Every file is divided by its root mean square. `SliceGroup.gain` is NaN, since no fan-in is known.

    Args:
        folder: where the files are.
        slices_per_file: a file counts as one of so many slices at most.
        prune: share of the slices of every file to leave out, those of the smallest norm.
        ram_limit: bytes of the slices of one shape that are held in RAM at most.

    Raises:
        DataError: there is no such folder, no usable slice in it, or a file that cannot be used; all bad files are
            named.
        ConfigError: `prune` is not in [0, 1).
    """
    check_fraction(prune)
    folder = Path(folder)
    paths = sorted(folder.rglob(f"*{SUFFIX}"))
    if not paths:
        raise DataError(f"there is no {SUFFIX} file in {folder}; name a folder of arrays [slices, 1, height, width]")
    stacks: dict[GroupKey, list[TensorStack]] = defaultdict(list)
    mapped = functools.lru_cache(maxsize=MAPS)(lambda path: read(path).reshape(1, -1))
    faults = []
    for path in paths:
        try:
            count, *shape = read(path).shape
        except DataError as error:
            faults.append(error)
            continue
        key, name = GroupKey(Role.CONV_WEIGHT.value, tuple(shape), 0), path.relative_to(folder).as_posix()
        stack = TensorStack(
            functools.partial(mapped, path), (name,), (0,), name, (count, 1, *shape), 0,
            depth=0.0, fan_in=math.nan, key=key,
        )  # fmt: skip
        stacks[key].append(stack)
    if faults:
        raise DataError(
            f"{'; '.join(map(str, faults))}; take such files out of the folder, or save them anew with np.save(path, "
            "np.ascontiguousarray(kernels, dtype=np.float32)), kernels of shape [slices, 1, height, width]"
        )
    training = {path.relative_to(folder).as_posix() for path in paths if split_of_file(path, folder) == "train"}
    if not training:
        held_out = ", ".join(path.name for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise DataError(
            f"all files in {folder} are held out by their names ({held_out}), so there is nothing to fit; call the one "
            "for training train.npy"
        )
    groups = gather(stacks, training, slices_per_tensor=slices_per_file, prune=prune, ram_limit=ram_limit)
    if not groups:
        raise DataError(f"{folder} holds no slice that is neither zero nor not finite; name another folder")
    return groups
