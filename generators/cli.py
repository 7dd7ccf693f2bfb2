"""Look at the initialisers and generators that exist, fetch them, and fill models without writing code.

python -m generators list

python -m generators init --model torchvision:resnet18 --with he --seed 0 --out weights.safetensors

python -m generators sample --model torchvision:resnet18 --with he -n 5 --out ensemble.safetensors
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional, arg, subcommand

import generators
from generators.by_name import MODEL_SOURCES, batches_of, build_model, keyword_arguments, load_weights, named
from generators.checkpoint import verify
from generators.errors import ConfigError, unknown_name
from generators.filling import init
from generators.generator import Generator
from generators.graph import trace
from generators.initialiser import list_initialisers, needs_of, resolve
from generators.inventory import inventory
from generators.published import list_generators, locate, looks_like_location
from generators.statistics import measure_states
from generators.white_noise import white_noise

log = logging.getLogger(__name__)

WIDTH_OF_PIPES = 160  # characters per line where standard output is no terminal


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_PIPES)


# ---- files


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the folder of `path`, make it durable and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask says; safetensors writes files that only they can read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- commands


@dataclass(frozen=True)
class List:
    """Every initialiser and every published generator."""

    json: bool = False
    """print JSON instead of tables"""

    def __call__(self) -> None:
        published = list_generators()
        initialisers = [info for info in list_initialisers() if "checkpoint" not in info.needs]
        if self.json:
            rows: dict[str, list[Any]] = {"initialisers": initialisers, "generators": published}
            print(json.dumps(rows, default=dataclasses.asdict, indent=1))
            return
        table = Table("initialiser", "kind", "needs", "summary", "source", title="built in", title_justify="left")
        for info in initialisers:
            table.add_row(info.name, info.kind, ", ".join(info.needs), info.summary, info.paper)
        _console().print(table)
        table = Table("generator", "kind", "data", "size", "summary", title="published", title_justify="left")
        for entry in published:
            table.add_row(entry.name, entry.kind, entry.data, f"{entry.size_bytes / 1e6:.1f} MB", entry.summary)
        _console().print(table if published else "no generator is published yet; `python -m train_generators` fits one")


@dataclass(frozen=True)
class Show:
    """All that is known about one initialiser or generator, as JSON. A generator's files are checked."""

    name: Positional[str]
    """a name from `list`, a folder, an https url or a hub id"""

    def __call__(self) -> None:
        known = {info.name: info for info in list_initialisers()}
        if self.name in known and "checkpoint" not in known[self.name].needs:
            print(json.dumps(dataclasses.asdict(known[self.name]), indent=1))
            return
        if not looks_like_location(self.name) and self.name not in known:
            raise unknown_name("initialiser or generator", self.name, known)
        folder = locate(self.name)
        print(json.dumps({"folder": str(folder), **verify(folder)}, indent=1))


@dataclass(frozen=True)
class Download:
    """Fetch a generator into the cache, check it and print its folder."""

    name: Positional[str]
    """a published name, an https url or a hub id"""

    def __call__(self) -> None:
        folder = locate(self.name)
        verify(folder)
        print(folder)


@dataclass(frozen=True)
class _Fill:
    """What `init` and `sample` share."""

    model: str
    """torchvision:NAME, timm:NAME or module.path:callable"""
    with_: Annotated[str, arg(name="with")]
    """what fills it: a chain of names such as he, orthogonal+lsuv, noise-ghn-digits, or where a checkpoint lies"""
    out: Path
    """file to write, NAME.safetensors; the settings and the account go to NAME.safetensors.json"""
    seed: int = 0
    """root seed; the same seed gives bit-identical weights (a GHN moves by rounding with the number of threads)"""
    model_arguments: str = "{}"
    """keyword arguments of the model's constructor as JSON, such as '{"num_classes": 10}'"""
    input_shape: tuple[int, ...] = ()
    """shape of the model's input with the batch axis, if the tracer cannot guess it: 1 3 224 224"""
    data: str = ""
    """if an initialiser needs data: module.path:name of batches (inputs, targets), or of a callable that gives them;
    without it lsuv looks at white noise"""
    loss: str = ""
    """for initialisers that need a loss: module.path:callable, loss(outputs, targets)"""
    relative: str = ""
    """for initialisers that inherit from a trained model: which one, written like --model"""
    relative_weights: Path | None = None
    """its trained weights, NAME.safetensors; only a module.path:callable may give a model that has them already"""
    relative_arguments: str = "{}"
    """keyword arguments of its constructor as JSON"""

    def _model(self) -> nn.Module:
        if self.out.suffix != ".safetensors":
            raise ConfigError(f"--out {self.out}: the name must end in .safetensors")
        return build_model(self.model, keyword_arguments(self.model_arguments, "--model-arguments"), seed=self.seed)

    def _relative(self) -> nn.Module | None:
        """The trained model to inherit from, if one is given."""
        if not self.relative:
            if self.relative_weights is not None:
                raise ConfigError(f"--relative-weights {self.relative_weights}: whose? Pass --relative as well")
            return None
        if self.relative_weights is None and self.relative.partition(":")[0] in MODEL_SOURCES:
            raise ConfigError(f"--relative {self.relative} is not trained; pass its weights, --relative-weights FILE")
        arguments = keyword_arguments(self.relative_arguments, "--relative-arguments")
        relative = build_model(self.relative, arguments, seed=self.seed)
        if self.relative_weights is not None:
            load_weights(relative, self.relative_weights)
        return relative

    def _aids(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of `init` besides seed and member."""
        relative, example = self._relative(), self._example()
        return dict(
            data=batches_of(self.data) if self.data else self._noise(model, example),
            loss=named(self.loss, "loss") if self.loss else None,
            relative=relative,
            example_inputs=example,
        )

    def _example(self) -> Tensor | None:
        return torch.zeros(self.input_shape) if self.input_shape else None

    def _noise(self, model: nn.Module, example: Tensor | None) -> list | None:
        """White noise for steps that need data, but nothing else; None if there are none, or it is not known how.

        Raises:
            ConfigError: a step needs what was not given.
        """
        wanted = []
        for step in resolve(self.with_):
            needs = needs_of(step)
            for need in ("loss", "relative"):
                if need in needs and not getattr(self, need):
                    raise ConfigError(f"{step.name} needs {need}; pass --{need}, see --help")
            if "data" in needs and "loss" in needs:
                raise ConfigError(f"{step.name} needs data; pass --data, see --help")
            wanted += [step.name] if "data" in needs else []
        noise = next(white_noise(trace(model, example).inputs), None) if wanted else None
        if noise is None:
            return None
        log.warning("no --data: %s looks at white noise in the shape of the model's input", ", ".join(wanted))
        return [(noise.kwargs or noise.args, None)]

    def _write(self, save: Callable[[Path], object], **facts: Any) -> None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        record = {"command": settings, "powerhouse": generators.__version__, "torch": torch.__version__, **facts}
        _replace(self.out, save)
        text = json.dumps(record, indent=1) + "\n"
        _replace(self.out.with_name(self.out.name + ".json"), lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Init(_Fill):
    """Fill a model and write its state dict; prints the account of every tensor."""

    member: int = 0
    """which member of the population that the seed names"""
    measure: bool = False
    """also measure rank, distinct values and spread of every matrix"""

    def __call__(self) -> None:
        model = self._model()
        report = init(model, self.with_, seed=self.seed, member=self.member, **self._aids(model))
        facts: dict[str, Any] = {"report": dataclasses.asdict(report)}
        if self.measure:
            facts["measured"] = _measure({name: value[None] for name, value in model.state_dict().items()}, model)
        self._write(lambda path: safetensors.torch.save_model(model, str(path)), **facts)
        print(report)
        print(f"wrote {self.out}")


@dataclass(frozen=True)
class Sample(_Fill):
    """Write n weight sets, stacked: every tensor gets a leading axis of length n."""

    n: Annotated[int, arg(aliases=["-n"])] = 10
    """how many members; member i does not depend on n"""

    def __call__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"-n {self.n}: there must be at least one member")
        model = self._model()
        states = self._states(model)
        measured = _measure(states, model)
        contiguous = {name: value.clone(memory_format=torch.contiguous_format) for name, value in states.items()}
        self._write(lambda path: safetensors.torch.save_file(contiguous, path), measured=measured)
        print(f"wrote {self.n} members of {len(states)} tensors to {self.out}")

    def _states(self, model: nn.Module) -> dict[str, Tensor]:
        chain = resolve(self.with_)
        if len(chain) == 1 and isinstance(chain[0], Generator):
            return chain[0].sample(model, self.n, seed=self.seed, example_inputs=self._example())
        members = []
        for member in range(self.n):
            filled = copy.deepcopy(model)
            init(filled, self.with_, seed=self.seed, member=member, **self._aids(model))
            members.append(filled.state_dict())
        return {name: torch.stack([state[name] for state in members]) for name in members[0]}


def _measure(states: dict[str, Tensor], model: nn.Module) -> dict[str, dict[str, float]]:
    """The figures of all matrices, also as a table on the screen."""
    rows = measure_states(states, inventory(model))
    table = Table("matrix", "std", "std / He std", "distinct", "rank", "stable rank", "between members")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['std']:.4f}", f"{row['std_ratio']:.3f}", f"{row['distinct_share']:.3f}",
            f"{row['numeric_rank']:.0f} of {row['rank_limit']:.0f}", f"{row['stable_rank']:.1f}",
            f"{row['between_members']:.2f}" if "between_members" in row else "",
        )  # fmt: skip
    _console().print(table)
    return rows


Command = (
    Annotated[List, subcommand("list")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Download, subcommand("download")]
    | Annotated[Init, subcommand("init")]
    | Annotated[Sample, subcommand("sample")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (default: the command line) describe."""
    command: Any = tyro.cli(Command, prog="python -m generators", description=__doc__, args=arguments)
    command()
