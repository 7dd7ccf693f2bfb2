"""Trainings that start from the checkpoint of a GHN, against what the checkpoint holds."""

from dataclasses import replace

import pytest
import torch

import generators
from generators.errors import PowerhouseError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from train_generators.ghn import fit
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.ghn_step import anchor_at

SHAPE = GHNConfig(hidden=16, heads=2, layers=1, width=32, rank=8, cells=8, anchor=0.5, code=4)
CONFIG = GHNTrainingConfig(architectures=("mlp-1-w16",), steps=1, batch_size=32, save_every=1, ghn=SHAPE)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    fit(replace(CONFIG, steps=30, lr=5e-3), folder, images=images, quiet=True)
    return folder


def started(trained, **changes) -> GHNTrainingConfig:
    return replace(CONFIG, **{"start": str(trained), "ghn": GHNConfig(), **changes})


def test_the_first_step_is_made_from_the_weights_of_the_checkpoint(images, trained, tmp_path):
    """A learning rate of nearly nothing changes nearly nothing; the shape and the digest of the start are recorded."""
    start = generators.load(trained)
    ghn = fit(started(trained, lr=1e-12, name="tuned"), tmp_path, images=images, quiet=True)
    for (name, value), other in zip(ghn.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-9, msg=name)
    assert ghn.name == "tuned" and ghn.config == start.config
    assert ghn.card["start_digest"] == start.digest != ghn.digest and "start_digest" not in start.card


def test_it_starts_where_the_former_training_ended(images, trained, tmp_path):
    """Its loss at the first step is far below that of a new GHN."""
    losses = []
    for number, config in enumerate((started(trained), CONFIG)):
        fit(replace(config, log_every=1), tmp_path / str(number), images=images, quiet=True)
        line = (tmp_path / str(number) / "training" / "log.jsonl").read_text().splitlines()[0]
        losses.append(float(line.split('"cross_entropy": ')[1].split(",")[0]))
    assert losses[0] < losses[1] - 0.2


def test_sorts_of_layers_that_were_met_add_up(images, trained, tmp_path):
    """Those of the start and of the training; of a start that does not know, they stay unknown."""
    start = generators.load(trained)
    assert start.config.met == ("classifier", "linear layer")
    config = started(trained, architectures=("mobilenet-3-w4",), lr=1e-12)
    ghn = fit(config, tmp_path / "known", images=images, quiet=True)
    assert ghn.config.met == ("classifier", "convolution", "grouped convolution", "linear layer")
    start.config = replace(start.config, met=())
    unknown = generators.save(start, tmp_path / "start")
    ghn = fit(replace(config, start=str(unknown)), tmp_path / "unknown", images=images, quiet=True)
    assert ghn.config.met == ()


def test_the_widest_layer_of_the_start_is_remembered(images, trained, tmp_path):
    """A training on narrower networks does not make it forget wider ones, wider ones are noted; inputs count too."""
    assert generators.load(trained).config.widest == 64, "the pixels of an image"
    for name, widest in (("mlp-1-w8", 64), ("mlp-1-w96", 96)):
        ghn = fit(started(trained, architectures=(name,), lr=1e-12), tmp_path / name, images=images, quiet=True)
        assert ghn.config.widest == widest


def test_its_anchor_is_there_from_the_first_step(trained):
    assert anchor_at(started(trained), 0.5, 0) == 0.5
    rising = replace(CONFIG, steps=100)
    assert [anchor_at(rising, 0.5, step) for step in (0, 25, 50, 99)] == [0.0, 0.25, 0.5, 0.5]


def test_starts_that_do_not_fit(images, trained, tmp_path):
    out = tmp_path / "out"
    few = replace(images, classes=images.classes[:5])
    plain = GHN(replace(SHAPE, anchor=0.0, code=0), name="plain")
    generators.save(plain, tmp_path / "plain")
    for config, shown, words in (
        (started(trained, ghn=SHAPE), images, r"leave --ghn\.\*, --encoder and --decoder alone"),
        (started(trained), few, "10 classes, the data set has 5"),
        (started("conv-vae-digits"), images, "not a GHN"),
        (started("noise-gnh-cifar10"), images, "noise-ghn-cifar10"),
        (started(tmp_path / "plain", cosine_weight=0.1, draws=2), images, "members .* are equal"),
    ):
        with pytest.raises(PowerhouseError, match=words):
            fit(config, out, images=shown, quiet=True)
    assert not out.exists()


def test_another_start_is_another_training(images, trained, tmp_path):
    fit(started(trained), tmp_path, images=images, quiet=True)
    with pytest.raises(PowerhouseError, match="another configuration"):
        fit(CONFIG, tmp_path, images=images, quiet=True)


def test_a_start_with_other_weights_is_another_training(images, trained, tmp_path):
    """Under the same name."""
    ghn = generators.load(trained)
    config = started(generators.save(ghn, tmp_path / "start"))
    fit(config, tmp_path / "out", images=images, quiet=True)
    ghn.state_dict()[next(iter(ghn.state_dict()))].add_(1e-3)
    generators.save(ghn, tmp_path / "start")
    with pytest.raises(
        PowerhouseError, match=r"another configuration or data set \(start_digest: \w+ there, \w+ now\)"
    ):
        fit(config, tmp_path / "out", images=images, quiet=True)
