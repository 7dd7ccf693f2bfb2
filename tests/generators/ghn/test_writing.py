"""Writing block by block against the product and the noise at once."""

from __future__ import annotations

import pytest
import torch

from generators.ghn import writing
from generators.ghn.writing import row_blocks, storage, write


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "NUMBERS_IN_CACHE", 64)


@pytest.mark.parametrize("columns", [1, 3, 8, 10, 16, 48, 65, 200])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
def test_blocks_are_the_whole(rows, columns):
    """For every remainder, a product with noise: torch draws normal numbers in sixteens, and fewer one by one."""
    left, right = torch.randn(rows, 4, generator=rng(0)), torch.randn(4, columns, generator=rng(1))
    eps = torch.randn(rows, columns, generator=rng(2))
    for factors in ((left, right), (None, left @ right)):
        found = torch.full((rows, columns), torch.nan)
        write(found, *factors, scale=0.5, noise_scale=2.0, draws=rng(2))
        torch.testing.assert_close(found, 0.5 * left @ right + 2.0 * eps)
        write(found, *factors, scale=0.5)
        torch.testing.assert_close(found, 0.5 * left @ right)


def test_blocks_fit_the_cache():
    """Every row is in one block, in order, and blocks of narrow matrices hold no more than they should."""
    for rows, columns in ((100, 3), (100, 16), (7, 1000), (1, 1)):
        blocks = row_blocks(rows, columns, 64)
        assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
        if columns <= 64:
            assert all((block.stop - block.start) * columns < 2 * 64 for block in blocks)
    assert len(row_blocks(100, 3, 64)) > 3 and len(row_blocks(7, 1000, 64)) > 1


def test_storage_is_one_array_of_the_kind_of_the_like():
    """Shapes, data type, and that the weights lie one after the other."""
    for dtype in (torch.float32, torch.float64):
        made = storage({"a": (2, 3), "b": ()}, 4, like=torch.zeros(1, dtype=dtype))
        assert {name: tuple(value.shape) for name, value in made.items()} == {"a": (4, 2, 3), "b": (4,)}
        assert all(value.dtype == dtype for value in made.values())
        assert made["a"].untyped_storage().data_ptr() == made["b"].untyped_storage().data_ptr()
