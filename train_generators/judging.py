"""The figures of a card: what the networks of a GHN are worth before any training, and how much they vary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from collect.architectures import build, parse
from collect.data import ImageSet, load
from collect.provenance import versions
from collect.stacked import CALIBRATION_IMAGES, predict
from generators import checkpoint as checkpoints
from generators.errors import ConfigError
from generators.ghn.ghn import GHN
from generators.initialiser import Request
from generators.inventory import inventory
from generators.statistics import measure

JUDGED_MEMBERS = 3  # members per architecture in an evaluation


def models(names: Iterable[str], images: ImageSet) -> dict[str, tuple[nn.Module, Tensor]]:
    """Architectures for a data set, each with an input."""
    example = torch.zeros(1, *images.shape)
    return {name: (build(parse(name), shape=images.shape, classes=len(images.classes)), example) for name in names}


def zero_shot(ghn: GHN, name: str, images: ImageSet, split: str, *, members: int = JUDGED_MEMBERS) -> dict[str, float]:
    """Accuracy before any training of generated networks, batch-norm statistics from training images.

    Returns:
        `accuracy` (mean over members) and `disagreement` (share of images on which two members differ, mean of pairs).
    """
    ((module, example),) = models([name], images).values()
    states = ghn.sample(module, members, seed=0, example_inputs=example)
    part = getattr(images, split)
    logits = predict(
        name, states, part.images, shape=images.shape, classes=len(images.classes),
        calibration=images.train.images[:CALIBRATION_IMAGES],
    )  # fmt: skip
    votes = logits.argmax(dim=-1)
    pairs = [(i, j) for i in range(members) for j in range(i)]
    return {
        "accuracy": (votes == part.labels).float().mean().item(),
        "disagreement": sum((votes[i] != votes[j]).float().mean().item() for i, j in pairs) / max(len(pairs), 1),
    }


def variety(ghn: GHN, name: str, images: ImageSet) -> dict[str, float]:
    """Least stable rank, distinct share and both ends of the std ratio over the decoded tensors of one network.

    Of a GHN with codes also `code_share`: how much of the mean square of its decoded weights is what the codes make
    members differ in, the white noise being one.
    """
    ((module, example),) = models([name], images).values()
    request = Request(inventory(module), example_inputs=example)
    proposal, plan = ghn.propose(module, request), ghn.plan(module, request.example_inputs)
    spread = {name: group.target_std for group in plan.groups for name in group.names}
    found = plan.found
    rows = [
        measure(block, target)
        for name, target in spread.items()
        for block in proposal.values[name].chunk(found[name].blocks, found[name].block_axis)  # query, key and value
    ]
    found_figures = {
        "least_stable_rank": min(row.stable_rank for row in rows if row.rank_limit > 1),
        "least_distinct_share": min(row.distinct_share for row in rows),
        "least_std_ratio": min(row.std_ratio for row in rows),
        "greatest_std_ratio": max(row.std_ratio for row in rows),
    }
    return found_figures | ({"code_share": code_share(ghn, module, example)} if ghn.config.code else {})


def code_share(ghn: GHN, module: nn.Module, example: Tensor, *, members: int = 8) -> float:
    """Variance over members with one white noise, as a share of the mean square of all decoded weights."""
    states = ghn.sample(module, members, example_inputs=example, shared_noise=True)
    decoded = [states[name].double() for group in ghn.plan(module, example).groups for name in set(group.names)]
    whole = sum(value.square().mean(0).sum().item() for value in decoded)
    return sum(value.var(0).sum().item() for value in decoded) / whole


def figures(ghn: GHN, held_out: Sequence[str], architectures: Sequence[str], images: ImageSet) -> dict[str, Any]:
    """The measured part of a card: `metrics` on test images, of the held-out architectures and of one of the others,
    `variety` of the first of them, and the `versions` of the code that measured.
    """
    judged = (*held_out, architectures[0])
    metrics = {
        f"{name} (never trained on)" if name in held_out else name: {
            f"test {key} before training": value for key, value in zero_shot(ghn, name, images, "test").items()
        }
        for name in judged
    }
    return {"metrics": metrics, "variety": variety(ghn, judged[0], images), "versions": versions()}


def table(card: dict[str, Any], *, title: str) -> Table:
    """The metrics of a card, for people."""
    shown = Table("architecture", "test accuracy before training", "disagreement of members", title=title)
    for name, row in card["metrics"].items():
        values = (row[f"test {key} before training"] for key in ("accuracy", "disagreement"))
        shown.add_row(name, *(f"{value:.1%}" for value in values))
    return shown


def main(checkpoint: Path, data: str = "", data_root: Path | None = None, out: Path | None = None) -> None:
    """Measure the figures of a GHN's card again: accuracy before training, disagreement of members, variety.

    Example: python -m train_generators judge --checkpoint checkpoints/noise-ghn-digits

    Args:
        checkpoint: Folder of the checkpoint.
        data: Its data set; the one that the card names if it is empty.
        data_root: Where torchvision sets lie.
        out: Folder of a copy whose card has these figures in place of the old ones.

    Raises:
        ConfigError: the checkpoint is no GHN, its card does not say what it was trained on, or the data are others.
    """
    torch.set_num_threads(1)  # operations are small: more threads wait for each other
    ghn = checkpoints.load(checkpoint)
    if not isinstance(ghn, GHN):
        raise ConfigError(f"{checkpoint} holds a {ghn.kind_name}, not a GHN")
    missing = {"architectures", "held_out", "data", "data_digest"} - ghn.card.keys()
    if missing:
        raise ConfigError(f"the card of {checkpoint} lacks {', '.join(sorted(missing))}: nothing says what to judge on")
    images = load(data or ghn.card["data"], root=data_root)
    if images.digest != ghn.card["data_digest"]:
        raise ConfigError(
            f"{checkpoint} was trained on {ghn.card['data']} with digest {ghn.card['data_digest']}, not on "
            f"{images.name} with {images.digest}; give its own --data"
        )
    console = Console()
    if "metrics" in ghn.card:
        console.print(table(ghn.card, title=f"{ghn.name}, as its card says"))
    ghn.card |= figures(ghn, ghn.card["held_out"], ghn.card["architectures"], images)
    console.print(table(ghn.card, title=f"{ghn.name}, measured now"))
    if out is not None:
        checkpoints.save(ghn, out)
