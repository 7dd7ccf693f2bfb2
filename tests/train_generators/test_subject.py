"""Batches that depend on nothing but seed, step and number."""

from __future__ import annotations

import torch

from train_generators.subject import ImageStream


def test_batches_depend_on_seed_step_and_number_only(images):
    """The same bits in whatever order they are asked for; others at another step, number and seed; labels fit."""

    def source(seed=0, augmentation="shift"):
        return ImageStream(images, batch_size=32, augmentation=augmentation, seed=seed)

    stream = source()
    later, first, second = stream.batch(5), stream.batch(0), stream.batch(0, 1)
    again = source()
    assert all(map(torch.equal, again.batch(0), first)) and all(map(torch.equal, again.batch(5), later))
    assert all(map(torch.equal, again.batch(0, 1), second)) and all(map(torch.equal, again.batch(0, 0), first))
    assert not torch.equal(first[0], later[0]) and not torch.equal(first[0], second[0])
    assert not torch.equal(source(seed=1).batch(0)[0], first[0])
    drawn, labels = source(augmentation="none").batch(2)
    distance, nearest = torch.cdist(drawn.flatten(1), images.train.images.flatten(1)).min(dim=1)
    assert distance.max() < 1e-2 and torch.equal(images.train.labels[nearest], labels)
