"""Streams: fixed for all time, independent, and no trace in the global generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from generators.seeds import derive, isolated, stream


def test_derived_seeds_never_change() -> None:
    """Published results name seeds: these constants must hold in every version."""
    assert derive(0) == 6197007067532723406
    assert derive(7, "init", 3, "conv1.weight") == 1373553009978764838


def test_labels_and_seeds_are_told_apart() -> None:
    seeds = {
        derive(0, "a", "b"),
        derive(0, "ab"),
        derive(0, "b", "a"),
        derive(1, "a", "b"),
        derive(0, 1),
        derive(0, "1"),
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_are_reproducible_and_uncorrelated() -> None:
    first, again = (torch.randn(20_000, generator=stream(0, "a")) for _ in range(2))
    other = torch.randn(20_000, generator=stream(0, "b"))
    assert torch.equal(first, again)
    assert abs((first * other).mean().item()) < 4 / 20_000**0.5


def _states() -> tuple:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def _draws() -> tuple:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_isolated_restores_the_callers_states() -> None:
    before = _states()
    with isolated(3, "x"):
        first = _draws()
    assert _states() == before
    with isolated(3, "x"):
        assert _draws() == first
    with isolated(4, "x"):
        assert _draws() != first
    with pytest.raises(KeyError), isolated(3, "x"):
        _draws()
        raise KeyError
    assert _states() == before


def test_isolated_leaves_no_seed_for_cuda_behind() -> None:
    """Where CUDA is not in use yet, torch keeps the calls of `torch.manual_seed` for later."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use")
    before = list(torch.cuda._queued_calls)
    with isolated(3, "x"):
        torch.rand(1)
    assert torch.cuda._queued_calls == before
    tracker = torch.cuda._lazy_seed_tracker
    torch.manual_seed(0)
    held = tracker.get_calls()
    with isolated(3, "x"):
        pass
    assert tracker.get_calls() == held
