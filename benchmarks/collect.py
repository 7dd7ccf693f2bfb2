"""How fast are networks trained? The engine beside a plain loop of `torch.nn` and `torch.optim`, in turns.

Tiny networks: the Small CNN Zoo's (4,970 weights) and one of each other family on the 8x8 digits, in stacks that a
calibration chooses. Both sides initialise, train, schedule the learning rate and measure three parts of the data after
every epoch. ResNet-20: training steps on 32x32 images with random crops and mirrors, single precision against bfloat16
and compiled.

    python benchmarks/collect.py --json collect.json [--quick]

Prints a table and writes its figures as flat JSON with machine, versions and commit. Times are CPU seconds of one
thread; ratios are taken within a round of both sides, and the median over rounds is given.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import generators  # noqa: E402
from benchmarks.measuring import cpu_seconds, store  # noqa: E402
from collect import architectures, training  # noqa: E402
from collect.data import ImageSet, Split, load  # noqa: E402
from collect.memory import keep_freed_memory  # noqa: E402
from collect.population import Population, train  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.stacked import CALIBRATION_IMAGES  # noqa: E402
from generators.commandline import run  # noqa: E402

MAIN = "cnn-3-w16"
OTHERS = ("resnet-8-w4", "vgg-3-w8", "mobilenet-6-w8", "mlp-2-w32", "vit-2-w16")
RESNET = Recipe(architecture="resnet-20-w16", batch_size=128, augmentation="flip-crop")
VARIANTS = {
    "channels-last": ("float32", False),
    "channels-last + compile": ("float32", True),
    "channels-last + bfloat16": ("bfloat16", False),
    "channels-last + bfloat16 + compile": ("bfloat16", True),
}


@dataclass(frozen=True)
class Size:
    """How much is run: rounds; epochs and networks of the main tiny network and of the others; steps of ResNet-20."""

    rounds: int = 7
    epochs: int = 20
    others: tuple[str, ...] = OTHERS
    other_epochs: int = 4
    networks: int = 64
    steps: int = 4
    variants: tuple[str, ...] = tuple(VARIANTS)


QUICK = Size(rounds=3, epochs=2, others=OTHERS[:1], other_epochs=1, networks=32, steps=1, variants=tuple(VARIANTS)[2:3])


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# --- the plain loop ----------------------------------------------------------------------------------------------


def plain_model(recipe: Recipe, images: ImageSet, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = architectures.build(recipe.architecture, shape=images.shape, classes=len(images.classes))
    generators.init(model, recipe.init, seed=seed)
    return model, torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def plain_step(model: nn.Module, optimiser: torch.optim.Optimizer, pictures: Tensor, labels: Tensor) -> None:
    loss = F.cross_entropy(model(pictures), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


@torch.no_grad()
def plain_measure(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> float:
    """Loss and accuracy of every part; returns the last accuracy."""
    model.eval()
    for pictures, labels in parts:
        logits = model(pictures)
        F.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
    model.train()
    return accuracy


def plain_network(recipe: Recipe, images: ImageSet, seed: int) -> float:
    """Train one network; its test accuracy."""
    model, optimiser = plain_model(recipe, images, seed)
    pictures, labels = images.train.images, images.train.labels
    steps = len(labels) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * steps)
    first = pictures[:CALIBRATION_IMAGES], labels[:CALIBRATION_IMAGES]
    parts = [first, *((part.images, part.labels) for part in (images.validation, images.test))]
    generator = torch.Generator().manual_seed(seed)
    accuracy = plain_measure(model, parts)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(recipe.batch_size)[:steps]:
            plain_step(model, optimiser, pictures[batch], labels[batch])
            schedule.step()
        accuracy = plain_measure(model, parts)
    return accuracy


def crop_and_mirror(pictures: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """The usual augmentation of CIFAR, image by image in slices."""
    padded = F.pad(pictures, (margin,) * 4)
    corners = torch.randint(2 * margin + 1, (len(pictures), 2), generator=generator).tolist()
    height, width = pictures.shape[2:]
    moved = [each[:, y : y + height, x : x + width] for each, (y, x) in zip(padded, corners, strict=True)]
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], torch.stack(moved).flip(3), torch.stack(moved))


# --- tiny networks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """One architecture: CPU seconds per network on both sides, by round, and the test accuracies they reach."""

    plain: list[float]
    ours: list[float]
    stack: int
    plain_accuracy: list[float]
    our_accuracy: list[float]

    @property
    def speedup(self) -> float:
        return median_ratio(self.plain, self.ours)


def tiny(recipe: Recipe, images: ImageSet, *, rounds: int, networks: int) -> Tiny:
    """Both sides in turns; a first round, for calibration and caches, does not count."""
    plain, ours, accuracies, populations = list[float](), list[float](), list[float](), list[Population]()
    for number in range(rounds + 1):
        plain.append(cpu_seconds(lambda seed=number: accuracies.append(plain_network(recipe, images, seed))))
        seeds = range(number * networks, (number + 1) * networks)
        ours.append(cpu_seconds(lambda seeds=seeds: populations.append(train(recipe, seeds, images))) / networks)
    column = populations[0].metric_names.index("test_accuracy")
    reached = [float(each) for population in populations for each in population.metrics[:, -1, column]]
    return Tiny(plain[1:], ours[1:], populations[-1].stack, accuracies, reached)


# --- ResNet-20 ---------------------------------------------------------------------------------------------------


def noise_images(count: int) -> ImageSet:
    """Images of CIFAR's shape with nothing on them: speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    part = Split(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10)
    few = Split(part.images[:10], part.labels[:10])
    return replace(
        load("digits"), name="noise", train=part, validation=few, test=few, shape=(3, 32, 32), mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )  # fmt: skip


def our_steps(precision: str, compiled: bool, images: ImageSet, steps: int) -> Callable[[], None]:
    """A function that makes `steps` training steps of one network with the engine; all of them within an epoch."""
    recipe = replace(RESNET, precision=precision)
    threshold, training.COMPILED_FROM = training.COMPILED_FROM, 0 if compiled else float("inf")
    stack = training.Stack(training.Setup(recipe, images, device=torch.device("cpu")), [0])
    training.COMPILED_FROM = threshold

    def work() -> None:
        for _ in range(steps):
            stack.step()

    return work


def plain_steps(images: ImageSet, steps: int) -> Callable[[], None]:
    model, optimiser = plain_model(RESNET, images, 0)
    generator = torch.Generator().manual_seed(0)

    def work() -> None:
        for _ in range(steps):
            batch = torch.randint(len(images.train), (RESNET.batch_size,), generator=generator)
            pictures = crop_and_mirror(images.train.images[batch], generator)
            plain_step(model, optimiser, pictures, images.train.labels[batch])

    return work


def resnet20(size: Size) -> dict[str, list[float]]:
    """CPU seconds per step by round, of the plain loop and of every variant, in turns; the first two do not count."""
    rounds = size.rounds + 2
    images = noise_images(RESNET.batch_size * (rounds * size.steps + 1))
    sides = {"plain": plain_steps(images, size.steps)}
    sides |= {name: our_steps(*VARIANTS[name], images, size.steps) for name in size.variants}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(cpu_seconds(work) / size.steps)
    return {name: each[2:] for name, each in seconds.items()}


# --- figures -----------------------------------------------------------------------------------------------------


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Time the engine against a plain loop.

    Args:
        json_file: Where the figures go.
        quick: A tiny version that ends within a minute; it compiles nothing.
    """
    size = QUICK if quick else Size()
    keep_freed_memory()  # as every collection does; the plain loop gains from it too
    digits = load("digits")
    figures: dict[str, float | str | int | None] = {"rounds": size.rounds, "tiny_epochs": size.epochs}
    table = Table("network", "plain, CPU s", "ours, CPU s", "speed-up", "spread over rounds", "stack")
    for name in (MAIN, *size.others):
        recipe = Recipe(architecture=name, epochs=size.epochs if name == MAIN else size.other_epochs)
        found = tiny(recipe, digits, rounds=size.rounds, networks=size.networks)
        ratios = [a / b for a, b in zip(found.plain, found.ours, strict=True)]
        plain, ours = statistics.median(found.plain), statistics.median(found.ours)
        suffix = "" if name == MAIN else f"_{name}"
        figures |= {
            f"tiny_speedup{suffix}": found.speedup, f"tiny_speedup_lowest{suffix}": min(ratios),
            f"tiny_speedup_highest{suffix}": max(ratios), f"tiny_k{suffix}": found.stack,
        }  # fmt: skip
        if name == MAIN:
            figures |= {
                "tiny_nets_per_core_minute": 60 / ours, "plain_nets_per_core_minute": 60 / plain,
                "tiny_accuracy": statistics.mean(found.our_accuracy),
                "tiny_accuracy_std": statistics.stdev(found.our_accuracy),
                "plain_accuracy": statistics.mean(found.plain_accuracy),
                "plain_accuracy_std": statistics.stdev(found.plain_accuracy),
            }  # fmt: skip
        table.add_row(
            f"{name}, {recipe.epochs} epochs", f"{plain:.3f}", f"{ours:.3f}", f"{found.speedup:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}", str(found.stack),
        )  # fmt: skip
    seconds = resnet20(size)
    for name in size.variants:
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        suffix = "_".join(name.replace("-", "_").split(" + "))
        figures |= {
            f"resnet20_speedup_{suffix}": statistics.median(ratios), f"resnet20_speedup_lowest_{suffix}": min(ratios),
            f"resnet20_speedup_highest_{suffix}": max(ratios),
        }  # fmt: skip
        table.add_row(
            f"resnet-20, a step, {name}", f"{statistics.median(seconds['plain']):.3f}",
            f"{statistics.median(seconds[name]):.3f}", f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}", "1",
        )  # fmt: skip
    figures["resnet20_speedup"] = median_ratio(seconds["plain"], seconds[size.variants[-1]])
    Console(soft_wrap=True).print(table)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
