"""The steps of a training against a plain loop; kills, states of other trainings, and numbers that are not finite."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from collect import zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.errors import ConfigError
from generators.ghn.ghn import GHN
from small_training import NOISY, QUICK, SHAPE
from train_generators import ghn_step, ghn_training
from train_generators.ghn import fit
from train_generators.ghn_step import gradients, train_step
from train_generators.objectives import Objective, Teachers
from train_generators.processes import join
from train_generators.subject import ImageStream, Subject
from train_generators.tracking import read_log
from train_generators.training_state import load_state, save_state


@pytest.fixture(scope="module")
def zoos(images, tmp_path_factory):
    """Two zoos of one network each, of the same architecture."""
    folder = tmp_path_factory.mktemp("zoos")
    for seed in (0, 1):
        zoo_file.write(train(Recipe(architecture="mlp-1-w8", epochs=1), [seed], images), folder / str(seed))
    return folder


# ---- against a plain loop ----------------------------------------------------------------------------------------


def plain_loop(config, images, zoo):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipping and rates written out; tensors, losses, rates."""
    ghn = GHN(replace(config.ghn, seed=config.seed))
    subjects = [Subject(name, ghn, images, draws=config.draws) for name in config.architectures]
    teachers = Teachers(zoo, subjects, images, code=config.ghn.code)
    source = ImageStream(images, batch_size=config.batch_size, augmentation="none", seed=config.seed)
    own, codes = dict(ghn.named_parameters()), dict(teachers.named_parameters())
    values = own | codes
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    counts = dict.fromkeys(values, 0)
    rates = [0.5 * config.lr, (2 + 2**0.5) / 4 * config.lr, 0.5 * config.lr, (2 - 2**0.5) / 4 * config.lr]
    losses = []
    for step, lr in enumerate(rates):
        for value in values.values():
            value.grad = None
        loss, parts = gradients(join("cpu"), ghn, subjects, config, source, step, teachers)
        losses.append({"loss": loss, **parts})
        norm = math.sqrt(sum(value.grad.double().square().sum() for value in own.values() if value.grad is not None))
        assert norm > config.clip_norm
        for name, value in values.items():
            if value.grad is None:
                continue
            slope = value.grad * config.clip_norm / norm if name in own else value.grad
            counts[name] += 1
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.999 * second[name] + 0.001 * slope**2
            mean, square = first[name] / (1 - 0.9 ** counts[name]), second[name] / (1 - 0.999 ** counts[name])
            decay = config.weight_decay if name in own else 0.0
            with torch.no_grad():
                value -= lr * (decay * value + mean / (square.sqrt() + 1e-8))
    return own, codes, losses, rates


def test_a_training_against_a_plain_loop(images, zoos, tmp_path):
    """Weights, codes and log of four steps: rate, clipping, decay (none of the codes), seed, means of the log."""
    config = replace(
        NOISY, architectures=("mlp-1-w8",), steps=4, warm_up=0.5, clip_norm=1e-3, weight_decay=20.0, log_every=2,
        seed=3, cosine_weight=0.0, objective=Objective(images=0.5, zoo=0.5),
    )  # fmt: skip
    found = fit(config, tmp_path, zoo=zoos / "0", images=images, quiet=True)
    own, codes, losses, rates = plain_loop(config, images, Zoo(zoos / "0"))
    assert codes.keys() == {"codes.mlp-1-w8"} and not (found.config.seed == 0 or own.keys() & codes.keys())
    state, _ = load_state(tmp_path / "training" / "state.safetensors")
    for name, value in (own | codes).items():
        trained = state["teachers"][name] if name in codes else found.state_dict()[name]
        torch.testing.assert_close(trained, value.detach(), rtol=1e-4, atol=1e-6, msg=name)
    lines = read_log(tmp_path / "training")
    assert len(lines) == 2
    for number, line in enumerate(lines):
        pair = losses[2 * number : 2 * number + 2]
        means = {name: pytest.approx((pair[0][name] + pair[1][name]) / 2, rel=1e-5) for name in pair[0]}
        logged = {name: line[name] for name in (*means, "lr", "step")}
        assert logged == means | {"lr": pytest.approx(rates[2 * number + 1]), "step": 2 * number + 2}
        assert means.keys() == {"loss", "cross_entropy", "cosine", "zoo_divergence"}


def test_one_cross_entropy_is_logged_once(images, tmp_path):
    fit(replace(QUICK, steps=2, log_every=1), tmp_path, images=images, quiet=True)
    assert read_log(tmp_path / "training")[0].keys() == {"step", "cross_entropy", "lr"}


# ---- kills -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def dies(monkeypatch, at: int) -> None:
    def dying(*given):
        if given[4] == at:
            raise Killed
        return train_step(*given)

    monkeypatch.setattr(ghn_step, "train_step", dying)


def contents(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("weights.safetensors", "config.json", "training/log.jsonl")}


@pytest.mark.parametrize("killed_at", [2, 5, 7])
def test_a_killed_training_ends_with_the_same_bits(images, tmp_path, monkeypatch, killed_at):
    """Stopped before, between and after saved states, and called again: weights, card and log as if never stopped."""
    fit(NOISY, tmp_path / "whole", images=images, quiet=True)
    dies(monkeypatch, killed_at)
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(NOISY, out, images=images, quiet=True)
    assert not (out / "weights.safetensors").exists(), "no checkpoint before the end"
    steps: list[int] = []

    def noted(*given):
        steps.append(given[4])
        return train_step(*given)

    monkeypatch.setattr(ghn_step, "train_step", noted)
    torch.manual_seed(killed_at)  # the global stream of another day
    fit(NOISY, out, images=images, quiet=True)
    assert steps == list(range(4 if killed_at > 4 else 0, 8)), "goes on from the last saved state"
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_training_is_not_repeated(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fit(QUICK, out, images=images, quiet=True)
    before = contents(out)
    monkeypatch.setattr(ghn_step, "train_step", lambda *given: pytest.fail("a step was repeated"))
    fit(QUICK, out, images=images, quiet=True)
    assert contents(out) == before


# ---- states of other trainings -----------------------------------------------------------------------------------


def test_a_folder_with_another_training(images, tmp_path):
    """It is refused and left as it is; the same data elsewhere are no other training."""
    out = tmp_path / "out"
    config = replace(QUICK, steps=2, save_every=1)
    fit(config, out, images=images, quiet=True)
    before = contents(out)
    with pytest.raises(ConfigError, match="another configuration"):
        fit(replace(config, lr=1e-4), out, images=images, quiet=True)
    assert contents(out) == before
    elsewhere = replace(config, data_root=tmp_path, data=str(tmp_path / "digits.npz"))
    ghn = fit(elsewhere, out, images=images, quiet=True)
    assert str(tmp_path) not in json.dumps(ghn.card), "nobody needs to know where the data lie"


def test_another_zoo_is_another_training(images, zoos, tmp_path):
    """Codes belong to networks: other ones of the same architecture and number are not taken for them."""
    config = replace(QUICK, architectures=(), steps=2, save_every=1, objective=Objective(images=0.0, zoo=1.0))
    ghn = fit(config, tmp_path / "out", zoo=zoos / "0", images=images, quiet=True)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="another configuration"):
        fit(config, tmp_path / "out", zoo=zoos / "1", images=images, quiet=True)
    assert contents(tmp_path / "out") == before and len(ghn.card["zoo"]) == 32


RECORD = {"log_every": 1, "save_every": 2, "evaluate_every": 2, "name": "renamed"}


@pytest.mark.parametrize("changes", [{name: value} for name, value in RECORD.items()], ids=RECORD)
def test_what_is_only_recorded_may_change(images, tmp_path, monkeypatch, changes):
    """Another rhythm of the records, or another name, goes on from the state and gives the same weights."""
    config = replace(QUICK, architectures=("mlp-1-w16",))
    whole = fit(config, tmp_path / "whole", images=images, quiet=True)

    dies(monkeypatch, 5)
    with pytest.raises(Killed):
        fit(config, tmp_path / "out", images=images, quiet=True)
    steps: list[int] = []
    monkeypatch.setattr(ghn_step, "train_step", lambda *given: (steps.append(given[4]), train_step(*given))[1])
    ghn = fit(replace(config, **changes), tmp_path / "out", images=images, quiet=True)
    assert steps == [4, 5, 6, 7]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in ghn.state_dict().items())
    ((name, value),) = changes.items()
    assert ghn.card["training"][name] == value and ghn.name == changes.get("name", "ghn")
    assert json.loads((tmp_path / "out" / "training" / "config.json").read_text())[name] == value


def test_what_differs_is_named_with_both_values(images, tmp_path):
    """Numbers, nested ones, lists by what only one of them has, and data; the fields that agree are not named."""
    config = replace(QUICK, architectures=("mlp-1-w16", "mlp-1-w8"), steps=1)
    fit(config, tmp_path, images=images, quiet=True)
    other = replace(
        config, architectures=("mlp-1-w16", "mlp-1-w4"), lr=1e-4, objective=Objective(images=0.5), log_every=7
    )
    with pytest.raises(ConfigError) as caught:
        fit(other, tmp_path, images=replace(images, digest="0" * 32), quiet=True)
    told = str(caught.value)
    assert (
        f"(architectures: mlp-1-w8 only there, mlp-1-w4 only now; data_digest: {images.digest} there, {'0' * 32} now; "
        "lr: 0.005 there, 0.0001 now; objective.images: 1.0 there, 0.5 now)" in told
    )
    assert f"delete {tmp_path / 'training' / 'state.safetensors'}" in told


def test_a_state_of_an_earlier_version(images, tmp_path):
    """Those had a digest of the card in its place."""
    config = replace(QUICK, architectures=("mlp-1-w16",), steps=1)
    fit(config, tmp_path, images=images, quiet=True)
    path = tmp_path / "training" / "state.safetensors"
    tensors, meta = load_state(path)
    save_state(path, tensors, {"step": meta["step"], "fingerprint": "0" * 64, "recent": []})
    with pytest.raises(ConfigError, match="an earlier version.*delete"):
        fit(config, tmp_path, images=images, quiet=True)


# ---- what is not finite ------------------------------------------------------------------------------------------


def poisoned(what: str, at: int):
    """`gradients` that spoils the loss, a gradient of the GHN or one of a code, at one step."""

    def broken(fabric, ghn, subjects, config, source, step, teachers=None):
        loss, parts = gradients(fabric, ghn, subjects, config, source, step, teachers)
        if step == at and what == "loss":
            return math.nan, parts
        if step == at:
            module = teachers if what == "code" else ghn
            next(value.grad for value in module.parameters() if value.grad is not None).view(-1)[0] = math.inf
        return loss, parts

    return broken


@pytest.mark.parametrize("what", ["loss", "gradient", "code"])
def test_what_is_not_finite_never_reaches_the_state(images, zoos, tmp_path, monkeypatch, what):
    """Named with its step; the last good state stays, even if every step is saved, and no checkpoint is written."""
    config = replace(
        QUICK, architectures=("mlp-1-w8",), ghn=replace(SHAPE, code=4), save_every=1, objective=Objective(zoo=1.0)
    )
    monkeypatch.setattr(ghn_training, "gradients", poisoned(what, 5))
    words = (
        rf"the {'loss' if what == 'loss' else 'gradient'} is not finite at step 5; lower --lr \(now 0.005\), and give"
    )
    with pytest.raises(ConfigError, match=words):
        fit(config, tmp_path, zoo=zoos / "0", images=images, quiet=True)
    tensors, meta = load_state(tmp_path / "training" / "state.safetensors")
    assert meta["step"] == 5
    held = [*tensors["ghn"].values(), *tensors["teachers"].values()]
    assert held and all(value.isfinite().all() for value in held)
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_way_out_of_what_is_not_finite(images, tmp_path, monkeypatch):
    """At the first step there is no state to speak of; the steps of `adapted` have a rate of their own."""
    config = replace(QUICK, architectures=("mlp-1-w16",), objective=Objective(adapted=1.0, horizon=3, inner_lr=0.7))
    monkeypatch.setattr(ghn_training, "gradients", poisoned("gradient", 0))
    with pytest.raises(ConfigError) as caught:
        fit(config, tmp_path, images=images, quiet=True)
    told = str(caught.value)
    assert told.endswith("lower --lr (now 0.005) or --objective.inner-lr (0.7) or --objective.horizon (3)")
    assert not (tmp_path / "training" / "state.safetensors").exists()
