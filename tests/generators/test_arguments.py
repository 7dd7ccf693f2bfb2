"""Arguments that make no sense are refused with their name, what was given, and what is wanted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generators.arguments import real_tensor, whole_number
from generators.errors import ConfigError


def test_whole_numbers() -> None:
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3)):
        found = whole_number("n", value, least=3)
        assert found == 3 and type(found) is int
    assert whole_number("seed", -4) == -4


@pytest.mark.parametrize(
    "value", [2.0, "3", None, True, [1], np.float32(1), torch.tensor(2.5), torch.ones(2)], ids=repr
)
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="n must be a whole number of at least 1, got"):
        whole_number("n", value, least=1)
    with pytest.raises(ConfigError, match="seed must be a whole number, got"):
        whole_number("seed", value)


def test_real_tensors() -> None:
    value = torch.ones(2, 3, dtype=torch.bfloat16)
    assert real_tensor("codes", value, what="codes") is real_tensor("codes", value, what="codes", axes=2) is value
    for bad, got in (([1.0], "list"), (value.long(), r"torch.int64 of shape \(2, 3\)"), (None, "NoneType")):
        with pytest.raises(ConfigError, match=f"codes must be one code, a tensor of floating-point numbers, got {got}"):
            real_tensor("codes", bad, what="one code")
    with pytest.raises(ConfigError, match=r"got torch.bfloat16 of shape \(2, 3\)"):
        real_tensor("codes", value, what="codes", axes=3)
