"""The studies of `benchmarks/initialisers.py`: which starts, on which networks, at which learning rates, how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from collect.recipe import Recipe
from generators.initialiser import Kind, list_initialisers

EXPLODING = "he-times-1.5"  # registered by the benchmark
TESTED = 1000  # test images of a study on a part of the images
LEARNED = {
    "digits": ("noise-ghn-digits", "noise-ghn-digits+lsuv", "conv-vae-digits"),
    "cifar10": ("noise-ghn-cifar10-long", "noise-ghn-cifar10-long+lsuv"),
}  # published generators by the data that they have seen
START = "he"  # what refining methods begin with, but LSUV, which is used with orthogonal weights as well


def methods(data: str) -> tuple[str, ...]:
    """A chain for every registered method that needs no relative and fits networks as they are, and `LEARNED`."""
    chains = []
    for info in list_initialisers():
        if {"relative", "checkpoint"} & set(info.needs) or info.name.startswith("hyperfan") or info.name == EXPLODING:
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
        left_out: methods that cost more than they would tell.
        tuning_runs: networks per initialiser and rate on which rates are chosen, and which are not compared; 0 to
            choose on those that are.
        images: the first images for training and validation that are taken from an .npz, 0 for all; with as many of
            the first test images, at most `TESTED`.
    """

    recipe: Recipe
    inits: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    horizons: tuple[int, ...] = (10, 40, 100, 200)
    runs: int = 5
    left_out: tuple[str, ...] = ()
    tuning_runs: int = 0
    images: int = 0

    def starts(self, data: str) -> tuple[str, ...]:
        """The chains of the study on some data."""
        return tuple(chain for chain in self.inits or methods(data) if chain not in self.left_out)


_SHORT = Recipe(batch_size=128, weight_decay=0.0, evaluations_per_epoch=4)
_RESNET = replace(_SHORT, architecture="resnet-20-w8", epochs=10)
_LOW, _HIGH, _HORIZONS = (0.003, 0.01, 0.03), (0.03, 0.1, 0.3), (10, 40, 100)
_DEAR = (f"{START}+metainit",)  # minutes of initialisation per ResNet
_TWINS = ("he-uniform", "he-out-uniform", "lecun-uniform", "xavier-uniform", "he-truncated", f"{START}+mimetic")
_FEW = replace(
    _RESNET, batch_size=64, epochs=1, evaluations_per_epoch=1, evaluation_steps=(10, 40), precision="bfloat16"
)  # fmt: skip
_PART = Study(
    _FEW, (), _HIGH, _HORIZONS, left_out=(*_DEAR, f"{START}+gradinit", *_TWINS), tuning_runs=1,
    images=7112,  # a tenth is for validation, the rest are a hundred batches
)  # fmt: skip
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
    "short-bare-resnet": replace(_PART, recipe=replace(_FEW, architecture="bare-resnet-20-w8"), rates=_LOW),
    "short-resnet": _PART,
}
QUICK = {
    "bad-starts": replace(STUDIES["bad-starts"], inits=("torch", "torch+lsuv", "torch+nio"), runs=2),
    "mlp": replace(
        STUDIES["mlp"], recipe=replace(_SHORT, architecture="mlp-2-w16", epochs=2), inits=("he", "he+rewire"),
        rates=(0.1,), horizons=(10,), runs=2,
    ),
}  # fmt: skip
