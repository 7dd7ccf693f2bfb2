"""Fitting graph hypernetworks on digits: gradient by a slow twin, learning, flags, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call

from collect import zoo_file
from collect.architectures import build
from collect.population import train
from collect.recipe import Recipe
from generators import checkpoint
from generators.checkpoint import load
from generators.commandline import run
from generators.errors import CheckpointError, ConfigError
from generators.ghn.ghn import GHN
from generators.pointwise import HE
from generators.seeds import stream
from small_training import NOISY, QUICK, SHAPE
from train_generators import cli
from train_generators import ghn as module
from train_generators.ghn import fit
from train_generators.ghn_step import train_step
from train_generators.judging import zero_shot
from train_generators.subject import Subject
from train_generators.tracking import read_log

# ---- one step ----------------------------------------------------------------------------------------------------


def slow_loss(ghn, config, name, images, labels, step, shape):
    """The objective with one network after the other, from the definitions in the module docstring."""
    network = build(name, shape=shape, classes=10)
    plan = ghn.plan(network, torch.zeros(1, *shape))
    draw = stream(config.seed, "ghn-draw", step)
    codes = torch.randn(config.draws, len(plan.table.features), config.ghn.code, generator=draw)
    anchor = config.ghn.anchor * min(1.0, step / (config.anchor_warm_up * config.steps))
    noise: dict[str, torch.Tensor] = {}
    if anchor:
        for group in plan.groups:
            for target, block in zip(group.names, group.blocks, strict=True):
                noise[f"{target}[{block}]"] = torch.randn((config.draws, *group.shape), generator=draw)
    hidden, all_logits = ghn.encoder(plan.table), []
    for index in range(config.draws):
        vectors = torch.cat([hidden, codes[index]], dim=1)[None]
        own = ghn.decode(plan.groups, vectors, lambda key, _, index=index: noise[key][index, None], anchor=anchor)
        weights = {}
        for key, value in network.named_parameters():
            if key in own:
                weights[key] = own[key][0]
            else:
                filled, _ = HE.value(plan.found[key], 0, 0)
                weights[key] = value.detach() if filled is None else filled
        network.train()
        all_logits.append(functional_call(network, weights, (images,)))
    entropies = [torch.nn.functional.cross_entropy(logits, labels) for logits in all_logits]
    loss = sum(entropies) / len(entropies)
    if config.draws == 2:
        one, two = (logits.flatten() for logits in all_logits)
        loss = loss + config.cosine_weight * (one @ two) / (one.norm() * two.norm())
    return loss


@pytest.mark.parametrize("config", [QUICK, NOISY], ids=["ghn", "noise-ghn"])
@pytest.mark.parametrize("name", ["resnet-8-w4", "mobilenet-3-w4", "mlp-1-w16", "vit-1-w16"])
@pytest.mark.parametrize("step", [0, 3])
def test_gradient_against_a_loop_over_draws(images, config, name, step):
    """Loss and gradient of a step, however the draws are run, against `functional_call` per draw."""
    config = replace(config, architectures=(name,))
    ghn = GHN(replace(config.ghn, gain_bound=2.0))
    batch, labels = images.train.images[:32], images.train.labels[:32]
    source = SimpleNamespace(batch=lambda step, number=0, unit=0: (batch, labels))
    ((loss, parts),) = train_step(ghn, {0: Subject(name, ghn, images, draws=config.draws)}, config, source, step)
    found = {key: value.grad for key, value in ghn.named_parameters() if value.grad is not None}
    ghn.zero_grad()
    wanted = slow_loss(ghn, config, name, batch, labels, step, images.shape)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert parts.keys() == ({"cross_entropy"} if config.draws == 1 else {"cross_entropy", "cosine"})
    slow = {key: value.grad for key, value in ghn.named_parameters() if value.grad is not None}
    assert found.keys() == slow.keys() and len(found) > 15
    scale = max(value.abs().max() for value in slow.values())
    for key, value in slow.items():
        torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-4 * scale.item(), msg=key)


# ---- a training --------------------------------------------------------------------------------------------------


def test_the_global_stream_is_untouched(images, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(replace(NOISY, steps=2), tmp_path / "out", images=images, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def learned(images, tmp_path_factory):
    """Two tiny architectures, 60 steps, one held out."""
    out = tmp_path_factory.mktemp("learned") / "ghn"
    config = replace(
        QUICK, architectures=("resnet-8-w4", "resnet-8-w6"), held_out=("resnet-8-w8",), steps=60, log_every=10,
        evaluate_every=60, save_every=60, lr=1e-2,
    )  # fmt: skip
    return fit(config, out, images=images, quiet=True), out


def test_the_loss_falls(learned, images):
    """From chance to far below it in 60 steps, and networks of a trained architecture classify before training."""
    ghn, out = learned
    log = read_log(out / "training")
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert log[0]["cross_entropy"] > 1.8 and log[-1]["cross_entropy"] < 0.7 * log[0]["cross_entropy"]
    assert zero_shot(ghn, "resnet-8-w4", images, "validation")["accuracy"] > 0.4
    fresh = zero_shot(GHN(ghn.config), "resnet-8-w4", images, "validation")
    assert fresh["accuracy"] < 0.3 and fresh["disagreement"] == 0, "members of a deterministic GHN agree"


def test_checkpoint_log_and_card(learned, images):
    """The checkpoint gives the bits of the GHN that was fitted; card and log hold the held-out network's figures."""
    ghn, out = learned
    again, card = load(out), ghn.card
    network = build("resnet-8-w8", shape=images.shape, classes=10)
    states, others = ghn.sample(network, 1), again.sample(network, 1)
    assert all(torch.equal(value, others[name]) for name, value in states.items())
    assert again.card == json.loads(json.dumps(card)) == card
    assert again.config.widest == 24 and again.config.classes == 10
    assert {"classifier", "convolution"} <= set(again.config.met) <= {"classifier", "convolution", "linear layer"}
    assert card["kind"] == "ghn" and card["data_digest"] == images.digest
    assert card["held_out"] == ["resnet-8-w8"] and "data_root" not in card["training"]
    row = card["metrics"]["resnet-8-w8 (never trained on)"]
    assert row["test accuracy before training"] == zero_shot(ghn, "resnet-8-w8", images, "test")["accuracy"]
    assert card["variety"]["least_std_ratio"] > 0.5 and card["variety"]["greatest_std_ratio"] < 1.5
    logged = read_log(out / "training")[-1]["resnet-8-w8/accuracy"]
    assert logged == zero_shot(ghn, "resnet-8-w8", images, "validation")["accuracy"]
    assert logged != row["test accuracy before training"]
    assert json.loads((out / "training" / "config.json").read_text())["steps"] == 60


def test_disagreement_of_a_noise_ghn_by_loops(images):
    """Accuracy and disagreement of `zero_shot` against one network at a time, statistics of the same images."""
    ghn, name = GHN(NOISY.ghn), "resnet-8-w4"
    found = zero_shot(ghn, name, images, "validation", members=3)
    votes = []
    for member in range(3):
        network = build(name, shape=images.shape, classes=10)
        network.load_state_dict({key: value[0] for key, value in ghn.sample(network, 1, first=member).items()})
        with torch.no_grad():
            for part in network.modules():
                if isinstance(part, torch.nn.BatchNorm2d):
                    part.momentum = 1.0
            network.train()(images.train.images[:512])
            votes.append(network.eval()(images.validation.images).argmax(1))
    accuracies = [(vote == images.validation.labels).float().mean() for vote in votes]
    assert found["accuracy"] == pytest.approx(sum(accuracies).item() / 3, abs=0.01)
    apart = [(votes[i] != votes[j]).float().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["disagreement"] == pytest.approx(sum(apart) / 3, abs=0.01) and found["disagreement"] > 0.1


# ---- wrong use ---------------------------------------------------------------------------------------------------


def test_a_collapse_is_told_before_the_end(images, tmp_path, caplog):
    """A GHN of rank 2 without an anchor, at its first evaluation, and refused at the end."""
    config = replace(QUICK, ghn=replace(SHAPE, rank=2), steps=2, evaluate_every=1)
    with pytest.raises(CheckpointError, match="under 3"):
        fit(config, tmp_path / "out", images=images, quiet=True)
    assert caplog.text.count("it will not be saved") == 1


def test_architectures_of_a_zoo(images, tmp_path):
    """Without names, those of the zoo but the held-out ones."""
    for name in ("mlp-1-w8", "mlp-1-w12", "mlp-2-w8"):
        zoo_file.write(train(Recipe(architecture=name, epochs=1), [0], images), tmp_path / "zoo")
    config = replace(QUICK, architectures=(), held_out=("mlp-2-w8",), steps=1)
    ghn = fit(config, tmp_path / "out", zoo=tmp_path / "zoo", images=images, quiet=True)
    assert ghn.card["architectures"] == ["mlp-1-w12", "mlp-1-w8"]


def test_a_zoo_of_other_data_is_told(images, tmp_path, caplog):
    """The zoo is of one data set, the image loss of another, by default digits: a warning, since it may be meant."""
    recipe = Recipe(architecture="mlp-1-w8", epochs=1)
    for name in ("digits", "elsewhere.npz"):
        caplog.clear()
        zoo_file.write(train(replace(recipe, data=name), [0], images), tmp_path / name / "zoo")
        fit(
            replace(QUICK, architectures=(), steps=1),
            tmp_path / name,
            zoo=tmp_path / name / "zoo",
            images=images,
            quiet=True,
        )
        assert ("is --data right?" in caplog.text) == (name != "digits")


@pytest.mark.parametrize("command", ["ghn", "noise-ghn"])
def test_back_ends_are_chosen_by_a_flag(command, monkeypatch, tmp_path):
    """--encoder and --decoder reach the GHN that is trained and change nothing else; wrong ones end with code 2."""
    seen = []

    def stop(config, *_, **__):
        seen.append(config)
        raise ConfigError("far enough")

    monkeypatch.setattr(module, "fit", stop)
    base = [command, "--architectures", "mlp-1-w16", "--out", str(tmp_path / "out")]
    chosen = (["--encoder", "gated"], ["--decoder", "block"], ["--encoder", "transformer", "--decoder", "coordinate"])
    for flags in ([], *chosen):
        assert run(lambda flags=flags: cli.main([*base, *flags])) == 2
    plain = seen[0].ghn
    assert [config.ghn for config in seen] == [
        plain,
        replace(plain, encoder="gated"),
        replace(plain, decoder="block"),
        replace(plain, encoder="transformer", decoder="coordinate"),
    ]
    assert run(lambda: cli.main([*base, "--decoder", "blok"])) == 2 and len(seen) == 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_chosen_by_a_flag(precision, monkeypatch, tmp_path):
    """It reaches the passes of the generated networks."""
    seen = []

    def stop(config, *_, fabric, **__):
        with fabric.autocast():
            seen.append((config.precision, (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
        raise ConfigError("far enough")

    monkeypatch.setattr(module, "fit", stop)
    flags = ["ghn", "--architectures", "mlp-1-w16", "--out", str(tmp_path), "--device", "cpu", "--precision", precision]
    assert run(lambda: cli.main(flags)) == 2
    assert seen == [(precision, getattr(torch, precision))]


@pytest.mark.parametrize("encoder, decoder", [("gated", "block"), ("transformer", "coordinate")])
def test_other_back_ends_are_trained_and_saved(images, tmp_path, encoder, decoder):
    """Two steps of each, to a checkpoint that says what it is made of.

    Mostly noise: blocks this small have a stable rank under 3, and would be refused.
    """
    shape = replace(SHAPE, encoder=encoder, decoder=decoder, block=8, block_kernel=3, anchor=0.9)
    fit(replace(QUICK, steps=2, ghn=shape), tmp_path / "out", images=images, quiet=True)
    config = load(tmp_path / "out").config
    assert (config.encoder, config.decoder) == (encoder, decoder)


def test_what_it_was_trained_for_is_examined_before_it_is_saved(images, tmp_path, monkeypatch):
    """All architectures, held-out ones too, in the form that `checkpoint.save` takes."""
    seen = {}

    def save(ghn, folder, *, examined):
        seen.update(examined)
        checkpoint.check_spectrum(ghn, examined)

    monkeypatch.setattr(module.checkpoint, "save", save)
    fit(replace(QUICK, steps=1, held_out=("vgg-3-w4",)), tmp_path / "out", images=images, quiet=True)
    assert sorted(seen) == ["mlp-1-w16", "resnet-8-w4", "vgg-3-w4"]
