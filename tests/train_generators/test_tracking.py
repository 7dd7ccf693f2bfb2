"""The log of a training: one line per step however often it is killed; wandb with its real client, offline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from generators.errors import ConfigError
from train_generators.tracking import LOG_NAME, Tracker, read_log


def test_every_log_is_on_disk_at_once_as_one_json_line(tmp_path):
    tracker = Tracker(tmp_path / "run")
    tracker.log(1, loss=torch.tensor(0.5), rate=np.float32(0.25), group="stem")
    tracker.log(2, loss=float("nan"))
    lines = (tmp_path / "run" / LOG_NAME).read_text().splitlines()
    tracker.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "rate": 0.25, "group": "stem"},
        {"step": 2, "loss": None},
    ]


def test_resuming_drops_the_lines_after_the_state_and_a_line_cut_short(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log(step, loss=step)
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill leaves
    with Tracker(tmp_path, resumed_at=3) as tracker:
        for step in range(4, 8):
            tracker.log(step, loss=step)
    assert read_log(tmp_path) == [{"step": step, "loss": step} for step in range(1, 8)]


def test_a_new_training_begins_a_new_log(tmp_path):
    for _ in range(2):
        with Tracker(tmp_path) as tracker:
            tracker.log(1, loss=1.0)
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_unknown_track_is_refused_and_touches_nothing(tmp_path):
    with pytest.raises(ConfigError, match="none, wandb"):
        Tracker(tmp_path / "run", track="tensorboard")
    assert not (tmp_path / "run").exists()


def test_the_real_wandb_client_works_offline_without_an_account(tmp_path, monkeypatch):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"), "WANDB_DATA_DIR": str(tmp_path / "data"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with Tracker(tmp_path / "run", track="wandb", project="test", config={"rate": 0.1}) as tracker:
        tracker.log(1, loss=0.5)
    with Tracker(tmp_path / "run", track="wandb", project="test", config={"rate": 0.1}, resumed_at=1) as tracker:
        tracker.log(2, loss=0.25)
    assert read_log(tmp_path / "run") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert runs and all(run.stat().st_size > 0 for run in runs)
    assert len({run.name for run in runs}) == 1, "the resumed training goes on under the id of the first"
