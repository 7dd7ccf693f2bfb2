"""A recipe: every choice of a training run, and the ids that follow from it.

A run is (recipe, data digest, seed). Its id is a hash of the three, so it is the same on every machine. All randomness
of a run is drawn from streams named by its seed alone ("init", "order", "augmentation", "dropout"): two runs with one
seed that differ in `init` see the same batches, so that initialisers can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from collect.architectures import parse
from generators.errors import ConfigError, near

ENGINE_VERSION = 1  # part of every id; raised when the same recipe starts to give other networks

OPTIMISERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "linear", "constant")
AUGMENTATIONS = ("none", "shift", "flip-crop")
STATISTICS = ("train", "running")
PRECISIONS = ("float32", "bfloat16")
TRAJECTORIES = ("float32", "float16")

# Fields that the first version did not have. They enter ids only where they differ from their default, so that the
# networks of older zoos keep theirs; a field that is added to `Recipe` belongs here.
ADDED = ("dropout", "precision", "trajectory", "classifier_lr", "evaluation_steps")


@dataclass(frozen=True)
class Recipe:
    """One way to train one architecture on one data set.

    Attributes:
        data: name for `collect.data.load`.
        architecture: name for `collect.architectures.build`, such as `"resnet-20-w16"`.
        init: chain for `generators.init`.
        init_digest: the chain with every checkpoint in it named by the digest of its content, "" if it has none. Filled
            in by `collect.plan`; networks from a refitted checkpoint at the same place are other networks.
        optimiser: `"sgd"` or `"adamw"`, with the update rules of `torch.optim`.
        lr: highest learning rate.
        momentum: of SGD; the first beta of AdamW.
        nesterov: Nesterov momentum for SGD.
        weight_decay: on all parameters; coupled for SGD, decoupled for AdamW, as in `torch.optim`.
        schedule: see `collect.schedules`.
        warmup_epochs: linear rise of the learning rate, part of `epochs`.
        epochs: passes over the training images; the last incomplete batch of a pass is left out.
        batch_size: images per step and member.
        augmentation: see `collect.augmentation`.
        label_smoothing: of the training loss; reported losses are without it.
        clip_norm: largest gradient norm of a member, 0 for no clipping.
        evaluations_per_epoch: how often metrics are measured; epoch 0, before any step, comes on top.
        saved: epochs whose weights are stored: `"last"`, `"all"` (0 included), or a tuple of epochs.
        statistics: what batch norm uses in evaluations: `"train"`, statistics re-estimated on the first training images
            (`collect.stacked.CALIBRATION_IMAGES`, no augmentation), alike for every initialiser and epoch; or
            `"running"`, the moving averages of training.
        dropout: probability with which an input of the last linear layer, the classifier, is dropped in training.
        precision: of the forward and backward passes of training and evaluation: `"float32"`, or `"bfloat16"` where
            `torch.autocast` takes it. Weights, gradients and the optimiser stay in float32.
        trajectory: how the stored weights before the last are stored, `"float32"` or `"float16"`.
        classifier_lr: learning rate of the last linear layer, as a multiple of that of all others.
        evaluation_steps: steps after which metrics are measured besides; kept ascending, each once.
    """

    data: str = "digits"
    architecture: str = "resnet-8-w8"
    init: str = "he"
    init_digest: str = ""
    optimiser: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    epochs: int = 20
    batch_size: int = 64
    augmentation: str = "none"
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    evaluations_per_epoch: int = 1
    saved: str | tuple[int, ...] = "last"
    statistics: str = "train"
    dropout: float = 0.0
    precision: str = "float32"
    trajectory: str = "float32"
    classifier_lr: float = 1.0
    evaluation_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        parse(self.architecture)
        _choice("optimiser", self.optimiser, OPTIMISERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("augmentation", self.augmentation, AUGMENTATIONS)
        _choice("statistics", self.statistics, STATISTICS)
        _choice("precision", self.precision, PRECISIONS)
        _choice("trajectory", self.trajectory, TRAJECTORIES)
        _range("lr", self.lr, 0, math.inf, open_low=True)
        _range("classifier_lr", self.classifier_lr, 0, math.inf)
        _range("momentum", self.momentum, 0, 1, open_high=True)
        _range("weight_decay", self.weight_decay, 0, math.inf)
        _range("epochs", self.epochs, 1, math.inf)
        _range("warmup_epochs", self.warmup_epochs, 0, self.epochs, open_high=True)
        _range("batch_size", self.batch_size, 1, math.inf)
        _range("label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        _range("dropout", self.dropout, 0, 1, open_high=True)
        _range("clip_norm", self.clip_norm, 0, math.inf)
        _range("evaluations_per_epoch", self.evaluations_per_epoch, 1, math.inf)
        if self.nesterov and (self.optimiser != "sgd" or self.momentum == 0):
            raise ConfigError("recipe: nesterov needs optimiser='sgd' and momentum > 0; drop one of the two")
        if any(step < 1 or step != int(step) for step in self.evaluation_steps):
            raise ConfigError(f"recipe: evaluation_steps must be whole steps from 1, got {self.evaluation_steps!r}")
        object.__setattr__(self, "evaluation_steps", tuple(sorted(set(self.evaluation_steps))))
        if isinstance(self.saved, list):  # what JSON makes of a tuple
            object.__setattr__(self, "saved", tuple(self.saved))
        if isinstance(self.saved, str):
            _choice("saved", self.saved, ("last", "all"))
        elif not self.saved or not all(epoch in range(self.epochs + 1) for epoch in self.saved):
            raise ConfigError(
                f"recipe: saved must be 'last', 'all' or whole epochs from 0 to {self.epochs}, got {self.saved!r}"
            )

    @property
    def checkpoint_epochs(self) -> tuple[int, ...]:
        """The epochs whose weights are stored, ascending, each once."""
        if self.saved == "last":
            return (self.epochs,)
        if self.saved == "all":
            return tuple(range(self.epochs + 1))
        return tuple(sorted({int(epoch) for epoch in self.saved}))

    def evaluations(self, training_images: int) -> dict[int, float]:
        """Steps after which metrics are measured -> the same in epochs; ascending, 0 first.

        Raises:
            ConfigError: an epoch has fewer steps than evaluations, or the training ends before a step.
        """
        steps, times = training_images // self.batch_size, self.evaluations_per_epoch
        if steps < times:
            raise ConfigError(
                f"{self.data} has {training_images} training images, too few for {times} evaluations per epoch with "
                f"batches of {self.batch_size}; lower batch_size or evaluations_per_epoch"
            )
        if self.evaluation_steps and self.evaluation_steps[-1] > self.epochs * steps:
            raise ConfigError(
                f"evaluation_steps has {self.evaluation_steps[-1]}, but {self.epochs} epochs of {self.data} are "
                f"{self.epochs * steps} steps of {self.batch_size} images; more epochs or smaller batches have more"
            )
        found = {step: step / steps for step in self.evaluation_steps}
        found |= {round(number / times * steps): number / times for number in range(self.epochs * times + 1)}
        return dict(sorted(found.items()))


def _choice(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        close = near(str(value), known)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        raise ConfigError(f"recipe: unknown {field} {value!r}; {hint}")


def _range(
    field: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    inside = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
    if not inside or not math.isfinite(value):
        left, right = ("above" if open_low else "at least"), ("below" if open_high else "at most")
        bounds = f"{left} {low}" + (f" and {right} {high}" if math.isfinite(high) else "")
        raise ConfigError(f"recipe: {field} must be {bounds}, got {value}")


def canonical_json(recipe: Recipe) -> str:
    """The recipe as JSON with sorted keys and no spaces; equal recipes give equal text."""
    return json.dumps(asdict(recipe), sort_keys=True, separators=(",", ":"))


def from_json(text: str) -> Recipe:
    """The recipe that `canonical_json` wrote, in this version or an earlier one.

    Raises:
        ConfigError: not a JSON object with the fields of a recipe.
    """
    try:
        return Recipe(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"not the JSON of a recipe ({error}); expected the fields of collect.recipe.Recipe"
        ) from error


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run_ids(recipe: Recipe, data_digest: str, seeds: Sequence[int]) -> list[str]:
    """16 hex digits per run. Digests stand for data and checkpoints, so it does not matter where they lie."""
    choices = vars(recipe) | {"data": data_digest, "lr": float(recipe.lr)}
    choices["init"] = choices.pop("init_digest") or recipe.init
    for field in fields(Recipe):
        if field.name in ADDED and choices[field.name] == field.default:
            del choices[field.name]
    text = json.dumps(choices, sort_keys=True, separators=(",", ":"))
    return [_hash(f"[{ENGINE_VERSION},{text},{int(seed)}]") for seed in seeds]


def population_id(recipe: Recipe, data_digest: str, seeds: Sequence[int]) -> str:
    """16 hex digits for runs of one recipe that are trained together."""
    return _hash(json.dumps(run_ids(recipe, data_digest, seeds), separators=(",", ":")))
