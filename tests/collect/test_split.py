"""Stratified splits against a count per class."""

import pytest
import torch

from collect.split import stratified
from generators.errors import DataError

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)


def test_every_image_is_on_one_side_and_every_class_gives_its_share() -> None:
    kept, held = stratified(LABELS, 0.2, digest="d", purpose="test")
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(LABELS)))
    assert LABELS[held].bincount().tolist() == [10, 6, 1]


def test_split_depends_on_digest_purpose_and_seed_and_on_nothing_else() -> None:
    torch.manual_seed(0)
    first = stratified(LABELS, 0.2, digest="d", purpose="test")[1]
    torch.manual_seed(1)
    assert torch.equal(first, stratified(LABELS, 0.2, digest="d", purpose="test")[1])
    others = (("e", "test", 0), ("d", "validation", 0), ("d", "test", 1))
    for digest, purpose, seed in others:
        assert not torch.equal(first, stratified(LABELS, 0.2, digest=digest, purpose=purpose, seed=seed)[1])


def test_a_class_with_one_image_cannot_be_split() -> None:
    with pytest.raises(DataError, match="class 1 has a single image"):
        stratified(torch.tensor([0, 0, 0, 1]), 0.5, digest="d", purpose="test")
