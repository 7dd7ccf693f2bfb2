"""What is each initialiser worth in training, and what does it cost? Every registered one, under one protocol.

Studies: a 10-layer MLP without normalisation, as in the usual demonstration of learned scales, from bad starts at one
learning rate; then the MLP and ResNets with and without batch norm, every method at the learning rate that is best on
validation images, all seeds alike. Networks are trained by `collect` into a zoo and read by `train_generators compare`,
which writes a report per study with curves, tests and plots. Methods that need data get the first 512 training images.
What remains is a table and a picture per study, `OUT/DATA/initialisers.md`.

The cost of a method is the time of `generators.init` over that of a training step of one network alone. `counted`
figures are accuracies at a step of the training from which that cost has been taken off, so a method whose cost is 100
steps is compared at step 200 with what it reaches at its step 100.

    python benchmarks/initialisers.py --json F [--quick] [--studies mlp resnet] [--data cifar10.npz] [--out DIR]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from matplotlib import colormaps  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.measuring import cpu_seconds, plain_step, store  # noqa: E402
from collect.architectures import build  # noqa: E402
from collect.data import ImageSet, load  # noqa: E402
from collect.plan import plan, sweep  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.runner import collect  # noqa: E402
from generators import init  # noqa: E402
from generators.commandline import progress, run  # noqa: E402
from generators.initialiser import Kind, list_initialisers, register  # noqa: E402
from generators.inventory import ParameterInfo  # noqa: E402
from generators.pointwise import Pointwise, normal  # noqa: E402
from train_generators.compare import CompareConfig, ComparisonResult  # noqa: E402
from train_generators.compare import run as compare  # noqa: E402
from train_generators.compare.plots import STYLE, png  # noqa: E402

EXPLODING = "he-times-1.5"
INIT_BATCH, INIT_IMAGES = 128, 512  # what `collect` gives to methods that need data
LEARNED = {
    "digits": ("noise-ghn-digits", "noise-ghn-digits+lsuv", "conv-vae-digits"),
    "cifar10": ("noise-ghn-cifar10-long", "noise-ghn-cifar10-long+lsuv"),
}  # published generators by the data that they have seen
START = "he"  # what refining methods begin with, but LSUV, which is used with orthogonal weights as well


def exploding(info: ParameterInfo) -> float:
    """1.5 times He's spread."""
    return 1.5 * float(np.sqrt(2.0 / max(info.fan_in, 1)))


register(EXPLODING, kind=Kind.POINTWISE, summary="1.5 times He's spread: a start that explodes with depth")(
    lambda: Pointwise(EXPLODING, normal(exploding))
)


def methods(data: str) -> tuple[str, ...]:
    """A chain for every registered method that needs no relative and fits networks as they are, and `LEARNED`."""
    chains = []
    for info in list_initialisers():
        if "relative" in info.needs or info.name.startswith("hyperfan") or info.name == EXPLODING:
            continue
        chains.append(f"{START}+{info.name}" if info.kind == Kind.REFINING.value else info.name)
    return (*chains, "orthogonal+lsuv", *LEARNED.get(Path(data).stem, ()))


@dataclass(frozen=True)
class Study:
    """Networks that differ in the initialiser and the learning rate.

    Attributes:
        recipe: what they share.
        inits: chains; none for `methods`.
        rates: learning rates.
        horizons: training steps.
        runs: networks per initialiser and rate.
        left_out: methods that cost more than the study is worth.
    """

    recipe: Recipe
    inits: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    horizons: tuple[int, ...] = (10, 40, 100, 200)
    runs: int = 5
    left_out: tuple[str, ...] = ()

    def starts(self, data: str) -> tuple[str, ...]:
        """The chains of the study on some data."""
        return tuple(chain for chain in self.inits or methods(data) if chain not in self.left_out)


_SHORT = Recipe(batch_size=128, weight_decay=0.0, evaluations_per_epoch=4)
_RESNET = replace(_SHORT, architecture="resnet-20-w8", epochs=10)
_LOW, _HIGH, _HORIZONS = (0.003, 0.01, 0.03), (0.03, 0.1, 0.3), (10, 40, 100)
_DEAR = (f"{START}+metainit",)  # minutes of initialisation per ResNet
_BAD = tuple(
    start + step for start in ("torch", EXPLODING)
    for step in ("", "+lsuv", "+nio", "+gradinit", "+metainit", "+rewire", "+emergence")
)  # fmt: skip
STUDIES: dict[str, Study] = {
    "bad-starts": Study(
        replace(_SHORT, architecture="mlp-10-w64", epochs=5, schedule="constant"), _BAD, (0.01,), (10, 20, 40)
    ),
    "mlp": Study(replace(_SHORT, architecture="mlp-10-w64", epochs=30), rates=(0.003, 0.01, 0.03, 0.1, 0.3)),
    "bare-resnet": Study(replace(_RESNET, architecture="bare-resnet-20-w8"), (), _LOW, _HORIZONS, left_out=_DEAR),
    "resnet": Study(_RESNET, (), _HIGH, _HORIZONS, left_out=_DEAR),
}
QUICK = {
    "bad-starts": replace(STUDIES["bad-starts"], inits=("torch", "torch+lsuv", "torch+nio"), runs=2),
    "mlp": replace(
        STUDIES["mlp"], recipe=replace(_SHORT, architecture="mlp-2-w16", epochs=2), inits=("he", "he+rewire"),
        rates=(0.1,), horizons=(10,), runs=2,
    ),
}  # fmt: skip


# ---- what a method costs


def first_batches(images: ImageSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The data that `collect` gives to initialisers."""
    parts = (images.train.images[:INIT_IMAGES], images.train.labels[:INIT_IMAGES])
    return list(zip(*(part.split(INIT_BATCH) for part in parts), strict=True))


def cost_in_steps(study: Study, images: ImageSet, chain: str) -> float:
    """CPU seconds of `generators.init` in units of a training step."""
    data = first_batches(images)
    model = build(study.recipe.architecture, shape=images.shape, classes=len(images.classes))
    loss, example = nn.functional.cross_entropy, data[0][0][:1]
    filled = partial(init, model, chain, data=data, loss=loss, example_inputs=example)
    filled()
    step = plain_step(model, data[0])
    step()
    return cpu_seconds(filled) / cpu_seconds(step, 5)


# ---- what it is worth


def at_step(steps: np.ndarray, curve: np.ndarray, step: float) -> float:
    """A curve at a step between evaluations, by a straight line; before the first, the first."""
    return float(np.interp(step, steps, curve))


def figures_of(name: str, study: Study, result: ComparisonResult, costs: dict[str, float]) -> dict[str, float]:
    """Flat figures of one study: accuracy, loss, learning rate, cost, and accuracy with the cost counted."""
    figures = {}
    for row in result.rows:
        arm, prefix = row.arm, f"{name}/{row.arm.init}"
        figures |= {f"{prefix}/lr": arm.lr, f"{prefix}/cost_steps": costs[arm.init]}
        figures[f"{prefix}/finished"] = float(arm.finished.sum())
        accuracy, loss = (np.nanmean(arm.metrics[metric], axis=0) for metric in ("test_accuracy", "train_loss"))
        for step in study.horizons:
            figures[f"{prefix}/accuracy_{step}"] = at_step(arm.steps, accuracy, step)
            figures[f"{prefix}/train_loss_{step}"] = at_step(arm.steps, loss, step)
            figures[f"{prefix}/counted_accuracy_{step}"] = at_step(arm.steps, accuracy, max(step - costs[arm.init], 0))
        figures[f"{prefix}/accuracy_end"] = float(np.nanmean(arm.final)) if arm.finished.any() else float("nan")
        figures[f"{prefix}/accuracy_end_std"] = float(np.nanstd(arm.final, ddof=1)) if arm.finished.sum() > 1 else 0.0
    return figures


def records(study: Study, result: ComparisonResult) -> str:
    """Every network that was trained, as CSV: start, learning rate, whether it was chosen, seed, status, figures."""
    head = ["start", "lr", "chosen", "seed", "status"]
    wanted = [(metric, step) for metric in ("test_accuracy", "train_loss") for step in study.horizons]
    lines = [[*head, *(f"{metric}_{step}" for metric, step in wanted), "validation_accuracy_end", "test_accuracy_end"]]
    for row in result.rows:
        for arm in row.choice.tried:
            for number, (seed, status) in enumerate(zip(arm.seeds, arm.status, strict=True)):
                values = [at_step(arm.steps, arm.metrics[metric][number], step) for metric, step in wanted]
                values += [arm.final_validation[number], arm.final[number]]
                facts = [arm.init, f"{arm.lr:g}", str(int(arm is row.arm)), str(seed), status]
                lines.append([*facts, *(f"{value:.4f}" for value in values)])
    return "\n".join(map(",".join, lines)) + "\n"


def by_end(name: str, figures: dict[str, float]) -> list[str]:
    """The chains of a study, the most accurate at the end first."""
    chains = dict.fromkeys(key.split("/")[1] for key in figures if key.startswith(f"{name}/"))
    return sorted(chains, key=lambda chain: -np.nan_to_num(figures[f"{name}/{chain}/accuracy_end"]))


def table(name: str, study: Study, figures: dict[str, float]) -> Table:
    """A row per method, the best at the end first."""
    head = [f"step {step}" for step in study.horizons]
    last = f"step {study.horizons[-1]}, cost counted"
    found = Table("start", "lr", "cost, steps", *head, "end", "finished", last, title=name)
    for chain in by_end(name, figures):
        of = {key: figures[f"{name}/{chain}/{key}"] for key in ("lr", "cost_steps", "accuracy_end", "accuracy_end_std")}
        accuracies = [100 * figures[f"{name}/{chain}/accuracy_{step}"] for step in study.horizons]
        counted = 100 * figures[f"{name}/{chain}/counted_accuracy_{study.horizons[-1]}"]
        found.add_row(
            chain, f"{of['lr']:g}", f"{of['cost_steps']:.1f}", *(f"{value:.1f}" for value in accuracies),
            f"{100 * of['accuracy_end']:.1f} ± {100 * of['accuracy_end_std']:.1f}",
            f"{figures[f'{name}/{chain}/finished']:.0f} of {study.runs}", f"{counted:.1f}",
        )  # fmt: skip
    return found


def picture(name: str, study: Study, figures: dict[str, float]) -> bytes:
    """Accuracy of every method at the horizons and at the end, the best at the end first, as PNG."""
    chains = by_end(name, figures)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(chains)), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(chains))
        for number, step in enumerate((*study.horizons, "end")):
            values = [100 * figures[f"{name}/{chain}/accuracy_{step}"] for chain in chains]
            label = "end" if step == "end" else f"step {step}"
            axes.plot(values, places, "o", markersize=5, color=colormaps["viridis"](number / 5), label=label)
        axes.set_yticks(places, chains)
        axes.invert_yaxis()
        axes.set_xlabel(f"test accuracy, %, {study.recipe.architecture}, mean of {study.runs} seeds")
        figure.legend(loc="outside upper center", ncols=5, fontsize=8)
        return png(figure)


def markdown(names: Sequence[str], known: dict[str, Study], figures: dict[str, float]) -> str:
    """The tables and pictures of some studies."""
    parts = []
    for name in names:
        found = table(name, known[name], figures)
        rows = zip(*(column.cells for column in found.columns), strict=True)
        lines = [" | ".join(str(column.header) for column in found.columns), " | ".join("---" for _ in found.columns)]
        lines += [" | ".join(map(str, row)) for row in rows]
        parts += [f"## {name}", "\n".join(f"| {line} |" for line in lines), f"![accuracies]({name}.png)"]
    return "\n\n".join(parts) + "\n"


def carry_out(name: str, study: Study, data: str, out: Path) -> dict[str, float]:
    """Train the networks of a study, compare them, and take its figures."""
    inits = study.starts(data)
    recipes = sweep(replace(study.recipe, data=data), init=inits, lr=study.rates)
    with progress(f"{name}: {len(inits)} starts", len(recipes) * study.runs) as bar:
        collect(plan(recipes, runs=study.runs), out / "zoo", workers=0, on_progress=bar)
    baseline = START if START in inits else inits[0]
    config = CompareConfig(
        zoo=(out / "zoo",), out=out / "report", baseline=baseline, horizons=study.horizons, shifts=()
    )  # fmt: skip
    result = compare(config, console=Console(quiet=True))
    images = load(data)
    costs = {chain: cost_in_steps(study, images, chain) for chain in inits}
    (out / "records.csv").write_text(records(study, result))
    return figures_of(name, study, result, costs)


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False, studies: tuple[str, ...] = (),
    data: str = "digits", out: Path = Path("runs/initialisers"),
) -> None:  # fmt: skip
    """Compare all initialisers.

    Args:
        json_file: Where the figures go.
        quick: A tiny version that ends within a minute.
        studies: Some of bad-starts, mlp, bare-resnet, resnet; none for all.
        data: The data set, see `collect.data.load`.
        out: Folder of zoos and reports. Given again after a kill, the training goes on.
    """
    known = QUICK if quick else STUDIES
    figures: dict[str, float] = {}
    console = Console(soft_wrap=True)
    names, out = studies or tuple(known), out / ("quick" if quick else Path(data).stem)
    for name in names:
        found = carry_out(name, known[name], data, out / name)
        console.print(table(name, known[name], found))
        (out / f"{name}.png").write_bytes(picture(name, known[name], found))
        figures |= found
    (out / "initialisers.md").write_text(markdown(names, known, figures))
    store(json_file, figures, data=Path(data).stem)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
