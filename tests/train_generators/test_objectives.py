"""Objectives by hand and against slow twins: draws, steps ahead, collected networks; and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from collect import zoo_file
from collect.architectures import build
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.seeds import stream
from train_generators.ghn import fit
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.objectives import Objective, Teachers, adapted_loss, images_loss, zoo_loss
from train_generators.subject import ImageStream, Subject
from train_generators.tracking import read_log

SHAPE = GHNConfig(hidden=16, heads=2, layers=1, width=32, rank=8, cells=8, anchor=0.3, code=4)
NAME = "resnet-8-w4"


@pytest.fixture(scope="module")
def zoo(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    zoo_file.write(train(Recipe(architecture=NAME, epochs=3, lr=0.05), [0, 1, 2], images), folder)
    return Zoo(folder)


def generated(ghn: GHN, subject: Subject, draws: int) -> dict[str, torch.Tensor]:
    draw = stream(0, "test")
    codes = torch.randn(draws, subject.codes, ghn.config.code, generator=draw)
    return ghn.predict(subject.plan, codes, lambda _, shape: torch.randn(shape, generator=draw))


def test_images_loss_by_hand():
    """Two images, three classes, two draws with logits that are easy by hand; then three draws against loops."""
    logits = torch.tensor([[[0.0, 0, 0], [0, 0, 0]], [[math.log(2), 0, 0], [0, 0, math.log(2)]]])
    labels = torch.tensor([0, 1])
    entropy = (2 * math.log(3) - math.log(0.5) - math.log(0.25)) / 4
    loss, parts = images_loss(logits + 1, labels, 0.0)
    assert loss.item() == pytest.approx(entropy) == parts["cross_entropy"]
    first = torch.ones(6)
    second = torch.tensor([math.log(2) + 1, 1, 1, 1, 1, math.log(2) + 1])
    cosine = (first @ second / first.norm() / second.norm()).item()
    assert parts["cosine"] == pytest.approx(cosine)
    assert images_loss(logits + 1, labels, 0.4)[0].item() == pytest.approx(entropy + 0.4 * cosine)
    alone, parts = images_loss(logits[1:], labels, 0.4)
    assert alone.item() == pytest.approx((-math.log(0.5) - math.log(0.25)) / 2) and "cosine" not in parts

    three = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 1, 2, 2])
    entropies = [-torch.log_softmax(three[j, i], 0)[labels[i]].item() for j in range(3) for i in range(5)]
    cosines = [torch.cosine_similarity(three[i].flatten(), three[j].flatten(), dim=0).item()
               for i in range(3) for j in range(i)]  # fmt: skip
    loss, parts = images_loss(three, labels, 2.0)
    assert loss.item() == pytest.approx(sum(entropies) / 15 + 2 * sum(cosines) / 3, rel=1e-5)
    assert parts["cosine"] == pytest.approx(sum(cosines) / 3, rel=1e-4)


@pytest.mark.parametrize("ahead", [1, 3])
def test_adapted_loss_against_torch_optim_on_one_network_at_a_time(images, ahead):
    """Loss after `ahead` steps of torch.optim.SGD from each draw, and the gradient there as that of the draw."""
    ghn, draws, objective = GHN(SHAPE), 2, Objective(adapted=1.0, inner_lr=0.1, inner_momentum=0.8)
    subject = Subject(NAME, ghn, images, draws=draws)
    source = ImageStream(images, batch_size=16, augmentation="none", seed=0)
    batches = [source.batch(0, number) for number in range(ahead + 1)]
    decoded = {name: value.detach().requires_grad_() for name, value in generated(ghn, subject, draws).items()}
    loss, parts = adapted_loss(subject, decoded, batches, objective)
    found = torch.autograd.grad(loss, list(decoded.values()))
    losses, slopes = [], []
    for draw in range(draws):
        network = build(NAME, shape=images.shape, classes=10)
        network.load_state_dict({k: v[draw] for k, v in (subject.fixed | decoded).items()}, strict=False)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.8)
        for pictures, labels in batches:
            loss_here = F.cross_entropy(network(pictures), labels)
            optimiser.zero_grad()
            loss_here.backward()
            slopes_here = {name: value.grad.clone() for name, value in network.named_parameters()}
            optimiser.step()
        losses.append(loss_here.item())
        slopes.append(slopes_here)
    assert loss.item() == pytest.approx(sum(losses) / draws, rel=1e-4)
    assert parts == {"adapted_cross_entropy": pytest.approx(loss.item(), rel=1e-6)}
    for name, gradient in zip(decoded, found, strict=True):
        wanted = torch.stack([each[name] for each in slopes]) / draws
        torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


def test_horizon_grows():
    objective = Objective(adapted=1.0, horizon=16)
    assert [objective.steps_ahead(step, 100) for step in (0, 10, 40, 80, 99)] == [1, 2, 8, 16, 16]


def test_zoo_loss_against_the_definition(images, zoo):
    """KL of the softmax of both networks, summed over classes, mean over images; the prior on the code."""
    ghn = GHN(SHAPE)
    subject = Subject(NAME, ghn, images, draws=1)
    teachers = Teachers(zoo, [subject], images, code=SHAPE.code)
    assert teachers.count(NAME) == 3 and teachers.code(NAME, 1).shape == (subject.codes, SHAPE.code)
    pictures = images.train.images[:32]
    with torch.no_grad():
        teachers.code(NAME, 1).copy_(torch.randn(subject.codes, SHAPE.code, generator=stream(1, "code")))
    decoded = generated(ghn, subject, 1)
    code, state = teachers.code(NAME, 1), teachers.state(NAME, 1)
    loss, parts = zoo_loss(subject, decoded, state, code, pictures, prior=0.5)
    network = build(NAME, shape=images.shape, classes=10).train()
    kept = {name: value[0] for name, value in state.items()}
    assert all(torch.equal(kept[name], value) for name, value in zoo.state_dict(1).items())
    teacher = functional_call(network, {k: kept[k] for k, _ in network.named_parameters()}, (pictures,)).softmax(-1)
    own = {name: value[0] for name, value in (subject.fixed | decoded).items()}
    student = functional_call(network, own, (pictures,)).softmax(-1)
    divergence = (teacher * (teacher / student).log()).sum(-1).mean()
    assert parts["zoo_divergence"] == pytest.approx(divergence.item(), rel=1e-3)
    assert loss.item() == pytest.approx(divergence.item() + 0.25 * code.square().mean().item(), rel=1e-3)
    gradients = torch.autograd.grad(loss, [teachers.codes[NAME], *decoded.values()])
    assert gradients[0][1].abs().sum() > 0 and not gradients[0][[0, 2]].any()
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_networks_that_diverged_or_were_stopped_are_no_teachers(images, tmp_path):
    population = train(Recipe(architecture="mlp-1-w8", epochs=1), [0, 1, 2, 3], images)
    zoo_file.write(replace(population, status=("ok", "diverged", "stopped", "ok")), tmp_path)
    zoo = Zoo(tmp_path)
    teachers = Teachers(zoo, [Subject("mlp-1-w8", GHN(SHAPE), images, draws=1)], images, code=4)
    assert teachers.count("mlp-1-w8") == 2
    for number, row in enumerate((0, 3)):
        kept = teachers.state("mlp-1-w8", number)
        assert all(torch.equal(kept[name][0], value) for name, value in zoo.state_dict(row).items())


CONFIG = GHNTrainingConfig(
    architectures=(NAME,), steps=6, batch_size=32, lr=5e-3, log_every=2, evaluate_every=1000, save_every=3, ghn=SHAPE,
    draws=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "logged"),
    [
        (Objective(images=0.0, adapted=1.0, horizon=2), {"adapted_cross_entropy", "loss"}),
        (Objective(images=0.0, zoo=1.0), {"zoo_divergence", "loss"}),
        (Objective(images=0.5, adapted=0.5, zoo=0.5, horizon=2),
         {"adapted_cross_entropy", "zoo_divergence", "cross_entropy", "cosine"}),
    ],
    ids=["adapted", "zoo", "sum"],
)  # fmt: skip
def test_trainings_for_each_objective_go_on_after_a_kill_with_the_same_bits(
    images, zoo, tmp_path, monkeypatch, objective, logged
):
    from train_generators import ghn_step as module

    config = replace(CONFIG, objective=objective)
    fit(config, tmp_path / "whole", zoo=zoo, images=images, quiet=True)
    step_of = module.train_step

    def dying(*given):
        if given[4] == 4:
            raise KeyboardInterrupt
        return step_of(*given)

    monkeypatch.setattr(module, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "killed", zoo=zoo, images=images, quiet=True)
    monkeypatch.setattr(module, "train_step", step_of)
    fit(config, tmp_path / "killed", zoo=zoo, images=images, quiet=True)
    whole, killed = (tmp_path / name / "weights.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    assert logged <= set().union(*read_log(tmp_path / "whole" / "training"))


def test_fitting_a_zoo_learns_its_networks(images, zoo, tmp_path):
    """The divergence falls to less than half, and the generated networks become right about digits."""
    config = replace(
        CONFIG, objective=Objective(images=0.0, zoo=1.0), steps=150, log_every=10, lr=1e-2, draws=1,
        ghn=replace(SHAPE, anchor=0.0), save_every=1000,
    )  # fmt: skip
    ghn = fit(config, tmp_path / "out", zoo=zoo, images=images, quiet=True)
    divergences = [row["zoo_divergence"] for row in read_log(tmp_path / "out" / "training") if "zoo_divergence" in row]
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3])
    assert ghn.card["metrics"][NAME]["test accuracy before training"] > 0.3


def test_one_code_per_network_is_trained_as_such(images, zoo, tmp_path):
    """Codes of draws and of collected networks are `[1, code]` then."""
    shape = replace(SHAPE, code_per="network")
    subject = Subject(NAME, GHN(shape), images, draws=1)
    assert subject.codes == 1
    assert Teachers(zoo, [subject], images, code=4).code(NAME, 0).shape == (1, 4)
    config = replace(CONFIG, ghn=shape, steps=2, objective=Objective(zoo=1.0))
    assert fit(config, tmp_path / "out", zoo=zoo, images=images, quiet=True).config.code_per == "network"


def test_what_is_refused(images, zoo, tmp_path):
    ghn = GHN(SHAPE)
    other = Subject("mlp-1-w4", ghn, images, draws=1)
    with pytest.raises(ConfigError, match=r"no network of mlp-1-w4"):
        Teachers(zoo, [other], images, code=4)
    with pytest.raises(ConfigError, match="were trained on other data"):
        Teachers(zoo, [Subject(NAME, ghn, images, draws=1)], replace(images, digest="0" * 32), code=4)
    with pytest.raises(ConfigError, match=r"give one with --zoo"):
        fit(replace(CONFIG, objective=Objective(zoo=1.0)), tmp_path / "out", images=images, quiet=True)
    assert not (tmp_path / "out").exists()
    for wrong in ({"images": 0.0}, {"adapted": -1.0}, {"horizon": 0}, {"inner_lr": 0.0}, {"inner_momentum": 1.0},
                  {"inner_lr": math.nan}, {"prior": math.nan}, {"images": math.nan}):  # fmt: skip
        with pytest.raises(ConfigError, match="objective:"):
            Objective(**wrong)
    with pytest.raises(ConfigError, match="cosine_weight belongs to"):
        replace(CONFIG, cosine_weight=0.1, objective=Objective(images=0.0, adapted=1.0))
