"""What is each initialiser worth in training, and what does it cost? Every registered one, under one protocol.

Studies: a 10-layer MLP without normalisation, as in the usual demonstration of learned scales, from bad starts at one
learning rate; then the MLP and ResNets with and without batch norm, every method at the learning rate that is best on
validation images, all seeds alike. Networks are trained by `collect` into a zoo and read by `train_generators compare`,
which writes a report per study with curves, tests and plots. Methods that need data get the first 512 training images.
What remains is a table and a picture per study, `OUT/DATA/initialisers.md`. The `short` studies, for larger images, are
the first hundred steps of a training: each image is seen once. There a rate is chosen on a network of its own.

The cost of a method is the time of `generators.init` over that of a training step of one network alone. `counted`
figures are accuracies at a step of the training from which that cost has been taken off, so a method whose cost is 100
steps is compared at step 200 with what it reaches at its step 100.

    python benchmarks/initialisers.py --json F [--quick] [--studies mlp resnet] [--out DIR]
    python benchmarks/initialisers.py --json F --studies short-resnet short-bare-resnet --data cifar10.npz [--out DIR]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
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

from benchmarks.initialiser_studies import EXPLODING, QUICK, START, STUDIES, TESTED, Study  # noqa: E402
from benchmarks.measuring import cpu_seconds, plain_step, store  # noqa: E402
from collect.architectures import build  # noqa: E402
from collect.data import ImageSet, load  # noqa: E402
from collect.plan import plan, sweep  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.runner import collect  # noqa: E402
from collect.sources import npz  # noqa: E402
from collect.zoo import Zoo  # noqa: E402
from generators import grad_cosine, init  # noqa: E402
from generators.commandline import progress, run  # noqa: E402
from generators.errors import ModelError  # noqa: E402
from generators.initialiser import Kind, register  # noqa: E402
from generators.inventory import ParameterInfo  # noqa: E402
from generators.pointwise import Pointwise, normal  # noqa: E402
from train_generators.compare import CompareConfig, ComparisonResult  # noqa: E402
from train_generators.compare import run as compare  # noqa: E402
from train_generators.compare.curves import Arm, Choice, choose_rates, read_arms  # noqa: E402
from train_generators.compare.plots import STYLE, png  # noqa: E402

INIT_BATCH, INIT_IMAGES = 128, 512  # what `collect` gives to methods that need data
TUNING_SEED = 1000  # of the first network that rates are chosen on


Before = dict[str, dict[str, float]]
"""Figures of a start before any training, by its name."""


def exploding(info: ParameterInfo) -> float:
    """1.5 times He's spread."""
    return 1.5 * float(np.sqrt(2.0 / max(info.fan_in, 1)))


register(EXPLODING, kind=Kind.POINTWISE, summary="1.5 times He's spread: a start that explodes with depth")(
    lambda: Pointwise(EXPLODING, normal(exploding))
)


# ---- what a start costs, and its gradients


def first_batches(images: ImageSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The data that `collect` gives to initialisers."""
    parts = (images.train.images[:INIT_IMAGES], images.train.labels[:INIT_IMAGES])
    return list(zip(*(part.split(INIT_BATCH) for part in parts), strict=True))


def at_start(study: Study, images: ImageSet, start: str) -> dict[str, float]:
    """CPU seconds of `generators.init` in units of a training step, and GradCosine and gradient norm of one draw of it
    on the batches that initialisers see; NaN where the network has no finite loss.
    """
    data, loss = first_batches(images), nn.functional.cross_entropy
    model = build(study.recipe.architecture, shape=images.shape, classes=len(images.classes))
    filled = partial(init, model, start, data=data, loss=loss, example_inputs=data[0][0][:1])
    filled()
    try:
        found = grad_cosine(model, data, loss)
        figures = {"grad_cosine": found.cosine, "gradient_norm": found.gradient_norm}
    except ModelError:
        figures = {"grad_cosine": float("nan"), "gradient_norm": float("nan")}
    step = plain_step(model, data[0])
    step()
    return figures | {"cost_steps": cpu_seconds(filled) / cpu_seconds(step, 5)}


# ---- what it is worth


def at_step(steps: np.ndarray, curve: np.ndarray, step: float) -> float:
    """A curve at a step between evaluations, by a straight line; before the first, the first."""
    return float(np.interp(step, steps, curve))


def figures_of(name: str, study: Study, result: ComparisonResult, before: Before) -> dict[str, float]:
    """Flat figures of one study: accuracy, loss, learning rate, those `before` training, and with the cost counted."""
    figures = {}
    for row in result.rows:
        arm, prefix = row.arm, f"{name}/{row.arm.init}"
        cost = before[arm.init]["cost_steps"]
        figures |= {f"{prefix}/{key}": value for key, value in ({"lr": arm.lr} | before[arm.init]).items()}
        figures[f"{prefix}/finished"] = float(arm.finished.sum())
        accuracy, loss = (np.nanmean(arm.metrics[metric], axis=0) for metric in ("test_accuracy", "train_loss"))
        for step in study.horizons:
            figures[f"{prefix}/accuracy_{step}"] = at_step(arm.steps, accuracy, step)
            figures[f"{prefix}/train_loss_{step}"] = at_step(arm.steps, loss, step)
            figures[f"{prefix}/counted_accuracy_{step}"] = at_step(arm.steps, accuracy, max(step - cost, 0))
        figures[f"{prefix}/accuracy_end"] = float(np.nanmean(arm.final)) if arm.finished.any() else float("nan")
        figures[f"{prefix}/accuracy_end_std"] = float(np.nanstd(arm.final, ddof=1)) if arm.finished.sum() > 1 else 0.0
    return figures


def records(study: Study, choices: Sequence[Choice], chosen: Sequence[Arm]) -> str:
    """Every network that was trained, as CSV: start, learning rate, whether it is compared, seed, status, figures."""
    head = ["start", "lr", "chosen", "seed", "status"]
    wanted = [(metric, step) for metric in ("test_accuracy", "train_loss") for step in study.horizons]
    lines = [[*head, *(f"{metric}_{step}" for metric, step in wanted), "validation_accuracy_end", "test_accuracy_end"]]
    for arm in (arm for choice in choices for arm in choice.tried):
        compared = str(int(any(arm is other for other in chosen)))
        for number, (seed, status) in enumerate(zip(arm.seeds, arm.status, strict=True)):
            values = [at_step(arm.steps, arm.metrics[metric][number], step) for metric, step in wanted]
            values += [arm.final_validation[number], arm.final[number]]
            facts = [arm.init, f"{arm.lr:g}", compared, str(seed), status]
            lines.append([*facts, *(f"{value:.4f}" for value in values)])
    return "\n".join(map(",".join, lines)) + "\n"


def by_end(name: str, figures: dict[str, float]) -> list[str]:
    """The chains of a study, the most accurate at the end first."""
    chains = dict.fromkeys(key.split("/")[1] for key in figures if key.startswith(f"{name}/"))
    return sorted(chains, key=lambda chain: -np.nan_to_num(figures[f"{name}/{chain}/accuracy_end"]))


def table(name: str, study: Study, figures: dict[str, float]) -> Table:
    """A row per method, the best at the end first."""
    last = study.horizons[-1]
    head = ["start", "lr", "cost, steps", "GradCosine", "gradient norm", *(f"step {step}" for step in study.horizons)]
    found = Table(*head, "end", "finished", f"training loss, step {last}", f"step {last}, cost counted", title=name)
    for start in by_end(name, figures):
        of = {key.split("/")[2]: value for key, value in figures.items() if key.startswith(f"{name}/{start}/")}
        found.add_row(
            start, f"{of['lr']:g}", f"{of['cost_steps']:.1f}", f"{of['grad_cosine']:.2f}", f"{of['gradient_norm']:.3g}",
            *(f"{100 * of[f'accuracy_{step}']:.1f}" for step in study.horizons),
            f"{100 * of['accuracy_end']:.1f} ± {100 * of['accuracy_end_std']:.1f}",
            f"{of['finished']:.0f} of {study.runs}", f"{of[f'train_loss_{last}']:.2f}",
            f"{100 * of[f'counted_accuracy_{last}']:.1f}",
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


def first_images(path: Path, count: int, out: Path) -> Path:
    """An .npz in `out`, of the name of `path`, with its first `count` training and at most `TESTED` test images."""
    raw, tested = npz(path), min(count, TESTED)
    out.mkdir(parents=True, exist_ok=True)
    arrays = {"x_train": raw.x_train[:count], "y_train": raw.y_train[:count]}
    arrays |= {"x_test": raw.x_test[:tested], "y_test": raw.y_test[:tested]}
    np.savez(out / path.name, classes=np.array(raw.classes), **arrays)
    return out / path.name


def train(name: str, study: Study, recipes: Sequence[Recipe], runs: int, zoo: Path, first_seed: int = 0) -> None:
    """Collect some networks of every recipe."""
    with progress(f"{name}: {len(recipes)} recipes", len(recipes) * runs) as bar:
        collect(plan(recipes, runs=runs, first_seed=first_seed), zoo, workers=0, on_progress=bar)


def tuned(zoo: Path, baseline: str, images: ImageSet) -> list[Choice]:
    """The learning rates that are best on the validation images in a zoo."""
    return choose_rates(read_arms(Zoo(zoo).populations, baseline=baseline)[0], classes=len(images.classes))


def carry_out(name: str, study: Study, data: str, out: Path) -> dict[str, float]:
    """Train the networks of a study, compare them, and take its figures."""
    inits = study.starts(data)
    if study.images:
        data = str(first_images(Path(data), study.images, out / "data"))
    images, baseline = load(data), START if START in inits else inits[0]
    recipes, choices = sweep(replace(study.recipe, data=data), init=inits, lr=study.rates), []
    if study.tuning_runs:
        train(f"{name}, rates", study, recipes, study.tuning_runs, out / "tuning", TUNING_SEED)
        choices = tuned(out / "tuning", baseline, images)
        best = {(choice.arm.init, choice.arm.lr) for choice in choices}
        recipes = [recipe for recipe in recipes if (recipe.init, recipe.lr) in best]
    train(name, study, recipes, study.runs, out / "zoo")
    config = CompareConfig(
        zoo=(out / "zoo",), out=out / "report", baseline=baseline, horizons=study.horizons, shifts=()
    )  # fmt: skip
    result = compare(config, console=Console(quiet=True))
    before = {start: at_start(study, images, start) for start in inits}
    choices += [row.choice for row in result.rows]
    (out / "records.csv").write_text(records(study, choices, [row.arm for row in result.rows]))
    return figures_of(name, study, result, before)


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False, studies: tuple[str, ...] = (),
    data: str = "digits", out: Path = Path("runs/initialisers"),
) -> None:  # fmt: skip
    """Compare all initialisers.

    Args:
        json_file: Where the figures go.
        quick: A tiny version that ends within a minute.
        studies: Some of bad-starts, mlp, bare-resnet, resnet, short-bare-resnet, short-resnet; none for all that take
            all images.
        data: The data set, see `collect.data.load`; an .npz for the short studies.
        out: Folder of zoos and reports. Given again after a kill, the training goes on.
    """
    known = QUICK if quick else STUDIES
    figures: dict[str, float] = {}
    console = Console(soft_wrap=True)
    names = studies or tuple(name for name, study in known.items() if not study.images)
    out = out / ("quick" if quick else Path(data).stem)
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
