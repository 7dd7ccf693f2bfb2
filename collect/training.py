"""Training one stack of members, step by step: a stack can be put down after any step and taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from collect import architectures, forms, stacked
from collect.augmentation import Batches
from collect.cost import operations
from collect.data import ImageSet
from collect.dropout import Masks
from collect.grouped import Tensors
from collect.members import Members, layouts
from collect.metrics import METRIC_NAMES, losses, measure
from collect.optimisation import OPTIMISERS, clip
from collect.recipe import Recipe
from collect.schedules import learning_rate
from collect.stacked import CALIBRATION_IMAGES
from collect.unfinished import State
from generators.errors import ConfigError
from generators.filling import init
from generators.initialiser import resolve
from generators.inventory import inventory
from generators.seeds import derive

INIT_BATCH = 128  # images per batch for initialisers that need data; they get the first training images
COMPILED_FROM = 2e13  # operations of one run, some minutes of a core: compiling costs half a minute
LOOK_EVERY = {"cpu": 1}  # steps between two looks at which members are finite ...
LOOK_ELSEWHERE = 50  # ... and on other devices, for which the CPU has to wait; evaluations always look


class Setup:
    """What all stacks of a population share: the form, the images on the device, and when to measure.

    Attributes:
        steps_per_epoch: optimiser steps.
        evaluations: float64 `[E]`, epochs at which metrics are measured, 0 first.
        evaluation_steps: int64 `[E]`, the same in steps.

    Raises:
        ConfigError: the recipe does not fit the data.
        UnknownNameError: no such initialiser.
    """

    def __init__(self, recipe: Recipe, images: ImageSet, *, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.steps_per_epoch = len(images.train) // recipe.batch_size
        evaluations = recipe.evaluations(len(images.train))
        self.evaluations = np.array(list(evaluations.values()), dtype=np.float64)
        self.evaluation_steps = np.array(list(evaluations), dtype=np.int64)
        self.shape, self.classes = images.shape, len(images.classes)
        self.form = forms.choose(
            recipe.architecture, shape=self.shape, classes=self.classes, precision=recipe.precision,
            compiled=operations(recipe, images) >= COMPILED_FROM, dropout=recipe.dropout > 0,
        )  # fmt: skip
        template = forms.template(recipe.architecture, shape=self.shape, classes=self.classes)
        self.layout, self.buffer_layout = layouts(template)
        self.classifier = frozenset(info.name for info in inventory(template) if info.output)
        if recipe.classifier_lr != 1 and not self.classifier:
            raise ConfigError(f"{recipe.architecture} has no last linear layer; leave classifier_lr out")
        chain = resolve(recipe.init)
        self._init = chain[0] if len(chain) == 1 else recipe.init  # a learned one is read once, not once per member
        first = images.train.images[:CALIBRATION_IMAGES], images.train.labels[:CALIBRATION_IMAGES]
        self._first = list(zip(*(part.split(INIT_BATCH) for part in first), strict=True))
        self._measured = [
            (pictures.to(device), labels.to(device))
            for pictures, labels in (first, *((part.images, part.labels) for part in (images.validation, images.test)))
        ]
        self.batches = Batches(
            images, (), batch_size=recipe.batch_size, augmentation=recipe.augmentation, device=device
        )  # fmt: skip

    def initial(self, seeds: Sequence[int]) -> Tensors:
        """Every tensor of the state dict as the initialiser makes it, name -> `[K, ...]`, for one member per seed."""
        states = []
        for seed in seeds:
            module = architectures.build(self.recipe.architecture, shape=self.shape, classes=self.classes)
            init(
                module, self._init, seed=derive(seed, "init"), data=self._first, loss=F.cross_entropy,
                example_inputs=self._first[0][0][:1],
            )  # fmt: skip
            states.append(module.state_dict())
        return stacked.stack(states)

    def measure(self, parameters: Tensors, buffers: Tensors) -> Tensor:
        """Metrics `[K, M]` in the order of `METRIC_NAMES`; see `Recipe.statistics`."""
        (pictures, labels), *others = self._measured
        if self.recipe.statistics == "train":
            buffers, found = stacked.calibrate(self.form, parameters, buffers, pictures)
        else:
            found = stacked.logits(self.form, parameters, buffers, pictures)
        metrics = [measure(found, labels)]
        for pictures, labels in others:
            metrics.append(measure(stacked.logits(self.form, parameters, buffers, pictures), labels))
        return torch.cat(metrics, dim=1)


class Stack:
    """Members that are trained together, and all that changes with a step.

    Args:
        setup: shared with other stacks, of which one is trained at a time.
        seeds: one per member.
        state: what `state()` returned after some step, to go on from there; None starts at the beginning.
    """

    def __init__(self, setup: Setup, seeds: Sequence[int], *, state: State | None = None) -> None:
        self.setup, self.step_count = setup, 0
        tensors = setup.initial(seeds) if state is None else state["members"]["tensors"]
        self.members = Members(tensors, setup.layout, setup.buffer_layout, device=setup.device)
        self._leaves = list(self.members.parameters.values())
        self._optimiser = OPTIMISERS[setup.recipe.optimiser](self.members.flat, setup.recipe)
        self._rates = self._relative_rates()
        self._masks = Masks(
            setup.form.module, seeds, dropout=setup.recipe.dropout, batch_size=setup.recipe.batch_size,
            device=setup.device,
        )  # fmt: skip
        setup.batches.reseed(seeds)
        self._epoch: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._streams = setup.batches.state()  # as they were when the epoch began
        self._metrics = np.full((len(seeds), len(setup.evaluations), len(METRIC_NAMES)), np.nan, np.float32)
        self._checkpoints: list[tuple[np.ndarray, np.ndarray]] = []
        if state is None:
            self._record()
        else:
            self._load(state)

    def _relative_rates(self) -> Tensor | None:
        """The learning rate of every weight of `members.flat` over that of the recipe; None if all are equal."""
        factor, named = self.setup.recipe.classifier_lr, self.members.parameters.items()
        if factor == 1:
            return None
        return torch.cat(
            [torch.full((value.numel(),), factor if name in self.setup.classifier else 1.0) for name, value in named]
        ).to(self.members.flat)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or no member is left to train."""
        return self.step_count == self.setup.evaluation_steps[-1] or not self.members.training.any()

    @property
    def progress(self) -> float:
        """The share of the steps that is done."""
        return self.step_count / int(self.setup.evaluation_steps[-1])

    def step(self) -> None:
        """One optimiser step of every member, and what is to be measured and stored after it."""
        setup, members, recipe = self.setup, self.members, self.setup.recipe
        if self.step_count % setup.steps_per_epoch == 0:
            self._streams = setup.batches.state()
            self._epoch = setup.batches.epoch()
        pictures, labels = next(self._epoch)
        loss = losses(
            setup.form(members.parameters, members.buffers | self._masks.draw(), pictures, training=True),
            labels, smoothing=recipe.label_smoothing,
        )  # fmt: skip
        members.freeze_unless(
            loss.detach().isfinite(), step=self.step_count,
            at_once=self.step_count % LOOK_EVERY.get(setup.device.type, LOOK_ELSEWHERE) == 0,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss.sum(), self._leaves)
        if recipe.clip_norm:
            clip(gradients, recipe.clip_norm)
        rate: float | Tensor = learning_rate(recipe, self.step_count, steps_per_epoch=setup.steps_per_epoch)
        if self._rates is not None:
            rate = rate * self._rates
        self._optimiser.step(torch.cat([gradient.flatten() for gradient in gradients]), lr=rate)
        self.step_count += 1
        self._record()

    def _record(self) -> None:
        """Measure and store what is due after the steps done."""
        due = np.searchsorted(self.setup.evaluation_steps, self.step_count)
        if self.setup.evaluation_steps[due] == self.step_count:
            found = self.setup.measure(self.members.parameters, self.members.buffers | self._masks.neutral)
            self.members.freeze_unless(found.isfinite().all(dim=1), step=self.step_count)
            self._metrics[self.members.training, due] = found.cpu().numpy()[self.members.training]
        epoch, rest = divmod(self.step_count, self.setup.steps_per_epoch)
        if rest == 0 and epoch in self.setup.recipe.checkpoint_epochs:
            self._checkpoints.append(self.members.rows())

    def result(self) -> dict[str, np.ndarray]:
        """`weights` float32 `[K, C, P]`, `buffers` `[K, C, B]` and `metrics` `[K, E, M]` as in a `Population`, and
        `ok`, bool `[K]`; once `finished`.
        """
        missing = len(self.setup.recipe.checkpoint_epochs) - len(self._checkpoints)  # if all diverged
        rows = self._checkpoints + [self.members.rows()] * missing
        weights, buffers = (np.stack(part, axis=1) for part in zip(*rows, strict=True))
        return {"weights": weights, "buffers": buffers, "metrics": self._metrics, "ok": self.members.training}

    def state(self) -> State:
        """Where the training stands between two steps, to be written at once: the next step changes it."""
        between_epochs = self.step_count % self.setup.steps_per_epoch == 0
        return {
            "step": torch.tensor(self.step_count),
            "members": self.members.state(),
            "optimiser": self._optimiser.state(),
            "dropout": self._masks.state(),
            "streams": self.setup.batches.state() if between_epochs else self._streams,
            "metrics": torch.from_numpy(self._metrics),
            "checkpoints": {
                str(number): {"weights": torch.from_numpy(weights), "buffers": torch.from_numpy(buffers)}
                for number, (weights, buffers) in enumerate(self._checkpoints)
            },
        }

    def _load(self, state: State) -> None:
        self.step_count = int(state["step"])
        self.members.load(state["members"])
        self._optimiser.load(state["optimiser"])
        self._masks.load(state["dropout"])
        self.setup.batches.load(state["streams"])
        done = self.step_count % self.setup.steps_per_epoch
        if done:
            self._streams = state["streams"]
            self._epoch = self.setup.batches.epoch(skip=done)
        self._metrics[:] = state["metrics"].numpy()
        rows = state.get("checkpoints", {})
        self._checkpoints = [
            (rows[str(number)]["weights"].numpy(), rows[str(number)]["buffers"].numpy()) for number in range(len(rows))
        ]
