"""The training engine: K networks of one recipe, trained together, with everything that a zoo stores of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from collect import architectures, unfinished
from collect.calibration import Cut, cut
from collect.data import ImageSet
from collect.members import TensorSpec, layouts
from collect.metrics import METRIC_NAMES
from collect.recipe import Recipe, population_id
from collect.stacked import predict
from collect.training import Setup, Stack
from generators.commandline import Interrupted
from generators.errors import ConfigError

__all__ = ["Population", "TensorSpec", "layouts", "predict", "train"]


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
            was not finite (they may hold NaN); on a GPU, those up to `collect.training.LOOK_ELSEWHERE` steps later.
        buffers: float32 `[K, C, B]`, the running statistics of training and step counters.
        checkpoint_epochs: int64 `[C]`.
        metrics: float32 `[K, E, M]`, NaN for a diverged member from its divergence on. `train_*` is measured on the
            first `CALIBRATION_IMAGES` training images, without augmentation.
        metric_names: M names.
        evaluation_epochs: float64 `[E]`, 0 first.
        evaluation_steps: int64 `[E]`, optimiser steps done.
        seconds: wall time of the whole training.
        stack: most members that were trained together.
        calibration: number of members -> seconds per member and step, as measured before the training; empty if there
            was no need to.
        device: where: "cpu" or the name of the GPU.
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
    stack: int = 0
    calibration: dict[int, float] = field(default_factory=dict)
    device: str = "cpu"


def _as_tensors(result: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in result.items()}


def train(
    recipe: Recipe,
    seeds: Sequence[int],
    images: ImageSet,
    *,
    stack: int | None = None,
    tick: Callable[[float], object] | None = None,
    unfinished_path: Path | None = None,
    save_every: float = unfinished.EVERY,
    device: str | torch.device = "cpu",
) -> Population:
    """Train one network per seed, in stacks of members that are trained together.

    A member's initial weights, order of images, augmentation and dropout depend on its own seed only, all but the first
    not on `recipe.init`. Its stack shows in nothing but the rounding of sums.

    Args:
        recipe: how; `recipe.data` is not loaded, `images` is used.
        seeds: K distinct seeds.
        images: the data.
        stack: most members to train together; None or 0 for as many as are fastest (`collect.calibration`). Stacks are
            trained one after the other.
        tick: called before every step with the share of the training that is done, 0 to 1. What it raises ends the
            training; if that is `Interrupted` or `KeyboardInterrupt`, the training state is saved first.
        unfinished_path: where the training state is saved; if there is one of this training, it goes on from there and
            ends with the same bits as if it had never stopped. Deleting it at last is the caller's task.
        save_every: seconds between two saves.
        device: where to train.

    Raises:
        ConfigError: the recipe does not fit the data, or the seeds repeat.
        UnknownNameError: no such initialiser.
    """
    start = time.perf_counter()
    seeds, device = tuple(int(seed) for seed in seeds), torch.device(device)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"a population needs distinct seeds, at least one; got {list(seeds)}")
    setup = Setup(recipe, images, device=device)
    belongs_to = {
        "population": population_id(recipe, images.digest, seeds), "stack": str(stack or "fastest"),
        "form": setup.form.name, "device": device.type, "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    keeper = unfinished.Keeper(unfinished_path, belongs_to, every=save_every)
    kept = keeper.load()
    if kept:  # another calibration may find another size fastest
        stacks = Cut(tuple(kept["sizes"].tolist()))
    else:
        stacks = cut(setup.form, recipe, len(seeds), stack=stack, shape=setup.shape, device=device)
    ends = itertools.accumulate(stacks.sizes)
    parts = [seeds[end - size : end] for size, end in zip(stacks.sizes, ends, strict=True)]
    start -= float(kept.get("seconds", 0.0))
    finished = list(kept.get("finished", {}).values())
    results = [{name: value.numpy() for name, value in result.items()} for result in finished]
    running = kept.get("running")

    def state() -> unfinished.State:
        return {
            "sizes": torch.tensor(stacks.sizes),
            "seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64),
            "finished": {f"{number:06}": _as_tensors(result) for number, result in enumerate(results)},
            "running": current.state(),
        }

    for part in parts[len(results) :]:
        current, running = Stack(setup, part, state=running), None
        while not current.finished:
            keeper.save_if_due(state)
            if tick is not None:
                try:
                    tick((len(results) + current.progress) / len(parts))
                except (Interrupted, KeyboardInterrupt):  # between two steps, so the state is whole
                    keeper.save(state())
                    raise
            current.step()
        results.append(current.result())
    whole = {name: np.concatenate([result[name] for result in results]) for name in results[0]}
    return Population(
        recipe=recipe,
        seeds=seeds,
        data_digest=images.digest,
        architecture_json=architectures.parse(recipe.architecture).to_json(shape=setup.shape, classes=setup.classes),
        form=setup.form.name,
        status=tuple("ok" if ok else "diverged" for ok in whole["ok"].tolist()),
        layout=setup.layout,
        buffer_layout=setup.buffer_layout,
        weights=whole["weights"],
        buffers=whole["buffers"],
        checkpoint_epochs=np.asarray(recipe.checkpoint_epochs, dtype=np.int64),
        metrics=whole["metrics"],
        metric_names=METRIC_NAMES,
        evaluation_epochs=setup.evaluations,
        evaluation_steps=setup.evaluation_steps,
        seconds=time.perf_counter() - start,
        stack=max(stacks.sizes),
        calibration=stacks.seconds,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )
