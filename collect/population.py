"""The training engine: K networks of one recipe, trained together, with everything that a zoo stores of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect import architectures, stacked
from collect.augmentation import Batches
from collect.data import ImageSet
from collect.grouped import Tensors
from collect.metrics import METRIC_NAMES, losses, measure
from collect.optimisation import OPTIMISERS, clip
from collect.recipe import Recipe
from collect.schedules import learning_rate
from collect.stacked import CALIBRATION_IMAGES, Form, predict
from generators.errors import ConfigError
from generators.initialiser import init, resolve
from generators.inventory import inventory
from generators.seeds import derive

__all__ = ["Population", "TensorSpec", "layouts", "predict", "train"]

log = logging.getLogger(__name__)

INIT_BATCH = 128  # images per batch for initialisers that need data; they get the first training images
BUFFER_ROLES = {"running_mean": "running_mean", "running_var": "running_var", "num_batches_tracked": "counter"}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in a row of weights or buffers.

    Attributes:
        name: in the state dict.
        role: of `generators.inventory.Role` for parameters; running_mean, running_var or counter for buffers.
        shape: as torch stores it.
        offset, length: in numbers, from the start of the row.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Population:
    """K trained networks: E evaluations, M metrics, C checkpoints, P weights and B buffer values per network.

    Attributes:
        recipe, seeds, data_digest: what was trained; seed k belongs to member k.
        architecture_json: family, depth, width, image shape and classes.
        form: how the members were run: grouped, vmap or loop.
        status: per member, `"ok"` or `"diverged"` (this engine never leaves a run `"stopped"` half-way).
        layout, buffer_layout: what lies where in a row.
        weights: float32 `[K, C, P]`. Of a diverged member, from its divergence on, those that gave the first loss that
            was not finite (they may hold NaN).
        buffers: float32 `[K, C, B]`, the running statistics of training and step counters.
        checkpoint_epochs: int64 `[C]`.
        metrics: float32 `[K, E, M]`, NaN for a diverged member from its divergence on. `train_*` is measured on the
            first `CALIBRATION_IMAGES` training images, without augmentation.
        metric_names: M names.
        evaluation_epochs: float64 `[E]`, 0 first.
        evaluation_steps: int64 `[E]`, optimiser steps done.
        seconds: wall time of the whole training.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    data_digest: str
    architecture_json: str
    form: str
    status: tuple[str, ...]
    layout: tuple[TensorSpec, ...]
    buffer_layout: tuple[TensorSpec, ...]
    weights: np.ndarray
    buffers: np.ndarray
    checkpoint_epochs: np.ndarray
    metrics: np.ndarray
    metric_names: tuple[str, ...]
    evaluation_epochs: np.ndarray
    evaluation_steps: np.ndarray
    seconds: float


def _layout(named: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorSpec, ...]:
    """Specs for (name, role, shape), one after the other."""
    specs, offset = [], 0
    for name, role, shape in named:
        length = int(np.prod(shape, dtype=np.int64))
        specs.append(TensorSpec(name, role, shape, offset, length))
        offset += length
    return tuple(specs)


def layouts(module: nn.Module) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The layout of a module's weights and of its persistent buffers, in the order of registration."""
    weights = [(info.name, info.role.value, info.shape) for info in inventory(module)]
    parameters = {name for name, _, _ in weights}
    buffers = [
        (name, BUFFER_ROLES.get(name.rpartition(".")[2], "buffer"), tuple(value.shape))
        for name, value in module.state_dict().items()
        if name not in parameters
    ]
    return _layout(weights), _layout(buffers)


class _Members:
    """The state of K members: flat weights with a view per parameter, buffers, and which members still train.

    A member whose loss stops being finite is frozen: a copy of its row is set aside. In the stack it computes on, which
    costs nothing extra and reaches no other member.
    """

    def __init__(self, recipe: Recipe, seeds: Sequence[int], images: ImageSet, device: torch.device) -> None:
        states = []
        chain = resolve(recipe.init)
        spec = chain[0] if len(chain) == 1 else recipe.init  # a learned initialiser is read once, not once per member
        first = images.train.images[:CALIBRATION_IMAGES], images.train.labels[:CALIBRATION_IMAGES]
        batches = list(zip(*(part.split(INIT_BATCH) for part in first), strict=True))
        for seed in seeds:
            module = architectures.build(recipe.architecture, shape=images.shape, classes=len(images.classes))
            init(
                module, spec, seed=derive(seed, "init"), data=batches, loss=F.cross_entropy,
                example_inputs=batches[0][0][:1],
            )  # fmt: skip
            states.append({name: value.detach() for name, value in module.state_dict().items()})
        self.layout, self.buffer_layout = layouts(module)
        stack = {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}
        self.flat = torch.cat([stack[spec.name].flatten() for spec in self.layout])
        segments = self.flat.split([len(seeds) * spec.length for spec in self.layout])
        self.parameters: Tensors = {
            spec.name: segment.view(len(seeds), *spec.shape).detach().requires_grad_()
            for spec, segment in zip(self.layout, segments, strict=True)
        }
        self.buffers: Tensors = {spec.name: stack[spec.name] for spec in self.buffer_layout}
        self.training = np.ones(len(seeds), dtype=bool)
        self._frozen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[K, P]` and buffers `[K, B]` as they are now, or were when a member was frozen."""
        found = []
        for tensors in (self.parameters, self.buffers):
            flat = [value.detach().reshape(len(value), -1).float() for value in tensors.values()]
            found.append(
                torch.cat(flat, dim=1).cpu().numpy() if flat else np.zeros((len(self.training), 0), np.float32)
            )
        weights, buffers = found
        for member, row in self._frozen.items():
            weights[member], buffers[member] = row
        return weights, buffers

    def freeze_unless(self, finite: Tensor, *, step: int) -> None:
        """Set members aside that trained until now and for which `finite` `[K]` is False."""
        lost = np.flatnonzero(self.training & ~finite.cpu().numpy())
        if len(lost):
            weights, buffers = self.rows()
            for member in lost.tolist():
                self._frozen[member] = (weights[member].copy(), buffers[member].copy())
                self.training[member] = False
                log.info("member %d diverged at step %d", member, step)


def _evaluate(form: Form, members: _Members, images: ImageSet, recipe: Recipe, device: torch.device) -> Tensor:
    """Metrics `[K, M]` in the order of `METRIC_NAMES`; see `Recipe.statistics`."""
    first = slice(CALIBRATION_IMAGES)
    pictures = images.train.images[first].to(device)
    buffers = members.buffers
    if recipe.statistics == "train":
        buffers, found = stacked.calibrate(form, members.parameters, buffers, pictures)
    else:
        found = stacked.logits(form, members.parameters, buffers, pictures)
    metrics = [measure(found, images.train.labels[first].to(device))]
    for part in (images.validation, images.test):
        found = stacked.logits(form, members.parameters, buffers, part.images.to(device))
        metrics.append(measure(found, part.labels.to(device)))
    return torch.cat(metrics, dim=1)


def train(
    recipe: Recipe,
    seeds: Sequence[int],
    images: ImageSet,
    *,
    on_epoch: Callable[[float], None] | None = None,
    device: str | torch.device = "cpu",
) -> Population:
    """Train one network per seed, all together.

    A member's initial weights, order of images and augmentation depend on its own seed only, its order and augmentation
    not on `recipe.init`.

    Args:
        recipe: how; `recipe.data` is not loaded, `images` is used.
        seeds: K distinct seeds.
        images: the data.
        on_epoch: called with the epoch after every evaluation; what it raises ends the training.
        device: where to train, in float32.

    Raises:
        ConfigError: the recipe does not fit the data, or the seeds repeat.
        UnknownNameError: no such initialiser.
    """
    start = time.perf_counter()
    device = torch.device(device)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"a population needs distinct seeds, at least one; got {list(seeds)}")
    steps_per_epoch = len(images.train) // recipe.batch_size
    if steps_per_epoch < recipe.evaluations_per_epoch:
        raise ConfigError(
            f"{images.name} has {len(images.train)} training images, {steps_per_epoch} batches of {recipe.batch_size} "
            f"an epoch; a smaller batch_size is needed for {recipe.evaluations_per_epoch} evaluations per epoch"
        )
    shape, classes = images.shape, len(images.classes)
    form = stacked.choose(recipe.architecture, shape=shape, classes=classes)
    members = _Members(recipe, seeds, images, device)
    optimiser = OPTIMISERS[recipe.optimiser](members.flat, recipe)
    batches = Batches(images, seeds, batch_size=recipe.batch_size, augmentation=recipe.augmentation, device=device)
    leaves = list(members.parameters.values())

    evaluations = np.arange(recipe.epochs * recipe.evaluations_per_epoch + 1) / recipe.evaluations_per_epoch
    evaluation_steps = np.rint(evaluations * steps_per_epoch).astype(np.int64)
    metrics = np.full((len(seeds), len(evaluations), len(METRIC_NAMES)), np.nan, np.float32)
    checkpoints: list[tuple[np.ndarray, np.ndarray]] = []
    evaluated = 0

    def record(step: int) -> None:
        """Evaluate and store what is due after `step` steps."""
        nonlocal evaluated
        if step == evaluation_steps[evaluated]:
            found = _evaluate(form, members, images, recipe, device)
            members.freeze_unless(found.isfinite().all(dim=1), step=step)
            metrics[members.training, evaluated] = found.cpu().numpy()[members.training]
            if on_epoch is not None:
                on_epoch(float(evaluations[evaluated]))
            evaluated += 1
        if step % steps_per_epoch == 0 and step // steps_per_epoch in recipe.checkpoint_epochs:
            checkpoints.append(members.rows())

    step = 0
    record(step)
    for _ in range(recipe.epochs):
        if not members.training.any():
            break
        for pictures, labels in batches.epoch():
            loss = losses(
                form(members.parameters, members.buffers, pictures, training=True),
                labels, smoothing=recipe.label_smoothing,
            )  # fmt: skip
            members.freeze_unless(loss.detach().isfinite(), step=step)
            gradients = torch.autograd.grad(loss.sum(), leaves)
            if recipe.clip_norm:
                clip(gradients, recipe.clip_norm)
            rate = learning_rate(recipe, step, steps_per_epoch=steps_per_epoch)
            optimiser.step(torch.cat([gradient.flatten() for gradient in gradients]), lr=rate)
            step += 1
            record(step)
    checkpoints += [members.rows()] * (len(recipe.checkpoint_epochs) - len(checkpoints))  # if all diverged
    weights, buffers = (np.stack(rows, axis=1) for rows in zip(*checkpoints, strict=True))
    return Population(
        recipe=recipe,
        seeds=tuple(int(seed) for seed in seeds),
        data_digest=images.digest,
        architecture_json=architectures.parse(recipe.architecture).to_json(shape=shape, classes=classes),
        form=form.name,
        status=tuple("ok" if training else "diverged" for training in members.training.tolist()),
        layout=members.layout,
        buffer_layout=members.buffer_layout,
        weights=weights,
        buffers=buffers,
        checkpoint_epochs=np.asarray(recipe.checkpoint_epochs, dtype=np.int64),
        metrics=metrics,
        metric_names=METRIC_NAMES,
        evaluation_epochs=evaluations,
        evaluation_steps=evaluation_steps,
        seconds=time.perf_counter() - start,
    )
