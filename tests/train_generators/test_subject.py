"""Batches that depend on nothing but seed, step, number and unit; logits of single precision."""

from __future__ import annotations

import pytest
import torch

from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from train_generators.processes import join
from train_generators.subject import ImageStream, Subject


def test_batches_depend_on_seed_step_number_and_unit_only(images):
    """The same bits in whatever order they are asked for; others at another step, number, unit and seed; labels fit."""

    def source(seed=0, augmentation="shift"):
        return ImageStream(images, batch_size=32, augmentation=augmentation, seed=seed)

    stream = source()
    later, first, second = stream.batch(5), stream.batch(0), stream.batch(0, 1)
    again = source()
    assert all(map(torch.equal, again.batch(0), first)) and all(map(torch.equal, again.batch(5), later))
    assert all(map(torch.equal, again.batch(0, 1), second)) and all(map(torch.equal, again.batch(0, 0), first))
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[0], second[0])
    units = [stream.batch(step, number, unit=unit)[0] for step, number, unit in ((0, 0, 1), (0, 1, 1), (0, 0, 2))]
    several = [first[0], second[0], later[0], *units]
    assert not any(torch.equal(several[i], several[j]) for i in range(6) for j in range(i))
    assert torch.equal(again.batch(0, 1, unit=1)[0], units[1])
    assert not torch.equal(source(seed=1).batch(0)[0], first[0])
    drawn, labels = source(augmentation="none").batch(2)
    distance, nearest = torch.cdist(drawn.flatten(1), images.train.images.flatten(1)).min(dim=1)
    assert distance.max() < 1e-2 and torch.equal(images.train.labels[nearest], labels)


def test_a_batch_of_more_images_than_there_are(images):
    count = len(images.train.labels)
    assert len(ImageStream(images, batch_size=count, augmentation="none", seed=0).batch(0)[1]) == count
    with pytest.raises(ConfigError, match=f"batch_size is {count + 1}, but digits has {count} training images"):
        ImageStream(images, batch_size=count + 1, augmentation="none", seed=0)


def test_logits_are_of_single_precision_whatever_the_networks_run_in(images):
    ghn = GHN(GHNConfig(hidden=16, heads=2, layers=1, width=16, rank=8, cells=8))
    logits = []
    for precision in ("float32", "bfloat16"):
        subject = Subject("mlp-1-w8", ghn, images, draws=1, autocast=join("cpu", precision=precision).autocast)
        codes = torch.zeros(1, subject.codes, 0)
        decoded = ghn.predict(subject.plan, codes, lambda target, shape: torch.zeros(shape))
        logits.append(subject.logits(decoded, images.train.images[None, :8]))
    exact, rough = logits
    assert exact.dtype == rough.dtype == torch.float32
    assert not torch.equal(exact, rough) and torch.allclose(exact, rough, atol=0.1)
