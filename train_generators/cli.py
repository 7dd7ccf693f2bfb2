"""`python -m train_generators COMMAND`: fit a generator on a zoo, compare initialisers, or run the whole demo.

A command is a function; its signature and docstring are its flags and its help (tyro). The table below names the
functions; a module is imported only when its command is asked for. A new command is one line in the table.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from collect.memory import keep_freed_memory
from generators.errors import unknown_name

PROGRAM = "python -m train_generators"


@dataclass(frozen=True)
class Command:
    """One row of the table.

    Attributes:
        function: "module:function"; the function's parameters become the flags.
        summary: one line for the overview.
        example: arguments that work as they stand.
    """

    function: str
    summary: str
    example: str

    def load(self) -> Callable:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS = {
    "vae": Command(
        "train_generators.vae:main",
        "fit one slice model (--kind) per weight group (kernel size, role, depth) on the kernels of a zoo",
        "--zoo runs/zoo --out runs/conv-vae",
    ),
    "ghn": Command(
        "train_generators.ghn:main",
        "train a graph hypernetwork on architecture families with the image loss",
        "--zoo runs/zoo --out runs/ghn",
    ),
    "noise-ghn": Command(
        "train_generators.ghn:main_noise",
        "train a graph hypernetwork whose members differ (noise codes, and white noise in every weight)",
        "--zoo runs/zoo --out runs/noise-ghn",
    ),
    "pictures": Command(
        "train_generators.local_plots:main",
        "draw kernels, latent traversals and spectra of a local generator beside trained networks",
        "--checkpoint runs/conv-vae --zoo runs/zoo --out runs/pictures",
    ),
    "fidelity": Command(
        "train_generators.local_fidelity:main",
        "write a table of how well samples of local generators match held-out networks, as their cards say",
        "--checkpoints runs/conv-vae runs/filter-vae --out runs/fidelity",
    ),
    "compare": Command(
        "train_generators.compare:main",
        "report what each initialiser is worth against a baseline, over the populations of a zoo",
        "--zoo runs/zoo --out runs/comparison --baseline he",
    ),
    "judge": Command(
        "train_generators.judging:main",
        "measure the figures of a GHN's card again, and write them into a copy if asked to",
        "--checkpoint checkpoints/noise-ghn-digits",
    ),
    "publish": Command(
        "train_generators.publish:main",
        "copy a checkpoint into checkpoints/ under a published name and list it in the index",
        "--checkpoint runs/demo/checkpoints/ghn --name ghn-digits",
    ),
    "demo": Command(
        "train_generators.demo:main",
        "the main job end to end on the embedded digits: zoo, three generators, comparison",
        "--out runs/demo",
    ),
}


def overview() -> str:
    """What `--help` shows."""
    rows = "\n".join(f"  {name:10s} {command.summary}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  {PROGRAM} {name} {command.example}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [flags]\n\n"
        "Fit generators on a zoo of trained networks (python -m collect makes one) and compare initialisers.\n\n"
        f"commands:\n{rows}\n\nexamples:\n{examples}\n\n"
        f"`{PROGRAM} COMMAND --help` lists the flags of a command. A command that was killed goes on\n"
        "where it was when it is given again. Exit code: 0 done, 2 wrong usage or input, 3 interrupted but resumable."
    )


def _with_short_flags(function: Callable) -> Callable:
    """`function` with the fields of its dataclass parameters as plain flags: --steps, not --config.steps."""

    def command(**values: Any) -> Any:
        return function(**values)

    plain = tyro.conf.arg(name="")
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    command.__annotations__ = {
        name: Annotated[hint, plain] if dataclasses.is_dataclass(hint) else hint
        for name, hint in get_type_hints(function, include_extras=True).items()
    }
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (by default those of the command line) name.

    Raises:
        UnknownNameError: there is no such command.
        SystemExit: wrong flags (code 2) or `--help` (code 0), as tyro has it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        return
    name, *flags = arguments
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS, way_out=f"`{PROGRAM} --help` shows what each does.")
    keep_freed_memory()
    tyro.cli(_with_short_flags(COMMANDS[name].load()), prog=f"{PROGRAM} {name}", args=flags)
