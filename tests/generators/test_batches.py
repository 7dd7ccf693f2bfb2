"""Batches that can be read again, and what they are made of."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from generators.batches import (
    Replayed,
    arguments_of,
    call,
    first_batch,
    inputs_of,
    map_tensors,
    pair_of,
    readable_again,
    to_device_of,
)
from generators.errors import DataError


def test_an_iterator_is_read_again_and_no_further_than_asked() -> None:
    taken = []

    def numbers() -> Any:
        for number in itertools.count():
            taken.append(number)
            yield number

    data = readable_again(numbers())
    assert isinstance(data, Replayed)
    assert list(itertools.islice(data, 3)) == [0, 1, 2] == taken
    assert list(itertools.islice(data, 2)) == [0, 1] and taken == [0, 1, 2]
    first, second = iter(data), iter(data)
    assert [next(first), next(first), next(second)] == [0, 1, 0]
    assert list(itertools.islice(data, 5)) == [0, 1, 2, 3, 4] == taken
    assert list(Replayed(iter("ab"))) == ["a", "b"]


def test_what_can_be_read_again_is_left_alone() -> None:
    batches = [(torch.zeros(2), torch.zeros(2))]
    assert readable_again(batches) is batches
    assert readable_again(None) is None
    with pytest.raises(DataError, match="got int"):
        readable_again(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, [], iter(()), [()]])
def test_no_batch(data: Any) -> None:
    with pytest.raises(DataError, match="lsuv needs data, but the data passed is empty"):
        first_batch(data, "lsuv")


def test_parts_of_a_batch() -> None:
    inputs, targets = torch.zeros(2, 3), torch.ones(2)
    assert inputs_of((inputs, targets)) is inputs and inputs_of(inputs) is inputs
    assert pair_of([inputs, targets], "nio") == (inputs, targets)
    both = {"inputs": inputs, "labels": targets}
    assert pair_of(both, "nio") == (both, both)
    for wrong in (inputs, (inputs,), (inputs, targets, targets)):
        with pytest.raises(DataError, match=r"nio needs batches \(inputs, targets\)"):
            pair_of(wrong, "nio")


def test_inputs_become_arguments() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(()))

        def forward(self, first: torch.Tensor, second: Any = None) -> torch.Tensor:
            return self.offset + first + (second[0] if second is not None else 0)

    one = torch.ones(2)
    assert call(Sum(), one).eq(1).all()
    assert call(Sum(), (one, [one])).eq(2).all()
    assert call(Sum(), {"first": one, "second": (one, "text")}).eq(2).all()
    assert arguments_of([one, one]) == (([one, one],), {})  # a list is one argument
    moved = to_device_of(Sum().to("meta"), {"first": one, "second": [(one, 3)]})
    assert moved["first"].is_meta and moved["second"][0][0].is_meta and moved["second"][0][1] == 3


def test_data_without_values_cannot_be_moved() -> None:
    with pytest.raises(DataError, match="on the meta device, which has no values; pass real batches"):
        to_device_of(nn.Linear(2, 2), {"first": [torch.ones(2, device="meta")]})


@pytest.mark.parametrize(
    "data", [torch.zeros(4, 3), {"inputs": torch.zeros(4, 3)}, TensorDataset(torch.zeros(4, 3), torch.zeros(4))]
)
def test_examples_are_no_batches(data: Any) -> None:
    """Iterating over them gives single examples, or keys, which a layer may take for a batch without a word."""
    with pytest.raises(DataError, match=r"pass a list \[\(inputs, targets\)\] or a DataLoader"):
        readable_again(data)


def test_named_tuples_keep_their_kind() -> None:
    class Batch(NamedTuple):
        inputs: Any
        targets: torch.Tensor

    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    doubled = map_tensors(lambda value: value * 2, Batch(torch.ones(2), torch.zeros(2)))
    assert isinstance(doubled, Batch) and doubled.inputs.eq(2).all()
    moved = to_device_of(nn.Linear(1, 1), packed)
    assert torch.equal(moved.data, packed.data) and arguments_of(moved) == ((moved,), {})
