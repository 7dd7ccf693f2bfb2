"""Trainings of several processes, which `torchrun` starts, against the same in one process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generators.errors import ConfigError
from scripts import load_script
from train_generators.ghn import fit
from train_generators.processes import join, sum_gradients

SCRIPT = Path(__file__).with_name("ghn_process.py")


@pytest.fixture(scope="module")
def alone():
    return load_script(SCRIPT)


def test_two_processes_have_the_gradients_of_one_and_train_the_same_ghn(alone, images, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"gradients-{rank}.safetensors") for rank in range(2))
    wanted = alone.one_step(join("cpu"), images)
    assert first.keys() == second.keys() == wanted.keys() and len(wanted) > 10
    scale = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), f"{name}: the processes differ"
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6 * scale, msg=name)
    fit(alone.CONFIG, tmp_path / "alone", images=images, quiet=True)
    ours, theirs = (load_file(tmp_path / name / "weights.safetensors") for name in ("alone", "ghn"))
    for name, value in ours.items():  # AdamW's first steps divide small gradients by their size: rounding grows
        torch.testing.assert_close(theirs[name], value, rtol=1e-2, atol=1e-4, msg=name)
    logs = [(tmp_path / name / "training" / "log.jsonl").read_text().splitlines() for name in ("alone", "ghn")]
    for one, two in zip(*logs, strict=True):
        assert json.loads(two)["cross_entropy"] == pytest.approx(json.loads(one)["cross_entropy"], rel=1e-4)


def test_mean_over_a_meta_batch_is_that_of_its_units(alone, images):
    """The gradient of a step of four units against the mean of four single ones."""
    from train_generators import ghn_step

    fabric, config = join("cpu"), alone.CONFIG
    whole = alone.one_step(fabric, images)
    ghn = alone.GHN(config.ghn)
    subjects = [alone.Subject(name, ghn, images, draws=config.draws) for name in config.architectures]
    source = alone.ImageStream(images, batch_size=config.batch_size, augmentation="none", seed=config.seed)
    sums = {name: torch.zeros_like(value) for name, value in ghn.named_parameters()}
    names = set()
    for unit in range(config.meta_batch):
        draw = ghn_step._stream(config, "ghn-architecture", 3, unit)
        subject = subjects[int(torch.randint(len(subjects), (), generator=draw))]
        names.add(subject.name)
        ghn.zero_grad()
        ghn_step.train_step(ghn, {unit: subject}, replace(config, meta_batch=1), source, 3)
        for name, value in ghn.named_parameters():
            if value.grad is not None:
                sums[name] += value.grad / config.meta_batch
    assert len(names) > 1, "the units draw architectures of their own"
    for name, value in sums.items():
        torch.testing.assert_close(whole.get(name, torch.zeros_like(value)), value, rtol=1e-4, atol=1e-6, msg=name)


def test_units_that_processes_cannot_share_evenly(alone, images, tmp_path):
    class Three:
        world_size = 3

    with pytest.raises(ConfigError, match="multiple of 3"):
        fit(alone.CONFIG, tmp_path, images=images, fabric=Three(), quiet=True)
    assert not list(tmp_path.iterdir())


def test_gradients_of_one_process_stay_as_they_are():
    value = torch.nn.Parameter(torch.ones(2))
    sum_gradients(join("cpu"), [value])
    assert value.grad is None


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no GPU"):
        join("cuda")


def test_bfloat16_is_of_the_generated_networks_only(alone, images, tmp_path):
    """Weights of the GHN stay in single precision; the loss is near that of single precision, and not it."""
    exact = fit(replace(alone.CONFIG, steps=1), tmp_path / "float32", images=images, quiet=True)
    rough = fit(replace(alone.CONFIG, steps=1, precision="bfloat16"), tmp_path / "bfloat16", images=images, quiet=True)
    assert {value.dtype for value in rough.parameters()} == {torch.float32}
    losses = [
        json.loads((tmp_path / name / "training" / "log.jsonl").read_text().splitlines()[0])["cross_entropy"]
        for name in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert exact.card["training"]["precision"] == "float32" and rough.card["training"]["precision"] == "bfloat16"
