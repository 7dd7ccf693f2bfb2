"""Random streams that are passed in, never global.

A stream is named by a root seed and labels: `stream(seed, "init", 3, "conv1.weight")`. The labels are hashed, so
streams are independent of each other, of the order in which they are asked for, and of how many there are: member 3 of
5 equals member 3 of 50, and adding a layer does not move the draws of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator

import numpy as np
import torch

_AS_TEXT = json.JSONEncoder(separators=(",", ":")).encode


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed from a root seed and labels, the same on every machine and in every process."""
    text = _AS_TEXT([int(seed), *labels])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU `torch.Generator` for one purpose. Draws are made on the CPU so that they are the same on every device."""
    return torch.Generator().manual_seed(derive(seed, *labels))


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Inside, or in a function that this decorates, torch makes plain float32 tensors on the CPU unless told otherwise.

    The weights that a seed names do not depend on `torch.set_default_dtype` and `torch.set_default_device`, and what is
    kept for later can be trained with, even if it was first needed in `torch.inference_mode()`. That switches gradients
    on inside, so `torch.no_grad()` belongs inside too.
    """
    dtype = torch.get_default_dtype()
    elsewhere = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.ExitStack() as stack:  # entering a context costs time in every call
            if elsewhere:
                stack.enter_context(torch.device("cpu"))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def isolated(seed: int, *labels: str | int) -> Iterator[None]:
    """Inside, foreign code that draws from the global generators (loaders, dropout) gets seeded ones; after, the caller
    has the states of `random`, numpy and torch (CPU and every CUDA device in use) back as they were.
    """
    start = derive(seed, *labels)
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            random.seed(start)
            np.random.seed(start % 2**32)
            torch.default_generator.manual_seed(start)  # `torch.manual_seed` also has CUDA seeded, once it is in use
            if devices:
                torch.cuda.manual_seed_all(start)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
