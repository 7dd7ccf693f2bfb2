"""Which part of a generated start is it worth training from? The start is taken apart and what is left is trained.

Each dissection is a refining step of its own, registered here, so that "noise-ghn-cifar10-long+rotated" is a chain like
any other; the layers keep their spread. Of a weight read as a matrix W of n outputs with m inputs:

    shuffled         the entries in another order: the histogram is left
    rotated          Q W P with random orthogonal Q, P: the singular values are left
    mixed-outputs    Q W: also which directions of its inputs a layer reads, but not which channel holds what
    permuted-inputs  input channels in another order: filters are whole, layers do not fit each other
    classifier-he    the classifier redrawn by He: the convolutions are left
    body-he          all but the classifier redrawn by He: the classifier is left

A generated classifier is drawn at 1 / sqrt(2) of He's spread, and small classifiers are known to help, so He is also
trained with a small one:

    classifier-torch the classifier redrawn with the spread of torch's default, 1 / sqrt(6) of He's
    classifier-zero  the classifier is zero

One network per start and seed, the same seeds and images for all.

    python benchmarks/anatomy.py --json anatomy.json --data data/cifar10.npz [--quick] [--out runs/anatomy]

Leaves the zoo, a table (`anatomy.md`) and a picture of the curves in --out; given again, it goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.curves import RECIPE, curves, figures, picture, table  # noqa: E402
from benchmarks.measuring import store  # noqa: E402
from collect.plan import plan  # noqa: E402
from collect.runner import collect  # noqa: E402
from generators.commandline import progress, run  # noqa: E402
from generators.errors import unknown_name  # noqa: E402
from generators.initialiser import Kind, Proposal, Request, register  # noqa: E402
from generators.inventory import ParameterInfo  # noqa: E402
from generators.refining.stored import matrices, outputs_first  # noqa: E402
from generators.seeds import stream  # noqa: E402


def orthogonal(size: int, draw: torch.Generator) -> Tensor:
    """`[size, size]`, uniform over rotations and reflections."""
    return nn.init.orthogonal_(torch.empty(size, size), generator=draw)


def _from_matrix(matrix: Tensor, value: Tensor, info: ParameterInfo) -> Tensor:
    """`matrix` in the form in which `value` is stored, the inverse of `matrices`."""
    rows = outputs_first(value, info)
    return outputs_first(matrix.reshape(rows.shape), info)


def shuffled(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """The histogram is left."""
    return value.flatten()[torch.randperm(value.numel(), generator=draw)].view_as(value)


def rotated(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """The singular values are left."""
    matrix = matrices(value, info)
    left, right = (orthogonal(size, draw) for size in matrix.shape[1:])
    return _from_matrix(left @ matrix @ right, value, info)


def mixed_outputs(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """The singular values and the directions of the inputs are left."""
    matrix = matrices(value, info)
    return _from_matrix(orthogonal(matrix.shape[1], draw) @ matrix, value, info)


def permuted_inputs(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """Every filter is left, but reads other channels."""
    rows = outputs_first(value, info)
    return outputs_first(rows[:, torch.randperm(rows.shape[1], generator=draw)], info)


def redrawn(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """Nothing is left: He's."""
    return torch.randn(value.shape, generator=draw) * (2 / info.fan_in) ** 0.5


def redrawn_small(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """Nothing is left: the spread of torch's default."""
    return redrawn(value, info, draw) / 6**0.5


def zeroed(value: Tensor, info: ParameterInfo, draw: torch.Generator) -> Tensor:
    """Nothing is left: zero."""
    return torch.zeros_like(value)


@dataclass(frozen=True)
class Dissection:
    """A refining step that replaces the weights of layers.

    Attributes:
        name: what chains call it.
        replace: value, its facts and a stream of random numbers to the new value.
        layers: which ones.
    """

    name: str
    replace: Callable[[Tensor, ParameterInfo, torch.Generator], Tensor]
    layers: Callable[[ParameterInfo], bool] = lambda info: True
    kind = Kind.REFINING

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """New values for every chosen weight of two or more axes."""
        values = {}
        for name, parameter in model.named_parameters():
            info = request.inventory[name]
            if parameter.ndim > 1 and self.layers(info):
                draw = stream(request.seed, "anatomy", self.name, request.member, name)
                values[name] = self.replace(parameter.detach(), info, draw)
        return Proposal(values, dict.fromkeys(values, self.name))


DISSECTIONS = (
    Dissection("shuffled", shuffled),
    Dissection("rotated", rotated),
    Dissection("mixed-outputs", mixed_outputs),
    Dissection("permuted-inputs", permuted_inputs),
    Dissection("classifier-he", redrawn, lambda info: info.output),
    Dissection("body-he", redrawn, lambda info: not info.output),
)
CONTROLS = (
    Dissection("classifier-torch", redrawn_small, lambda info: info.output),
    Dissection("classifier-zero", zeroed, lambda info: info.output),
)
for _dissection in (*DISSECTIONS, *CONTROLS):
    register(_dissection.name, kind=Kind.REFINING, summary=str(_dissection.replace.__doc__))(
        lambda found=_dissection: found
    )

ARCHITECTURE = "resnet-20-w16"


def benchmark(
    *,
    json_file: Annotated[Path, tyro.conf.arg(name="json")],
    data: str = "cifar10",
    start: str = "noise-ghn-cifar10-long",
    lr: float = 0.1,
    he_lr: float = 0.05,
    runs: int = 3,
    first_seed: int = 3,
    epochs: int = RECIPE.epochs,
    only: tuple[str, ...] = (),
    workers: int = 0,
    quick: bool = False,
    out: Path = Path("runs/anatomy"),
) -> None:
    """Take a generated start apart and train from what is left.

    Args:
        json_file: Where the figures go.
        data: Data set, or the path of an .npz.
        start: The generator.
        lr: Learning rate of all starts.
        he_lr: He, with each classifier, is also trained at this one, its best.
        runs: Networks per start.
        first_seed: Seed of the first of them.
        epochs: Passes over the images.
        only: Only these starts, such as he he+classifier-torch; none for all.
        workers: Processes; 0 trains in this one.
        quick: A tiny version on the digits that means nothing.
        out: Folder of zoo, table and picture.
    """
    recipe = replace(RECIPE, architecture=ARCHITECTURE, data=data, epochs=epochs)
    if quick:
        recipe = replace(recipe, data="digits", architecture="resnet-8-w4", augmentation="none", evaluation_steps=())
    by_he = ["he", *(f"he+{control.name}" for control in CONTROLS)]
    chains = [start, *(f"{start}+{dissection.name}" for dissection in DISSECTIONS)]
    recipes = [replace(recipe, init=chain, lr=lr) for chain in (*chains, *by_he)]
    recipes += [replace(recipe, init=chain, lr=he_lr) for chain in by_he if he_lr != lr]
    if unknown := set(only) - {each.init for each in recipes}:
        raise unknown_name("start", min(unknown), [each.init for each in recipes])
    recipes = [each for each in recipes if not only or each.init in only]
    with progress("training from what is left", len(recipes) * runs) as bar:
        collect(plan(recipes, runs=runs, first_seed=first_seed), out / "zoo", workers=workers, on_progress=bar)
    found = curves(out / "zoo", recipes)
    (out / "anatomy.md").write_text(table(found))
    (out / "anatomy.png").write_bytes(picture(found))
    store(json_file, figures(found), start=start, runs=runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
