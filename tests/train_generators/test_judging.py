"""The figures of a card, against the networks themselves, and the command that measures them again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import generators
from collect.architectures import build
from collect.data import ImageSet
from generators.errors import ConfigError
from generators.ghn.codes import member_noise
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.statistics import measure
from train_generators import cli
from train_generators.judging import code_share, figures, variety, zero_shot

SMALL = GHNConfig(hidden=16, heads=2, layers=1, rank=8, cells=8, width=8, anchor=0.5, code=4)
NAME = "mlp-1-w16"


@pytest.fixture
def saved(tmp_path: Path, images: ImageSet) -> Path:
    """A GHN whose card has figures that are not its own."""
    wrong = {f"test {key} before training": 0.5 for key in ("accuracy", "disagreement")}
    card = {
        "architectures": [NAME], "held_out": ["mlp-1-w24"], "data": "digits", "data_digest": images.digest,
        "summary": "toy", "metrics": {NAME: wrong},
    }  # fmt: skip
    return generators.save(GHN(SMALL, card=card), tmp_path / "made")


def test_accuracy_and_disagreement_by_hand(images: ImageSet) -> None:
    """Without batch norm nothing is estimated: three members run as they are."""
    ghn = GHN(SMALL)
    model = build(NAME, shape=images.shape, classes=10)
    part = images.test
    votes = []
    for member in range(3):
        generators.init(model, ghn, member=member, example_inputs=torch.zeros(1, *images.shape))
        with torch.no_grad():
            votes.append(model.eval()(part.images).argmax(1))
    found = zero_shot(ghn, NAME, images, "test")
    right = [(vote == part.labels).float().mean().item() for vote in votes]
    assert found["accuracy"] == pytest.approx(sum(right) / 3, abs=0.004)
    apart = [(votes[i] != votes[j]).float().mean().item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["disagreement"] == pytest.approx(sum(apart) / 3, abs=0.004)


def test_variety_takes_query_key_and_value_apart(images: ImageSet) -> None:
    """Against the matrices one by one, those of a projection to all three cut by hand."""
    ghn = GHN(SMALL)
    module = build("vit-1-w16", shape=images.shape, classes=10)
    example = torch.zeros(1, *images.shape)
    plan = ghn.plan(module, example)
    values = ghn.sample(module, 1, example_inputs=example)
    rows, cut = [], 0
    for group in plan.groups:
        for name in dict.fromkeys(group.names):
            value = values[name][0]
            parts = value.split(16) if value.shape == (48, 16) else [value]
            cut += len(parts) == 3
            rows += [measure(part, group.target_std) for part in parts]
    assert cut == 1
    found = variety(ghn, "vit-1-w16", images)
    assert found["least_stable_rank"] == pytest.approx(min(row.stable_rank for row in rows if row.rank_limit > 1))
    assert found["least_std_ratio"] == pytest.approx(min(row.std_ratio for row in rows))
    assert found["greatest_std_ratio"] == pytest.approx(max(row.std_ratio for row in rows))


def test_the_command_measures_again_and_keeps_the_weights(
    saved: Path, tmp_path: Path, images: ImageSet, capsys
) -> None:
    """The copy has the figures of `figures`, all other facts and the same tensors; the original stays as it was."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    cli.main(["judge", "--checkpoint", str(saved), "--out", str(tmp_path / "copy")])
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    old, new = generators.load(saved), generators.load(tmp_path / "copy")
    assert isinstance(new, GHN)
    wanted = json.loads(json.dumps(figures(new, ["mlp-1-w24"], [NAME], images)))
    assert new.card["metrics"] == wanted["metrics"] and new.card["variety"] == wanted["variety"]
    assert set(new.card["metrics"]) == {"mlp-1-w24 (never trained on)", NAME}
    assert {key: new.card[key] for key in ("architectures", "summary", "data_digest")} == {
        key: old.card[key] for key in ("architectures", "summary", "data_digest")
    }
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    assert "50.0%" in capsys.readouterr().out, "the old figures are shown beside the new ones"


def test_a_card_without_figures_gets_them(tmp_path: Path, images: ImageSet, capsys) -> None:
    card = {"architectures": [NAME], "held_out": [], "data": "digits", "data_digest": images.digest}
    made = generators.save(GHN(SMALL, card=card), tmp_path / "made")
    cli.main(["judge", "--checkpoint", str(made), "--out", str(tmp_path / "copy")])
    assert list(generators.load(tmp_path / "copy").card["metrics"]) == [NAME]
    assert "as its card says" not in capsys.readouterr().out


def test_what_cannot_be_judged(saved: Path, tmp_path: Path) -> None:
    """Other data than those of the card, a card that says nothing, and a generator that is no GHN."""
    bare = generators.save(GHN(SMALL), tmp_path / "bare")
    local = Path(generators.__file__).parents[1] / "checkpoints" / "conv-vae-digits"
    for folder, message in ((bare, "lacks architectures"), (local, "not a GHN")):
        with pytest.raises(ConfigError, match=message):
            cli.main(["judge", "--checkpoint", str(folder)])
    generator = generators.load(saved)
    generator.card["data_digest"] = "0" * 32
    with pytest.raises(ConfigError, match="give its own --data"):
        cli.main(["judge", "--checkpoint", str(generators.save(generator, tmp_path / "other"))])


def test_share_of_the_codes_in_the_weights(images: ImageSet) -> None:
    """Member after member with the white noise of the first; without white noise the share is larger."""
    model, example = build(NAME, shape=images.shape, classes=10), torch.zeros(1, *images.shape)
    shares = []
    for anchor in (0.5, 0.0):
        ghn = GHN(replace(SMALL, anchor=anchor))
        plan, noise = ghn.plan(model, example), member_noise(0, range(1))
        with torch.no_grad():
            made = [
                ghn.predict(plan, ghn.code(0, member, ghn.code_nodes(plan))[None], noise, anchor=anchor)
                for member in range(8)
            ]
        stacks = [torch.cat([each[name] for each in made]).double() for name in made[0]]
        differing = sum(((stack - stack.mean(0)) ** 2).sum().item() / 7 for stack in stacks)
        shares.append(differing / sum((stack**2).mean(0).sum().item() for stack in stacks))
        assert code_share(ghn, model, example) == pytest.approx(shares[-1], rel=1e-3)
        assert variety(ghn, NAME, images)["code_share"] == pytest.approx(shares[-1], rel=1e-3)
    assert 0 < shares[0] < shares[1] < 1
    assert "code_share" not in variety(GHN(replace(SMALL, code=0)), NAME, images)
