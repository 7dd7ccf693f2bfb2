"""How fast, how lean and how good is a graph hypernetwork? Every figure beside GHN-3's, if a clone of it is given.

Per model a process of its own for each side, one after the other: graph, then graph + prediction + weights in the
model, in CPU seconds of one thread, medians of rounds, and of ours a pass of the encoder alone; the rise of the peak
memory over weights + GHN; distinct values, numeric and stable rank of what was written. Both sides are in their
smallest published shape, with random weights, for 1,000 classes. Ours is the deterministic GHN, as the other is;
`noise_total_s` is ours with codes and white noise. What a trained generator writes (`trained_`) is measured on a
published one, made to decode also the sorts of layers that it would leave to He since it never met them; classifiers
are He's for want of 1,000 classes. Figures of a training step are those of
`ghn_training.py`.

    python benchmarks/ghn.py --json ghn.json [--quick] [--peer DIR] [--trained NAME]

DIR is a clone of https://github.com/SamsungSAILMontreal/ghn3; that code needs ppuda, transformers and what they need.
Prints a table and writes its figures as flat JSON with machine, versions and commit. Memory is read from /proc (Linux).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import torchvision  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

import generators  # noqa: E402
from benchmarks.measuring import Peak, cpu_seconds, in_process, store  # noqa: E402
from collect.architectures import build  # noqa: E402
from generators import init, trace  # noqa: E402
from generators.commandline import run  # noqa: E402
from generators.ghn.config import GHNConfig  # noqa: E402
from generators.ghn.ghn import GHN  # noqa: E402
from generators.initialiser import Proposal, Request  # noqa: E402
from generators.inventory import inventory  # noqa: E402
from generators.pointwise import HE  # noqa: E402
from generators.statistics import measure, stable_rank  # noqa: E402

MODELS = ("resnet18", "resnet50", "vit_b_16", "efficientnet_b0", "efficientnet_b7", "convnext_tiny", "densenet201",
          "efficientnet_v2_l")  # fmt: skip
CLASSES = 1000
OURS = GHNConfig(classes=CLASSES)
NOISE = replace(OURS, anchor=0.6, decoded_limit=1.0, code=8)
HUNDRED, SMALL_NETWORK = 100, "resnet-20-w16"
MEMBERS = "hundred-members"  # in the place of a model, to `one_side`
PEER_SHAPE: dict[str, Any] = dict(
    max_shape=(64, 64, 16, 16), num_classes=CLASSES, hid=64, heads=8, layers=3, weight_norm=True, ve=True,
    layernorm=True,
)  # fmt: skip  # GHN-3-T


@dataclass(frozen=True)
class Size:
    """How much is run."""

    models: tuple[str, ...] = MODELS
    rounds: int = 3
    measured: int = 6  # tensors per model whose singular values are taken: the largest and evenly spread others
    meta_batch: tuple[str, ...] = ()  # those of `ghn_training.py`
    processes: int = 7  # for the time of a hundred members


QUICK = Size(
    models=("resnet18", "efficientnet_b0"), rounds=2, measured=4, meta_batch=("resnet-20-w16", "vgg-4-w32"), processes=1
)


# ---- one side, in a process of its own ---------------------------------------------------------------------------


def ours(ghn: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], object], Callable[[nn.Module], object]]:
    """A GHN of ours, how a graph is made, and how a model is filled."""
    return ghn, trace, lambda model: init(model, ghn)


def peer(folder: Path) -> tuple[nn.Module, Callable[[nn.Module], object], Callable[[nn.Module], object]]:
    """The same of GHN-3 in `folder`."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(sys.stderr):
        from ghn3.graph import Graph
        from ghn3.nn import GHN3
    ghn = GHN3(**PEER_SHAPE).eval()

    def graph(model: nn.Module) -> object:
        return Graph(model, ve_cutoff=50)

    def fill(model: nn.Module) -> object:
        with torch.no_grad():
            return ghn(model, graph(model))

    return ghn, graph, fill


def one_side(model_name: str, rounds: int, measured: int, side: str) -> dict[str, float]:
    """The figures of one side for one model: `ours`, `noise`, `trained:NAME`, or the folder of the peer."""
    torch.set_num_threads(1)
    if model_name == MEMBERS:
        return hundred_members(rounds)
    configs = {"ours": OURS, "noise": NOISE}
    if side in configs:
        ghn, graph, fill = ours(GHN(configs[side]).eval())
    elif side.startswith("trained:"):
        published = generators.load(side.removeprefix("trained:"))
        published.config = replace(published.config, met=())
        ghn, graph, fill = ours(published)
    else:
        ghn, graph, fill = peer(Path(side))
    fill(torchvision.models.get_model("squeezenet1_1", weights=None))  # imports, caches of the library
    model = torchvision.models.get_model(model_name, weights=None)
    size = sum(value.nbytes for each in (ghn, model) for value in each.parameters())
    peak = Peak()
    totals = [cpu_seconds(lambda: fill(model))]
    figures = {"peak_extra_ratio": peak.rise() / size}
    graphs = []
    for _ in range(rounds):
        graphs.append(cpu_seconds(lambda: graph(model)))
        totals.append(cpu_seconds(lambda: fill(model)))
    figures |= {"graph_s": statistics.median(graphs), "total_s": statistics.median(totals[1:])}
    if isinstance(ghn, GHN):
        figures["encode_s"] = encoder_seconds(ghn, model)
    return figures | (worth(model, measured) if measured else {})


@torch.no_grad()
def encoder_seconds(ghn: GHN, model: nn.Module, rounds: int = 7) -> float:
    """One pass of the encoder over the node table of `model`, which is made before."""
    table = ghn.plan(model).table
    ghn.encoder(table)
    return cpu_seconds(lambda: ghn.encoder(table), rounds)


def worth(model: nn.Module, count: int) -> dict[str, float]:
    """Medians over `count` of the matrices in `model`, the share of distinct values in all of these together, and the
    least stable rank of all matrices.
    """
    found, values = inventory(model), dict(model.named_parameters())
    wide = [info for info in found if len(info.shape) > 1 and min(info.shape[0], info.numel // info.shape[0]) >= 8]
    wide.sort(key=lambda info: -info.numel)
    chosen = wide[:: max(1, len(wide) // count)][:count]
    proposal = Proposal()
    for info in wide:
        HE.fill(proposal, info, Request(found))
    rows = [(measure(values[info.name]), measure(proposal.values[info.name]), info.numel) for info in chosen]
    ranks = [[stable_rank(each[info.name].flatten(1)) for each in (values, proposal.values)] for info in wide]
    distinct = sum(own.distinct_share * numel for own, _, numel in rows) / sum(numel for _, _, numel in rows)
    return {
        "distinct_share": distinct,
        "rank_share": statistics.median(own.numeric_rank / he.numeric_rank for own, he, _ in rows),
        "stable_rank_share": statistics.median(own.stable_rank / he.stable_rank for own, he, _ in rows),
        "least_stable_rank_share": min(own / he for own, he in ranks),
        "least_std_ratio": min(own.std / he.std for own, he, _ in rows),
        "greatest_std_ratio": max(own.std / he.std for own, he, _ in rows),
    }


# ---- all figures -------------------------------------------------------------------------------------------------


def hundred_members(rounds: int) -> dict[str, float]:
    """CPU seconds of one member of a small ResNet and of a hundred, in this process."""
    ghn, model = GHN(replace(NOISE, classes=10)), build(SMALL_NETWORK, shape=(3, 32, 32), classes=10)
    ghn.sample(model, 1)
    one = cpu_seconds(lambda: ghn.sample(model, 1), 3 * rounds)
    many = cpu_seconds(lambda: ghn.sample(model, HUNDRED), rounds)
    return {"sample1_s": one, "sample100_s": many, "sample100_ratio": many / one}


def hundreds(size: Size) -> dict[str, Any]:
    """Medians of `hundred_members` over processes, and the ratio of each, in rising order."""
    found = [in_process(__file__, MEMBERS, size.rounds, 0, "ours") for _ in range(size.processes)]
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return medians | {"sample100_ratios": sorted(round(each["sample100_ratio"], 2) for each in found)}


def training(names: tuple[str, ...], rounds: int, folder: Path | None) -> dict[str, float]:
    """The figures of `ghn_training.py`."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place, "training.json")
        command = [sys.executable, str(Path(__file__).with_name("ghn_training.py")), "--json", str(found)]
        command += ["--rounds", str(rounds), *(["--architectures", *names] if names else [])]
        command += ["--peer", str(folder)] if folder else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"training: {done.stderr[-2000:]}")
        return {key: value for key, value in json.loads(found.read_text()).items() if "train_" in key}


def measure_all(size: Size, folder: Path | None, trained: str) -> dict[str, Any]:
    """All figures; each model's sides directly one after the other."""
    figures: dict[str, Any] = {}
    sides = {"": "ours", "noise_": "noise", "trained_": f"trained:{trained}"}
    if folder:
        sides["peer_"] = str(folder.resolve())
    for name in size.models:
        for prefix, side in sides.items():
            for key, value in in_process(__file__, name, size.rounds, size.measured, side).items():
                figures[f"{prefix}{key}/{name}"] = value
    keys = {key.partition("/")[0] for key in figures}
    if folder:
        for key in ("graph", "total", "noise_total"):
            for name in size.models:
                theirs = figures[f"peer_{key.removeprefix('noise_')}_s/{name}"]
                figures[f"{key}_speedup/{name}"] = theirs / figures[f"{key}_s/{name}"]
            keys.add(f"{key}_speedup")
    for key in sorted(keys):
        figures[f"median_{key}"] = statistics.median(figures[f"{key}/{name}"] for name in size.models)
    return figures | hundreds(size) | training(size.meta_batch, size.rounds, folder)


def tables(figures: dict[str, Any], models: tuple[str, ...]) -> list[Table]:
    """A row per figure, a column per model; then what is not of one model."""
    per_model = Table("figure", *models, "median")
    for key in dict.fromkeys(key.partition("/")[0] for key in figures if "/" in key):
        values = [figures[f"{key}/{name}"] for name in models]
        per_model.add_row(key, *(f"{value:.3g}" for value in (*values, figures[f"median_{key}"])))
    others = Table("figure", "value")
    for key, value in figures.items():
        if "/" not in key and not key.startswith("median_"):
            others.add_row(key, f"{value:.3g}" if isinstance(value, float) else str(value))
    return [per_model, others]


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False, peer: Path | None = None,
    trained: str = "noise-ghn-cifar10", only_members: bool = False,
) -> None:  # fmt: skip
    """Measure speed, memory and worth of a graph hypernetwork.

    Args:
        json_file: Where the figures go.
        quick: A smaller version that ends within a minute.
        peer: A clone of ghn3, to be measured in turn.
        trained: A published GHN, or the folder of one.
        only_members: Nothing but the time of a hundred members.
    """
    size = QUICK if quick else Size()
    if only_members:
        size = replace(size, models=())
    figures = hundreds(size) if only_members else measure_all(size, peer, trained)
    console = Console(soft_wrap=True)
    for table in tables(figures, size.models):
        console.print(table)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one-side"]:
        name, rounds, measured, side = sys.argv[2:]
        found = one_side(name, int(rounds), int(measured), side)
        sys.stdout.write(f"\n{json.dumps(found)}\n")
        raise SystemExit
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
