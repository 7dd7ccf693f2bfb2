"""`python -m train_generators`: help that teaches, exit codes, and commands that load only what they need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from generators.commandline import run
from generators.errors import UnknownNameError
from train_generators import cli


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command_with_an_example(arguments, capsys):
    cli.main(arguments)
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"{cli.PROGRAM} {name} {command.example}" in text
        assert command.summary in text


def test_the_overview_loads_no_command():
    script = "import sys; from train_generators import cli; cli.main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(out.splitlines()[-1].split())
    assert not {command.function.partition(":")[0] for command in cli.COMMANDS.values()} & loaded


def test_an_unknown_command_is_an_error_with_near_names(capsys):
    with pytest.raises(UnknownNameError, match="noise-ghn"):
        cli.main(["noise-gnh"])
    assert run(lambda: cli.main(["noise-gnh"])) == 2
    assert "did you mean" in capsys.readouterr().err


def test_help_of_a_command_shows_flags_with_reasons_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["vae", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert exit.value.code == 0
    assert "python -m train_generators vae --zoo runs/zoo --out runs/conv-vae" in text
    assert "--steps INT Optimiser steps per weight group. (default: 400)" in text
    assert "--scale {he,zoo,none}" in text


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("vae", ["--zoo", "--steps", "--seed"]),
        ("ghn", ["--zoo", "--steps", "--seed", "--ghn.seed"]),
        ("noise-ghn", ["--zoo", "--steps", "--cosine-weight", "--ghn.anchor"]),
        ("compare", ["--zoo", "--baseline", "--ensemble-size"]),
    ],
)
def test_every_command_has_its_own_flags_and_those_of_its_configuration_without_a_prefix(name, flags, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"usage: python -m train_generators {name}" in text
    assert "--config" not in text
    for flag in ["--out", *flags]:
        assert f" {flag} " in text


@pytest.mark.parametrize("flags", [[], ["--zoo", "z"], ["--zoo", "z", "--out", "o", "--scale", "big"], ["--zoos", "z"]])
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["vae", *flags])
    assert exit.value.code == 2
    assert capsys.readouterr().err


def test_wrong_input_ends_with_code_2_and_one_line(tmp_path, capsys):
    flags = ["vae", "--zoo", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert run(lambda: cli.main(flags)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "no zoo at" in error and "python -m collect" in error
    assert not (tmp_path / "out").exists()
    assert run(lambda: cli.main([*flags, "--steps", "0"])) == 2
    assert "steps must be at least 1" in capsys.readouterr().err


def test_flags_reach_the_command(monkeypatch):
    seen = {}

    def command(out: str, steps: int = 3) -> None:
        """A command."""
        seen.update(out=out, steps=steps)

    monkeypatch.setitem(cli.COMMANDS, "vae", cli.Command("json:tool", "", ""))
    monkeypatch.setattr(cli.Command, "load", lambda self: command)
    cli.main(["vae", "--out", "here", "--steps", "7"])
    assert seen == {"out": "here", "steps": 7}
