"""Image sets, split and normalised; `collect.sources` reads them.

A set is loaded whole into memory as float32, normalised by the mean and standard deviation of its training images. The
split into training, validation and test images depends only on the data (their digest) and the split seed; an official
test split stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collect.sources import Raw, digits, names, npz, torchvision_set
from collect.split import stratified
from generators.errors import unknown_name
from generators.published import cache_folder

__all__ = ["ImageSet", "Split", "from_arrays", "load", "names"]

TEST_FRACTION = 0.2  # of all images, where there is no official test split
VALIDATION_FRACTION = 0.1  # of the images that are not for testing


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a set.

    Attributes:
        images: float32 `[N, C, H, W]`, normalised; N images, C channels, height H, width W.
        labels: int64 `[N]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """A classification set, ready for training.

    Attributes:
        name: what the user asked for; the stem of the file for an `.npz`.
        digest: blake2b over the raw arrays, before normalisation and splitting.
        train, validation, test: the parts.
        classes: name of every class, in the order of the labels.
        shape: `(C, H, W)` of one image.
        mean, std: per channel, of the training images on the scale 0 to 1 (floats: as they came).
        split_seed: the seed of the split.
    """

    name: str
    digest: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split_seed: int = 0

    def describe(self) -> dict[str, Any]:
        """JSON values that identify the set in files: everything but the images."""
        parts = {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}
        return {
            "name": self.name, "digest": self.digest, "images": parts, "classes": list(self.classes),
            "shape": list(self.shape), "mean": list(self.mean), "std": list(self.std), "split_seed": self.split_seed,
        }  # fmt: skip


def _tensor(images: np.ndarray) -> Tensor:
    """float32 `[N, C, H, W]`, uint8 scaled to 0..1."""
    scale = 255 if images.dtype == np.uint8 else 1
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)).div_(scale)


def from_arrays(raw: Raw, name: str, *, split_seed: int = 0) -> ImageSet:
    """Split and normalise `raw`."""
    digest = raw.digest()
    images, labels = _tensor(raw.x_train), torch.from_numpy(raw.y_train)
    if raw.x_test is None or raw.y_test is None:
        kept, held = stratified(labels, TEST_FRACTION, digest=digest, purpose="test", seed=split_seed)
        test = Split(images[held], labels[held])
        images, labels = images[kept], labels[kept]
    else:
        test = Split(_tensor(raw.x_test), torch.from_numpy(raw.y_test))
    kept, held = stratified(labels, VALIDATION_FRACTION, digest=digest, purpose="validation", seed=split_seed)
    train, validation = Split(images[kept], labels[kept]), Split(images[held], labels[held])
    mean = train.images.mean((0, 2, 3))
    std = train.images.std((0, 2, 3)).clamp_min(1e-6)  # a constant channel stays constant
    for part in (train, validation, test):
        part.images.sub_(mean[:, None, None]).div_(std[:, None, None])
    _, channels, height, width = images.shape
    return ImageSet(
        name, digest, train, validation, test, raw.classes, (channels, height, width),
        tuple(mean.tolist()), tuple(std.tolist()), split_seed,
    )  # fmt: skip


def load(name: str, *, root: str | Path | None = None, download: bool = False, split_seed: int = 0) -> ImageSet:
    """Load a set by name or from a file.

    Args:
        name: `"digits"`, a torchvision set (`names()` lists them; case, `-` and `_` do not matter), or the path of an
            `.npz` with `x_train`, `y_train`, `x_test`, `y_test` (images uint8 or float, `[N, H, W]`, `[N, H, W, C]` or
            `[N, C, H, W]`) and, optionally, `classes` (their names).
        root: folder of torchvision's files, default `~/.cache/powerhouse/data` (or under `POWERHOUSE_HOME`).
        download: fetch a torchvision set that is not in `root`.
        split_seed: seed of the parts that are not official.

    Raises:
        DataError: the data are missing, or the file does not hold what it should; the message says how to go on.
        UnknownNameError: no such set.
    """
    if name.endswith(".npz"):
        return from_arrays(npz(Path(name)), Path(name).stem, split_seed=split_seed)
    plain = {known.replace("-", ""): known for known in names()}
    known = plain.get(name.lower().replace("-", "").replace("_", ""))
    if known is None:
        raise unknown_name("data set", name, names(), way_out="A file of your own must end in .npz.")
    folder = Path(root) if root is not None else cache_folder() / "data"
    raw = digits() if known == "digits" else torchvision_set(known, folder, download=download)
    return from_arrays(raw, known, split_seed=split_seed)
