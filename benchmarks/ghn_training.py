"""What a training step of a graph hypernetwork costs, how much of it is the GHN, and all of it beside GHN-3's.

A step generates each of a meta-batch of small networks, runs a batch of images through it and back, and goes on into
the GHN. Each side has a process of its own: CPU seconds of one thread, medians of rounds, and the rise of the peak
memory over what lay there before the first step. Graphs are made beforehand on both sides; optimisers are left out.

    python benchmarks/ghn_training.py --json training.json [--quick] [--peer DIR] [--architectures ...]

Ours is the noise GHN that `train_generators noise-ghn` trains by default, in steps of `train_generators.ghn_step`.
GHN-3 is run as its own trainer runs it: one padded batch of graphs, all networks forward, one pass back. DIR is a
clone of https://github.com/SamsungSAILMontreal/ghn3, which needs ppuda and what that needs. Memory: /proc (Linux).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.measuring import Peak, in_process, show, store  # noqa: E402
from collect.architectures import build  # noqa: E402
from collect.data import ImageSet, load  # noqa: E402
from generators.commandline import run  # noqa: E402
from generators.ghn.ghn import GHN  # noqa: E402
from generators.seeds import isolated, stream  # noqa: E402
from train_generators.ghn_config import NOISE  # noqa: E402
from train_generators.ghn_step import Unit, at_once, generate, pass_back, unit_loss  # noqa: E402
from train_generators.subject import ImageStream, Subject  # noqa: E402

META_BATCH = (
    "resnet-20-w16", "resnet-14-w16", "resnet-32-w8", "resnet-26-w12", "vgg-6-w16", "vgg-4-w32", "mobilenet-5-w16",
    "vit-4-w48",
)  # fmt: skip
QUICK = META_BATCH[:2]
BATCH, SIDE = 64, 32
PEER_SHAPE: dict[str, Any] = dict(
    max_shape=(64, 64, 16, 16), hid=64, heads=8, layers=3, weight_norm=True, ve=True, layernorm=True
)  # GHN-3-T

Step = Callable[[int], float]
"""One training step, by its number; returns the CPU seconds of it that are known to be the GHN's, NaN if none are."""


def images() -> ImageSet:
    """Digits as colour images of 32 x 32: the shape of CIFAR counts here, not what they show."""
    digits = load("digits")

    def grown(part: Any) -> Any:
        small = part.images.expand(-1, 3, -1, -1)
        return replace(part, images=nn.functional.interpolate(small.float(), size=(SIDE, SIDE)).to(small))

    parts = {name: grown(getattr(digits, name)) for name in ("train", "validation", "test")}
    return replace(digits, shape=(3, SIDE, SIDE), **parts)


def our_step(names: tuple[str, ...], data: ImageSet) -> Step:
    """A noise GHN of ours over `names`, with all of its noise."""
    ghn = GHN(replace(NOISE.ghn, classes=len(data.classes)))
    subjects = {number: Subject(name, ghn, data, draws=NOISE.draws) for number, name in enumerate(names)}
    source = ImageStream(data, batch_size=BATCH, augmentation="none", seed=0)

    def step(turn: int) -> float:
        own = 0.0
        for taken in at_once(subjects, NOISE.draws):
            units = [Unit(number, subject, stream(0, "benchmark", turn, number)) for number, subject in taken.items()]
            begun = time.process_time()
            codes = [torch.randn(NOISE.draws, u.subject.codes, ghn.config.code, generator=u.draw) for u in units]
            decoded = generate(ghn, units, codes, ghn.config.anchor)
            own += time.process_time() - begun
            leaves = [{name: value.detach().requires_grad_() for name, value in each.items()} for each in decoded]
            for unit, weights in zip(units, leaves, strict=True):
                unit_loss(unit, weights, NOISE, source, turn)[0].backward()
            begun = time.process_time()
            pass_back(decoded, leaves)
            own += time.process_time() - begun
        ghn.zero_grad()
        return own

    return step


def peer_step(folder: Path, names: tuple[str, ...], data: ImageSet) -> Step:
    """GHN-3 of `folder` over the same networks."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(sys.stderr):
        from ghn3.graph import Graph, GraphBatch
        from ghn3.nn import GHN3
    ghn = GHN3(num_classes=len(data.classes), **PEER_SHAPE).train()
    ghn.debug_level = 0
    models = [build(name, shape=data.shape, classes=len(data.classes)).train() for name in names]
    for model in models:
        model.expected_input_sz = SIDE  # type: ignore[assignment]
    with isolated(0, "benchmark"):
        graphs = GraphBatch([Graph(model, ve_cutoff=50) for model in models], dense=ghn.is_dense())
    source = ImageStream(data, batch_size=BATCH, augmentation="none", seed=0)

    def step(turn: int) -> float:
        pictures, labels = source.batch(turn)
        filled = ghn(models, graphs, keep_grads=True)
        sum(nn.functional.cross_entropy(model(pictures), labels) for model in filled).backward()  # type: ignore[union-attr]
        ghn.zero_grad()
        return float("nan")

    return step


def one_side(side: str, rounds: int, names: tuple[str, ...]) -> dict[str, float]:
    """The figures of `ours` or of the peer in a folder."""
    torch.set_num_threads(1)
    data = images()
    step = our_step(names, data) if side == "ours" else peer_step(Path(side), names, data)
    peak = Peak()
    seconds, shares = [], []
    for turn in range(rounds + 1):
        start = time.process_time()
        own = step(turn)
        seconds.append(time.process_time() - start)
        shares.append(own / seconds[-1])
    figures = {"train_step_s": statistics.median(seconds[1:]), "train_peak_bytes": peak.rise()}
    return figures | ({"train_ghn_share": statistics.median(shares[1:])} if side == "ours" else {})


def measure_all(names: tuple[str, ...], rounds: int, folder: Path | None) -> dict[str, float]:
    """All figures, and those of ours in units of the peer's."""
    figures = in_process(__file__, "ours", rounds, *names)
    if folder:
        theirs = in_process(__file__, folder.resolve(), rounds, *names)
        figures |= {f"peer_{key}": value for key, value in theirs.items()}
        figures["train_step_speedup"] = theirs["train_step_s"] / figures["train_step_s"]
        figures["train_peak_ratio"] = figures["train_peak_bytes"] / theirs["train_peak_bytes"]
    return figures


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False, peer: Path | None = None,
    rounds: int = 3, architectures: tuple[str, ...] = META_BATCH,
) -> None:  # fmt: skip
    """Measure time and memory of a training step.

    Args:
        json_file: Where the figures go.
        quick: A smaller version that ends within a minute.
        peer: A clone of ghn3, to be measured in turn.
        rounds: Steps that are measured, after one that is not.
        architectures: The meta-batch.
    """
    names = QUICK if quick else architectures
    figures = measure_all(names, rounds, peer)
    show(figures)
    store(json_file, figures, architectures=names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one-side"]:
        side, rounds, *names = sys.argv[2:]
        found = one_side(side, int(rounds), tuple(names))
        sys.stdout.write(f"\n{json.dumps(found)}\n")
        raise SystemExit
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
