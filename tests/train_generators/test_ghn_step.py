"""Units of a step that are decoded together, against units one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from collect import zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.seeds import stream
from train_generators import ghn_step
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.ghn_step import at_once, gradients, train_step
from train_generators.objectives import Objective, Teachers, adapted_loss, images_loss, zoo_loss
from train_generators.processes import join
from train_generators.subject import ImageStream, Subject

NAMES = ("resnet-8-w4", "mlp-1-w8", "resnet-8-w4", "vit-1-w16")
CONFIG = GHNTrainingConfig(
    architectures=NAMES, steps=8, meta_batch=len(NAMES), batch_size=16, draws=2, cosine_weight=0.0,
    ghn=GHNConfig(hidden=16, layers=1, heads=2, width=16, rank=8, cells=8, anchor=0.5, code=4),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"cosine_weight": 0.1},
        {"objective": Objective(images=0.0, adapted=1.0, horizon=2)},
        {"objective": Objective(images=0.5, adapted=0.5, horizon=2), "ghn": replace(CONFIG.ghn, code_per="network")},
    ],
    ids=["images", "adapted", "both, a code per network"],
)
@pytest.mark.parametrize("step", [0, 5], ids=["without noise", "with noise"])
def test_units_together_against_one_by_one(images, changes, step):
    """Losses and gradients: what is decoded beside a unit changes neither its codes nor its noise."""
    config = replace(CONFIG, **changes)
    ghn = GHN(config.ghn)
    subjects = {number: Subject(name, ghn, images, draws=2) for number, name in enumerate(NAMES)}
    source = ImageStream(images, batch_size=16, augmentation="none", seed=0)
    found = []
    for parts in ([subjects], [{number: subject} for number, subject in subjects.items()]):
        ghn.zero_grad()
        results = [result for part in parts for result in train_step(ghn, part, config, source, step)]
        gradients = {name: value.grad for name, value in ghn.named_parameters() if value.grad is not None}
        found.append((results, gradients))
    (together, gradients), (alone, wanted) = found
    assert len({loss for loss, _ in alone}) == len(NAMES), "units of one architecture draw numbers of their own"
    for (loss, parts), (other, others) in zip(together, alone, strict=True):
        assert loss == pytest.approx(other, rel=1e-5) and parts == pytest.approx(others, rel=1e-5)
    assert gradients.keys() == wanted.keys() and len(wanted) > 15
    scale = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.fixture(scope="module")
def teachers(images, tmp_path_factory):
    """Three networks of one architecture, and codes for them that are not 0."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo_file.write(train(Recipe(architecture="mlp-1-w8", epochs=1), [0, 1, 2], images), folder)
    subject = Subject("mlp-1-w8", GHN(CONFIG.ghn), images, draws=2)
    found = Teachers(Zoo(folder), [subject], images, code=4)
    with torch.no_grad():
        found.codes["mlp-1-w8"].copy_(torch.randn(3, subject.codes, 4, generator=stream(0, "codes")))
    return found


@pytest.mark.parametrize("unit", [0, 4])
def test_the_weighted_sum_of_all_objectives(images, teachers, unit):
    """At step 6 of 8: three steps ahead, each on a batch of its own; all of the noise; a teacher that is drawn."""
    step, name, place = 6, "mlp-1-w8", (6, *([unit] if unit else []))
    config = replace(
        CONFIG, cosine_weight=0.1, meta_batch=5,
        objective=Objective(images=0.3, adapted=0.5, zoo=0.2, horizon=3, prior=0.5),
    )  # fmt: skip
    ghn = GHN(config.ghn)
    subject = Subject(name, ghn, images, draws=2)
    source = ImageStream(images, batch_size=16, augmentation="none", seed=0)
    ((loss, parts),) = train_step(ghn, {unit: subject}, config, source, step, teachers)
    every = [*ghn.named_parameters(), *teachers.named_parameters()]
    found = {key: value.grad.clone() for key, value in every if value.grad is not None}
    ghn.zero_grad(), teachers.zero_grad()

    draw = stream(config.seed, "ghn-draw", *place)
    codes = torch.randn(2, subject.codes, 4, generator=draw)

    def decode(codes):
        noise = {  # all at once, in the order of the plan
            f"{target}[{block}]": torch.randn((len(codes), *group.shape), generator=draw)
            for group in subject.plan.groups
            for target, block in zip(group.names, group.blocks, strict=True)
        }
        return ghn.predict(subject.plan, codes, lambda target, shape: noise[target], anchor=0.5)

    decoded = decode(codes)
    batches = [source.batch(step, number, unit=unit) for number in range(4)]
    pictures, labels = batches[0]
    entropy, cross = images_loss(subject.logits(decoded, pictures.expand(2, *pictures.shape)), labels, 0.1)
    ahead, adapted = adapted_loss(subject, decoded, batches, config.objective)
    number = int(torch.randint(3, (), generator=stream(config.seed, "ghn-teacher", *place)))
    assert number > 0, "a case that tells a drawn teacher from the first one"
    code = teachers.code(name, number)
    fitted = decode(code[None])
    divergence, zoo = zoo_loss(subject, fitted, teachers.state(name, number), code, pictures, prior=0.5)
    wanted = 0.3 * entropy + 0.5 * ahead + 0.2 * divergence
    (wanted / 5).backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert parts == {key: pytest.approx(value, rel=1e-5) for key, value in (cross | adapted | zoo).items()}
    slow = {key: value.grad for key, value in every if value.grad is not None}
    assert found.keys() == slow.keys() and "codes.mlp-1-w8" in slow
    scale = max(value.abs().max().item() for value in slow.values())
    for key, value in slow.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * scale, msg=key)
    teachers.zero_grad()


def test_loss_and_parts_of_a_step_are_means_over_its_units(images):
    config = replace(CONFIG, cosine_weight=0.1)
    ghn = GHN(config.ghn)
    subjects = [Subject("mlp-1-w8", ghn, images, draws=2)]
    source = ImageStream(images, batch_size=16, augmentation="none", seed=0)
    loss, parts = gradients(join("cpu"), ghn, subjects, config, source, 5)
    alone = [train_step(ghn, {unit: subjects[0]}, config, source, 5)[0] for unit in range(4)]
    assert loss == pytest.approx(sum(each for each, _ in alone) / 4)
    assert parts.keys() == {"cross_entropy", "cosine"}
    for name, value in parts.items():
        assert value == pytest.approx(sum(each[name] for _, each in alone) / 4)


def test_how_many_are_decoded_together(monkeypatch):
    """As many as the bound on decoded numbers allows, one at least, in their order."""
    monkeypatch.setattr(ghn_step, "NUMBERS_AT_ONCE", 100)
    sizes = {3: 30, 4: 20, 7: 1, 8: 80, 9: 10}
    subjects = {number: SimpleNamespace(plan=SimpleNamespace(numel=size)) for number, size in sizes.items()}
    assert [list(taken) for taken in at_once(subjects, 2)] == [[3, 4], [7], [8], [9]]
    assert not list(at_once({}, 2))
