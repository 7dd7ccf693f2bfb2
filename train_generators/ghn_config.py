"""Every choice of a GHN training, and what of it the card of the checkpoint says."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from collect.architectures import parse
from collect.data import ImageSet
from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from train_generators.architectures import Pool
from train_generators.objectives import Objective


@dataclass(frozen=True)
class GHNTrainingConfig:
    """Every choice of one GHN training; saved beside the checkpoint.

    Attributes:
        architectures: What the GHN is trained on, such as resnet-8-w8 vgg-3-w8. Without any, and without a pool, those
            of the zoo.
        held_out: Architectures that are evaluated, on validation images, and never trained on.
        pool: Architectures drawn from families, on top of the named ones.
        mix_zoo: Those of the --zoo come on top of the named and drawn ones.
        hold_out: Share of the drawn ones and of those of the zoo that is held out, chosen by a hash of their names.
        data: Data set, see `collect.data.load`.
        data_root: Where torchvision sets lie.
        start: Checkpoint of a GHN that is trained on, with this data and objective: a published name or a folder. Its
            shape is kept, so leave --ghn.*, --encoder and --decoder alone; its anchor is there from the first step.
        steps: Optimiser steps.
        meta_batch: Architectures per step, a batch of images each, over whose losses the mean is taken. Processes that
            `torchrun` starts share them.
        batch_size: Images per architecture and step.
        lr: Peak learning rate of AdamW: linear warm-up, then cosine to zero.
        warm_up: Share of the steps with rising learning rate.
        weight_decay: Of AdamW.
        clip_norm: Bound on the norm of the gradient.
        augmentation: Of the images: none, shift or flip-crop.
        precision: Of the generated networks' forward and backward passes: float32, or bfloat16 by autocast. The GHN
            itself works in float32.
        draws: Members per step; the cosine needs two.
        anchor_warm_up: Share of the steps over which the anchor rises from 0 to its value: a GHN that meets all the
            noise at once stays at chance for long.
        cosine_weight: Weight of the cosine between the logits of two draws; 0 for a deterministic GHN.
        objective: What the GHN is trained for, see `train_generators.objectives`.
        log_every: Steps between lines of the log.
        evaluate_every: Steps between evaluations on the held-out architectures.
        save_every: Steps between saved training states.
        ghn: The shape of the GHN.
        name: What reports call it. A training may go on under another name, and with other numbers for log_every,
            evaluate_every and save_every.
        seed: Root of all random streams.
    """

    architectures: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    pool: Pool = field(default_factory=Pool)
    mix_zoo: bool = False
    hold_out: float = 0.0
    data: str = "digits"
    data_root: Path | None = None
    start: str = ""
    steps: int = 2000
    meta_batch: int = 1
    batch_size: int = 64
    lr: float = 2e-3
    warm_up: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    augmentation: Literal["none", "shift", "flip-crop"] = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    draws: int = 1
    anchor_warm_up: float = 0.5
    cosine_weight: float = 0.0
    objective: Objective = field(default_factory=Objective)
    log_every: int = 50
    evaluate_every: int = 500
    save_every: int = 500
    ghn: GHNConfig = field(default_factory=GHNConfig)
    name: str = "ghn"
    seed: int = 0

    def __post_init__(self) -> None:
        both = set(self.architectures) & set(self.held_out)
        if both:
            raise ConfigError(f"{sorted(both)} are both trained on and held out; take them out of one list")
        if not 0 <= self.hold_out < 1:
            raise ConfigError(f"hold_out is a share, at least 0 and less than 1, got {self.hold_out}")
        if min(self.steps, self.meta_batch, self.draws, self.log_every, self.evaluate_every, self.save_every) < 1:
            raise ConfigError("steps, meta_batch, draws, log_every, evaluate_every and save_every must be at least 1")
        self._check_recipe()
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: batch norm divides by the spread of a batch")
        if self.cosine_weight and not self.objective.images:
            raise ConfigError("cosine_weight belongs to objective.images, whose weight is 0")
        if self.cosine_weight and (self.draws < 2 or not (self.start or self.ghn.anchor or self.ghn.code)):
            raise ConfigError("cosine_weight needs draws of 2 or more, and an anchor or a code so that they differ")
        for name in (*self.architectures, *self.held_out):
            parse(name)  # a wrong name is found now, not at the first evaluation

    def _check_recipe(self) -> None:
        """Numbers of the optimiser, written so that a NaN fails too."""
        if not (0 < self.lr < math.inf and self.clip_norm > 0):
            raise ConfigError(f"lr must be a number above 0 and clip_norm above 0, got {self.lr} and {self.clip_norm}")
        for name in ("weight_decay", "cosine_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        for name in ("warm_up", "anchor_warm_up"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share of the steps, from 0 to 1, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed must fit into 64 bits, as torch has it, got {self.seed}")


DETERMINISTIC = GHNTrainingConfig()
NOISE = GHNTrainingConfig(
    name="noise-ghn", ghn=GHNConfig(anchor=0.7, decoded_limit=1.0, code=8, rank=24, cells=24), steps=24000
)
"""The noise GHN's default, the recipe of `noise-ghn-cifar10-long`, whose lead over He is the largest; see
docs/decisions.md."""


FOR_THE_RECORD = {"name", "log_every", "evaluate_every", "save_every"}
"""What changes nothing in the weights that a training ends with, and may change while it goes on."""


def facts(
    config: GHNTrainingConfig, images: ImageSet, *, start_digest: str | None = None, zoo: str | None = None
) -> dict[str, Any]:
    """What the card says besides the figures.

    Args:
        config: of the training, with the shape of the GHN resolved.
        images: the data set.
        start_digest: of the content of the checkpoint that the training started from.
        zoo: digest of the runs whose networks are fitted.
    """
    kind = "noise-ghn" if config.ghn.anchor or config.ghn.code else "ghn"
    summaries = {"ghn": "deterministic graph hypernetwork", "noise-ghn": "graph hypernetwork whose members differ"}
    training = asdict(config) | {"data": images.name, "start": Path(config.start).name}
    del training["ghn"]["met"]  # which the training finds
    del training["data_root"]  # where things lie on this machine is nobody's business; what they are, digests say
    return {
        "kind": kind,
        "summary": summaries[kind],
        "paper": "arXiv 2310.16695",
        "licence": "Apache-2.0",
        "data": images.name,
        "data_digest": images.digest,
        "architectures": list(config.architectures),
        "held_out": list(config.held_out),
        **({"start_digest": start_digest} if start_digest else {}),
        **({"zoo": zoo} if zoo else {}),
        "training": json.loads(json.dumps(training)),  # tuples as the checkpoint gives them back: lists
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Where the cards of two trainings disagree so that one cannot go on as the other, each with both values.

    Args:
        saved, now: as `facts` returns them.
    """
    theirs, ours = (_flat(_must_agree(card)) for card in (saved, now))
    names = sorted({*theirs, *ours})
    return [_apart(name, theirs.get(name), ours.get(name)) for name in names if theirs.get(name) != ours.get(name)]


def _must_agree(card: dict[str, Any]) -> dict[str, Any]:
    digests = {name: card[name] for name in ("data_digest", "start_digest", "zoo") if name in card}
    return digests | {name: value for name, value in card["training"].items() if name not in FOR_THE_RECORD}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with the names that the flags have: objective.inner_lr."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _apart(name: str, there: Any, now: Any) -> str:
    """Both values of a field; of long lists, what only one of them has."""
    if isinstance(there, list) and isinstance(now, list) and {*there} != {*now}:
        sides = (({*there} - {*now}, "there"), ({*now} - {*there}, "now"))
        return f"{name}: " + ", ".join(
            f"{_short(' '.join(map(str, sorted(own))))} only {side}" for own, side in sides if own
        )
    return f"{name}: {_short(str(there))} there, {_short(str(now))} now"


def _short(text: str) -> str:
    return textwrap.shorten(text, 100, placeholder=" ...")
