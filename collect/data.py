"""Image sets: the embedded digits, torchvision's classification sets by name, and the user's own `.npz` files.

A set is loaded whole into memory as float32, normalised by the mean and standard deviation of its training images. The
split into training, validation and test images depends only on the data (their digest) and the split seed; an official
test split stays what it is.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collect.split import stratified
from generators.errors import DataError, unknown_name
from generators.published import cache_folder

TEST_FRACTION = 0.2  # of all images, where there is no official test split
VALIDATION_FRACTION = 0.1  # of the images that are not for testing
KEYS = ("x_train", "y_train", "x_test", "y_test")
SHAPES = {
    "x": "[N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 to 4",
    "y": "[N] or [N, 1] with integers from 0",
}


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


@dataclass(frozen=True)
class Raw:
    """Arrays as they come from a source: images uint8 or float `[N, H, W, C]`, labels int64 `[N]`.

    `x_test` and `y_test` are None where there is no official test split.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray | None
    y_test: np.ndarray | None
    classes: tuple[str, ...]

    def digest(self) -> str:
        """32 hex digits over type, shape and bytes of every array."""
        hasher = hashlib.blake2b(digest_size=16)
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            if array is not None:
                hasher.update(f"{array.dtype.str}{array.shape}".encode())
                hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Source:
    """How to get one set from torchvision: class name and arguments for its training and test part.

    `test` None: no official test split. `size`: side length to which images of varying size are scaled. `downloads`
    False: torchvision cannot fetch it.
    """

    dataset: str
    train: dict[str, Any]
    test: dict[str, Any] | None
    size: int | None = None
    downloads: bool = True


_FLAG: tuple[dict, dict] = ({"train": True}, {"train": False})
_SPLIT: tuple[dict, dict] = ({"split": "train"}, {"split": "test"})
SOURCES: dict[str, Source] = {
    "cifar10": Source("CIFAR10", *_FLAG),
    "cifar100": Source("CIFAR100", *_FLAG),
    "mnist": Source("MNIST", *_FLAG),
    "fashion-mnist": Source("FashionMNIST", *_FLAG),
    "kmnist": Source("KMNIST", *_FLAG),
    "qmnist": Source("QMNIST", *_FLAG),
    "emnist-letters": Source("EMNIST", {"split": "letters", "train": True}, {"split": "letters", "train": False}),
    "emnist-balanced": Source("EMNIST", {"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "usps": Source("USPS", *_FLAG),
    "semeion": Source("SEMEION", {}, None),
    "svhn": Source("SVHN", *_SPLIT),
    "stl10": Source("STL10", *_SPLIT),
    "pcam": Source("PCAM", *_SPLIT),
    "eurosat": Source("EuroSAT", {}, None),
    "gtsrb": Source("GTSRB", *_SPLIT, size=32),
    "fer2013": Source("FER2013", {"split": "train"}, None, downloads=False),
    "dtd": Source("DTD", *_SPLIT, size=64),
    "flowers102": Source("Flowers102", *_SPLIT, size=64),
    "food101": Source("Food101", *_SPLIT, size=64),
    "pets": Source("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}, size=64),
    "aircraft": Source("FGVCAircraft", {"split": "trainval"}, {"split": "test"}, size=64),
    "country211": Source("Country211", *_SPLIT, size=64),
    "imagenette": Source("Imagenette", {"split": "train"}, {"split": "val"}, size=64),
}


def names() -> tuple[str, ...]:
    """Every data set that `load` knows by name."""
    return ("digits", *SOURCES)


def _digits() -> Raw:
    """scikit-learn's 1,797 handwritten digits, 8x8, 16 grey levels (Alpaydin and Kaynak, UCI, 1998); scaled to 0..1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images / 16).astype(np.float32)[..., None]
    return Raw(images, found.target.astype(np.int64), None, None, tuple(str(name) for name in found.target_names))


def _arrays(dataset: Any, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, H, W, C]` and labels `[N]` of a torchvision set, from its arrays if it keeps any, else one by one."""
    data = getattr(dataset, "data", None)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(data, np.ndarray | Tensor) and labels is not None:
        images, labels = np.asarray(data), np.asarray(labels)
        labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST keeps provenance in the other columns
        return _channels_last(images, "data"), labels.astype(np.int64)
    stacked, listed = [], []
    for index in range(len(dataset)):
        image, label = dataset[index]
        stacked.append(np.asarray(image.convert("RGB").resize((size, size)) if size else image))
        listed.append(label)
    return _channels_last(np.stack(stacked), "data"), np.asarray(listed, dtype=np.int64)


def _torchvision(name: str, root: Path, download: bool) -> Raw:
    import torchvision

    source = SOURCES[name]
    kind = getattr(torchvision.datasets, source.dataset)
    fetch = {"download": download} if source.downloads else {}

    def part(arguments: dict[str, Any]) -> Any:
        try:
            return kind(root, **fetch, **arguments)
        except (RuntimeError, OSError, ImportError) as error:
            way_out = (
                "check the network and the folder, or give your own file: --data FILE.npz with " + ", ".join(KEYS)
                if download or not fetch
                else "allow the download with --download, point --root to the folder that holds it, or give your own "
                "file: --data FILE.npz with " + ", ".join(KEYS)
            )
            raise DataError(f"data set {name!r} cannot be read from {root} ({error}); {way_out}") from error

    train = part(source.train)
    x_train, y_train = _arrays(train, source.size)
    x_test, y_test = _arrays(part(source.test), source.size) if source.test is not None else (None, None)
    first = int(y_train.min())  # EMNIST letters count from 1
    y_test = None if y_test is None else y_test - first
    listed = getattr(train, "classes", None) or ()
    count = int(y_train.max()) - first + 1
    classes = tuple(map(str, listed[-count:])) if len(listed) >= count else tuple(map(str, range(count)))
    return Raw(x_train, y_train - first, x_test, y_test, classes)


def _channels_last(images: np.ndarray, key: str) -> np.ndarray:
    """Images in any of the accepted axis orders, as `[N, H, W, C]`."""
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[-1] <= 4:
        return images
    if images.ndim == 4 and images.shape[1] <= 4:
        return images.transpose(0, 2, 3, 1)
    raise DataError(f"{key} has shape {images.shape}; expected {SHAPES['x']}")


def _npz_part(arrays: dict[str, np.ndarray], part: str) -> tuple[np.ndarray, np.ndarray]:
    """`x_<part>` and `y_<part>` of an `.npz`, checked."""
    x_key, y_key = f"x_{part}", f"y_{part}"
    images, labels = _channels_last(arrays[x_key], x_key), arrays[y_key]
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise DataError(f"{x_key} has type {images.dtype}; expected uint8 (0 to 255) or a float type")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise DataError(f"{x_key} holds NaN or infinite values; remove those images or repair them")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{y_key} has shape {labels.shape} and type {labels.dtype}; expected {SHAPES['y']}")
    if len(labels) != len(images) or not len(labels):
        raise DataError(f"{x_key} has {len(images)} images and {y_key} {len(labels)} labels; expected as many, and > 0")
    return images, labels.astype(np.int64)


def _npz(path: Path) -> Raw:
    """The user's own arrays. Nothing in the file is unpickled."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected an .npz file with {', '.join(KEYS)}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            missing = [key for key in KEYS if key not in stored.files]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)} (it has {', '.join(stored.files) or 'nothing'}); expected "
                    f"x_train and x_test as {SHAPES['x']}, y_train and y_test as {SHAPES['y']}"
                )
            arrays = {key: stored[key] for key in (*KEYS, "classes") if key in stored.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path} is not an .npz of plain arrays ({error}); write it with numpy.savez") from error
    try:
        x_train, y_train = _npz_part(arrays, "train")
        x_test, y_test = _npz_part(arrays, "test")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise DataError(
            f"{path}: x_train is {x_train.dtype} images of {x_train.shape[1:]} (height, width, channels), x_test is "
            f"{x_test.dtype} of {x_test.shape[1:]}; expected the same"
        )
    names_given = tuple(str(name) for name in arrays.get("classes", ()))
    count = max(len(names_given), int(y_train.max()) + 1)
    for key, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.min() < 0 or labels.max() >= count:
            raise DataError(
                f"{path}: {key} has labels from {labels.min()} to {labels.max()}; expected integers from 0 to "
                f"{count - 1}, the classes of y_train"
            )
    if count < 2:
        raise DataError(f"{path}: y_train has the single class 0; expected at least two classes")
    classes = names_given if len(names_given) == count else tuple(str(label) for label in range(count))
    return Raw(x_train, y_train, x_test, y_test, classes)


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
        return from_arrays(_npz(Path(name)), Path(name).stem, split_seed=split_seed)
    plain = {known.replace("-", ""): known for known in names()}
    known = plain.get(name.lower().replace("-", "").replace("_", ""))
    if known is None:
        raise unknown_name("data set", name, names(), way_out="A file of your own must end in .npz.")
    folder = Path(root) if root is not None else cache_folder() / "data"
    raw = _digits() if known == "digits" else _torchvision(known, folder, download)
    return from_arrays(raw, known, split_seed=split_seed)
