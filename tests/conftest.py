"""What all tests share: one thread per process, no network, and no user's cache or settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("FORCE_COLOR", None)

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Downloads of a test go to a folder of its own, never to the user's cache."""
    folder = tmp_path_factory.mktemp("powerhouse-home")
    monkeypatch.setenv("POWERHOUSE_HOME", str(folder))
    return folder
