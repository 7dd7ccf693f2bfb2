"""Where images come from: scikit-learn's digits, torchvision's classification sets, and the user's own `.npz` files."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from generators.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
SHAPES = {
    "x": "[N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 to 4",
    "y": "[N] or [N, 1] with integers from 0",
}


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


def digits() -> Raw:
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


def torchvision_set(name: str, root: Path, *, download: bool) -> Raw:
    """The set that `SOURCES` has under `name`, from files in `root`. `DataError` if they are not there."""
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
                else "allow the download with --download, point --data-root to the folder that holds it, or give "
                "your own file: --data FILE.npz with " + ", ".join(KEYS)
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


def _class_names(given: np.ndarray | None, y_train: np.ndarray, y_test: np.ndarray) -> tuple[str, ...]:
    """The names of all classes, after a check that both parts speak of the same ones.

    Classes without a training image are allowed where all classes are named.
    """
    if given is not None and given.ndim != 1:
        raise DataError(f"classes has shape {given.shape}; expected [number of classes], one name for each")
    labels = np.unique(y_train)
    count = int(labels[-1]) + 1 if given is None else len(given)
    source = "of y_train" if given is None else "that `classes` names"
    for key, values in (("y_train", y_train), ("y_test", y_test)):
        if values.min() < 0 or values.max() >= count:
            raise DataError(
                f"{key} has labels from {values.min()} to {values.max()}; expected integers from 0 to {count - 1}, the "
                f"classes {source}"
            )
    if len(labels) < 2:
        raise DataError(f"y_train has the single class {labels[0]}; expected at least two classes")
    if given is None and len(labels) < count:
        absent = next(place for place, label in enumerate(labels) if place != label)
        raise DataError(
            f"y_train has {len(labels)} classes with labels up to {count - 1}, and no image of class {absent}; number "
            "the classes from 0 on, or name all of them in `classes`"
        )
    if len(unseen := np.setdiff1d(y_test, labels)):
        raise DataError(
            f"y_test has images of class {unseen[0]}, y_train has none; leave them out, or add some for training"
        )
    return tuple(map(str, range(count) if given is None else given))


def npz(path: Path) -> Raw:
    """The user's own arrays. Nothing in the file is unpickled."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected an .npz file with {', '.join(KEYS)}")
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle, and advise to trust it
        raise DataError(f"{path} is not an .npz of plain arrays (it is no zip archive); write it with numpy.savez")
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
    try:
        classes = _class_names(arrays.get("classes"), y_train, y_test)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return Raw(x_train, y_train, x_test, y_test, classes)
