"""Units of a step that are decoded together, against units one by one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from train_generators import ghn_step
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.ghn_step import at_once, train_step
from train_generators.objectives import Objective
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


def test_how_many_are_decoded_together(monkeypatch):
    """As many as the bound on decoded numbers allows, one at least, in their order."""
    monkeypatch.setattr(ghn_step, "NUMBERS_AT_ONCE", 100)
    sizes = {3: 30, 4: 20, 7: 1, 8: 80, 9: 10}
    subjects = {number: SimpleNamespace(plan=SimpleNamespace(numel=size)) for number, size in sizes.items()}
    assert [list(taken) for taken in at_once(subjects, 2)] == [[3, 4], [7], [8], [9]]
    assert not list(at_once({}, 2))
