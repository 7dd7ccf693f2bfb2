"""Stacked batches against a loop that builds every image of every member by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from collect.augmentation import Batches
from collect.data import ImageSet, load
from generators.seeds import stream

CPU = torch.device("cpu")
BATCH = 100


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load("digits")


def _slow(images: ImageSet, seed: int, augmentation: str, epochs: int) -> list[tuple[Tensor, Tensor]]:
    """One member's batches, image by image."""
    order_stream, draws = stream(seed, "order"), stream(seed, "augmentation")
    black = (0 - images.mean[0]) / images.std[0]
    count, batches = len(images.train), []
    for _ in range(epochs):
        order = torch.randperm(count, generator=order_stream)
        shifts = torch.randint(3, (count, 2), generator=draws) if augmentation != "none" else torch.ones(count, 2)
        mirrored = torch.rand(count, generator=draws) < 0.5 if augmentation == "flip-crop" else torch.zeros(count)
        for start in range(0, count - BATCH + 1, BATCH):
            pictures = []
            for place in range(start, start + BATCH):
                y, x = (int(offset) for offset in shifts[place])
                bordered = F.pad(images.train.images[order[place]], (1, 1, 1, 1), value=black)
                cut = bordered[:, y : y + 8, x : x + 8]
                pictures.append(cut.flip(2) if mirrored[place] else cut)
            batches.append((torch.stack(pictures), images.train.labels[order[start : start + BATCH]]))
    return batches


@pytest.mark.parametrize("augmentation", ["none", "shift", "flip-crop"])
def test_batches_against_image_by_image(images: ImageSet, augmentation: str) -> None:
    batches = Batches(images, [5, 6], batch_size=BATCH, augmentation=augmentation, device=CPU)
    found = [batch for _ in range(2) for batch in batches.epoch()]
    for member, seed in enumerate([5, 6]):
        expected = _slow(images, seed, augmentation, epochs=2)
        assert len(found) == len(expected) == 2 * (1295 // BATCH)
        for (pictures, labels), (slow_pictures, slow_labels) in zip(found, expected, strict=True):
            assert torch.equal(labels[member], slow_labels)
            torch.testing.assert_close(pictures[member], slow_pictures, rtol=0, atol=1e-6)


def test_a_members_batches_do_not_depend_on_the_others_or_on_the_global_state(images: ImageSet) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = next(Batches(images, [6], batch_size=BATCH, augmentation="flip-crop", device=CPU).epoch())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    among = next(Batches(images, [1, 6, 2], batch_size=BATCH, augmentation="flip-crop", device=CPU).epoch())
    assert torch.equal(alone[0][0], among[0][1])
    assert torch.equal(alone[1][0], among[1][1])
    assert not torch.equal(among[0][0], among[0][1])


def test_layout_is_the_one_that_the_grouped_form_reads_without_a_copy(images: ImageSet) -> None:
    pictures, _ = next(Batches(images, [1, 2], batch_size=BATCH, augmentation="none", device=CPU).epoch())
    merged = pictures.transpose(0, 1).flatten(1, 2)
    assert merged.data_ptr() == pictures.data_ptr()
    assert merged.is_contiguous(memory_format=torch.channels_last)


def test_streams_are_taken_up_in_the_middle_of_an_epoch(images: ImageSet) -> None:
    """From the states at its beginning and the number of batches seen."""
    settings = {"batch_size": BATCH, "augmentation": "flip-crop", "device": CPU}
    batches, resumed = Batches(images, [1, 2], **settings), Batches(images, [8, 9], **settings)
    list(batches.epoch())
    state = batches.state()
    expected = [*batches.epoch(), *batches.epoch()]
    resumed.load(state)
    found = [*resumed.epoch(skip=2), *resumed.epoch()]
    assert len(found) == len(expected) - 2
    for (pictures, labels), (their_pictures, their_labels) in zip(found, expected[2:], strict=True):
        assert torch.equal(pictures, their_pictures) and torch.equal(labels, their_labels)
