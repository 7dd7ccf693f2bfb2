"""Image sets: digits, `.npz` files and torchvision sets; every kind of bad file gets an error that names the key."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from collect import sources
from collect.data import load
from collect.sources import Source
from generators.errors import DataError, UnknownNameError

Arrays = dict[str, np.ndarray]
NAMES = np.array([f"digit {label}" for label in range(10)])


def _without(arrays: Arrays, label: int) -> np.ndarray:
    return np.where(arrays["y_train"] == label, label + 1, arrays["y_train"])


@pytest.fixture
def arrays() -> Arrays:
    """A small set of the user's own: the first 200 digits for training, the next 50 for testing."""
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return {"x_train": images[:200], "y_train": labels[:200], "x_test": images[200:250], "y_test": labels[200:250]}


def _save(folder: Path, arrays: Arrays, name: str = "own.npz") -> str:
    np.savez(folder / name, allow_pickle=True, **arrays)
    return str(folder / name)


def test_digits_are_all_there_once_and_normalised_by_the_training_images() -> None:
    images = load("digits")
    parts = (images.train, images.validation, images.test)
    assert [len(part) for part in parts] == [1295, 143, 359]
    assert images.shape == (1, 8, 8)
    assert images.classes == tuple("0123456789")
    assert abs(images.train.images.mean()) < 1e-5
    assert abs(images.train.images.std() - 1) < 1e-5
    together = torch.cat([part.images for part in parts]) * images.std[0] + images.mean[0]
    raw = torch.from_numpy(load_digits().images).float()[:, None] / 16

    def ordered(pictures: torch.Tensor) -> np.ndarray:
        return np.unique((pictures * 16).round().flatten(1).numpy().astype(np.int8), axis=0)

    assert len(together) == len(raw)
    assert np.array_equal(ordered(together), ordered(raw))


def test_digits_split_is_the_same_everywhere() -> None:
    """The digest and the first labels are part of every zoo that was ever collected: they must not move."""
    images = load("Digits")
    assert images.digest == "037a74494a8a151f1551524e273d9397"
    assert torch.equal(images.test.labels, load("digits").test.labels)
    assert not torch.equal(images.test.labels, load("digits", split_seed=1).test.labels)
    assert images.describe()["images"] == {"train": 1295, "validation": 143, "test": 359}


def test_npz_keeps_its_test_images_and_reads_every_axis_order(tmp_path: Path, arrays: Arrays) -> None:
    plain = load(_save(tmp_path, arrays))
    assert plain.name == "own"
    assert torch.equal(plain.test.labels, torch.from_numpy(arrays["y_test"]))
    assert len(plain.train) + len(plain.validation) == 200
    for name, axis in (("last.npz", -1), ("first.npz", 1)):
        images = {key: np.expand_dims(arrays[key], axis) for key in ("x_train", "x_test")}
        other = load(_save(tmp_path, arrays | images, name))
        assert other.digest == plain.digest
        assert torch.equal(other.train.images, plain.train.images)
    column = load(_save(tmp_path, arrays | {"y_train": arrays["y_train"][:, None]}))
    assert torch.equal(column.train.labels, plain.train.labels)


def test_npz_of_floats_and_class_names(tmp_path: Path, arrays: Arrays) -> None:
    scaled = {key: arrays[key].astype(np.float64) / 255 for key in ("x_train", "x_test")}
    floats, bytes_ = load(_save(tmp_path, arrays | scaled | {"classes": NAMES})), load(_save(tmp_path, arrays, "b.npz"))
    raw = [images.test.images * images.std[0] + images.mean[0] for images in (floats, bytes_)]  # splits differ
    torch.testing.assert_close(*raw)
    assert floats.classes[3] == "digit 3"


def test_named_classes_may_lack_images(tmp_path: Path, arrays: Arrays) -> None:
    images = load(
        _save(tmp_path, arrays | {"y_train": _without(arrays, 4), "y_test": arrays["y_test"] * 0, "classes": NAMES})
    )
    assert len(images.classes) == 10 and 4 not in images.train.labels


@pytest.mark.parametrize(
    ("damage", "named", "expected"),
    [
        (lambda a: a.pop("y_test"), "lacks y_test", r"y_train and y_test as \[N\]"),
        (lambda a: a.update(x_train=a["x_train"][0]), r"x_train has shape \(8, 8\)", r"expected \[N, H, W\]"),
        (lambda a: a.update(x_test=a["x_test"][:, :7]), "x_test is uint8 of", "expected the same"),
        (lambda a: a.update(x_test=a["x_test"] / 255), "x_test is float32", "expected the same"),
        (lambda a: a.update(x_train=a["x_train"].astype(np.int32)), "x_train has type int32", "expected uint8"),
        (lambda a: a.update(x_train=np.where(a["x_train"] > 9, np.nan, 0.0)), "x_train holds NaN", "remove"),
        (lambda a: a.update(y_train=a["y_train"][:9]), "200 images and y_train 9 labels", "as many"),
        (lambda a: a.update(y_test=a["y_test"] / 2), "y_test has shape .* float64", "integers from 0"),
        (lambda a: a.update(y_test=a["y_test"] + 1), "y_test has labels from 1 to 10", "from 0 to 9"),
        (lambda a: a.update(y_train=a["y_train"] - 1), "y_train has labels from -1", "from 0 to"),
        (lambda a: a.update(y_train=a["y_train"] * 0, y_test=a["y_test"] * 0), "single class", "two classes"),
        (lambda a: a.update(y_test=np.array([None] * 50)), "plain arrays", "numpy.savez"),
        (lambda a: a.update(y_train=a["y_train"] * 0 + 3, y_test=a["y_test"] * 0), "single class 3", "at least two"),
        (lambda a: a.update(y_train=a["y_train"] + 1), "10 classes with labels up to 10", "no image of class 0"),
        (lambda a: a.update(y_train=np.minimum(a["y_train"], 8)), "y_test has labels from 0 to 9", "from 0 to 8"),
        (lambda a: a.update(y_train=_without(a, 4), classes=NAMES), "y_test has images of class 4", "leave them out"),
        (lambda a: a.update(classes=NAMES[:9]), "y_train has labels from 0 to 9", "classes that `classes` names"),
        (lambda a: a.update(classes=np.array("ten")), r"classes has shape \(\)", "one name for each"),
    ],
)  # fmt: skip
def test_bad_npz_names_the_key_and_what_was_expected(
    tmp_path: Path, arrays: Arrays, damage: Callable[[Arrays], object], named: str, expected: str
) -> None:
    damage(arrays)
    with pytest.raises(DataError, match=named) as caught:
        load(_save(tmp_path, arrays))
    assert caught.match(expected)
    assert caught.match("own.npz")


def test_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(DataError, match="not an .npz") as caught:
        load(str(tmp_path / "text.npz"))
    assert "pickle" not in str(caught.value)  # numpy's own advice is to trust the file
    with pytest.raises(DataError, match="does not exist"):
        load(str(tmp_path / "none.npz"))


def test_truncated_npz(tmp_path: Path, arrays: Arrays) -> None:
    path = Path(_save(tmp_path, arrays))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="not an .npz"):
        load(str(path))


def test_pickled_npz_is_never_unpickled(tmp_path: Path, arrays: Arrays) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    loaded = io.BytesIO()
    np.savez(loaded, **arrays | {"x_train": np.array([Bomb()])}, allow_pickle=True)
    (tmp_path / "bomb.npz").write_bytes(loaded.getvalue())
    with pytest.raises(DataError, match="plain arrays"):
        load(str(tmp_path / "bomb.npz"))
    assert not (tmp_path / "exploded").exists()


def test_unknown_set_suggests_near_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cifar10'"):
        load("cifr10")


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist", "SVHN", "fer2013"])
def test_absent_torchvision_set_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"\.npz") as caught:
        load(name, root=tmp_path)
    assert name == "fer2013" or caught.match("--download")


def test_every_torchvision_set_has_the_arguments_that_the_table_gives() -> None:
    for name, source in sources.SOURCES.items():
        assert hasattr(torchvision.datasets, source.dataset), name


class Pictures(torchvision.datasets.VisionDataset):
    """A torchvision set of digits, from 1 on as EMNIST letters count, as pictures of varying size."""

    def __init__(self, root: Path, *, train: bool, download: bool, arrays: bool) -> None:
        super().__init__(root)
        digits = load_digits()
        part = slice(0, 100) if train else slice(100, 140)
        self.images, self.labels = (digits.images[part] * 15).astype(np.uint8), digits.target[part] + 1
        if arrays:
            self.data, self.targets = torch.from_numpy(self.images), self.labels.tolist()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        side = 16 + 8 * (index % 2)
        return Image.fromarray(self.images[index]).resize((side, side)), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.images)


@pytest.mark.parametrize(("arrays", "size", "shape"), [(True, None, (1, 8, 8)), (False, 12, (3, 12, 12))])
def test_torchvision_sets_with_and_without_arrays(
    monkeypatch: pytest.MonkeyPatch, arrays: bool, size: int | None, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(torchvision.datasets, "Pictures", Pictures, raising=False)
    train, test = ({"train": flag, "arrays": arrays} for flag in (True, False))
    monkeypatch.setitem(sources.SOURCES, "pictures", Source("Pictures", train, test, size))
    images = load("pictures")
    assert images.shape == shape
    assert torch.equal(images.test.labels, torch.from_numpy(load_digits().target[100:140]))
    assert len(images.classes) == 10
