"""The command line: what it makes, what it shows, and one-line errors that leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from collect import cli, unfinished, zoo_file
from collect.zoo import Zoo
from generators.commandline import EXIT_WRONG_INPUT, run
from generators.errors import ZooError

COLLECT = ["run", "--architectures", "mlp-1-w4", "--runs", "3", "--together", "2", "--epochs", "1", "--batch-size",
           "256", "--workers", "0"]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `python -m collect ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
    return run(cli.main)


def test_run_makes_a_zoo_its_plan_and_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "zoo"
    assert call(monkeypatch, *COLLECT, "--init", "he", "xavier", "--lr", "0.1", "0.2", "--out", folder) == 0
    zoo = Zoo(folder)
    assert len(zoo) == 12 and len(zoo.populations) == 8
    assert {(run["init"], run["lr"]) for run in zoo.runs} == {(a, b) for a in ("he", "xavier") for b in (0.1, 0.2)}
    (place,) = folder.glob("config-*.json")
    assert (folder / place.name.replace("config", "plan")).exists()
    stored = json.loads(place.read_text())
    assert stored["spec"]["grid"]["lr"] == [0.1, 0.2] and stored["spec"]["recipe"]["momentum"] == 0.9
    assert stored["config"]["workers"] == 0 and stored["provenance"]["torch_version"]
    shown = capsys.readouterr().out
    assert "12 networks" in shown and "xavier" in shown


def test_every_recipe_flag_reaches_the_recipe(tmp_path: Path) -> None:
    config = cli.RunConfig(
        architectures=("mlp-1-w4",), out=tmp_path, epochs=3, batch_size=32, optimiser="adamw", lr=(0.01,), momentum=0.8,
        weight_decay=0.1, schedule="linear", warmup_epochs=1.0, augmentation="shift", label_smoothing=0.1,
        clip_norm=1.0, evaluations_per_epoch=2, saved=(0, 3), statistics="running",
        dropout=0.1, precision="bfloat16", trajectory="float16", classifier_lr=0.5, evaluation_steps=(2,),
    )  # fmt: skip
    (recipe,) = config.spec().recipes()
    names = set(type(recipe).__dataclass_fields__) - {
        "architecture",
        "init",
        "init_digest",
        "lr",
    }  # swept, or found out
    assert names <= set(cli.RunConfig.__dataclass_fields__)
    assert all(getattr(recipe, name) == getattr(config, name) for name in names)
    assert (recipe.architecture, recipe.init, recipe.lr) == ("mlp-1-w4", "he", 0.01)
    assert cli.RunConfig(architectures=("mlp-1-w4",), out=tmp_path, nesterov=True).spec().recipes()[0].nesterov


def test_flags_name_the_populations_that_they_named_in_the_first_version(tmp_path: Path) -> None:
    """Ids written down with version 0.1: zoos of that time must go on, not start again."""
    config = cli.RunConfig(
        architectures=("resnet-8-w4", "mlp-2-w32"), out=tmp_path, init=("he", "orthogonal"), lr=(0.1, 0.01), epochs=3,
        saved=(0, 3), augmentation="shift",
    )  # fmt: skip
    assert [task.id for task in config.spec().plan()] == [
        "f1122180942540f3", "0815a1bd8c1a1a58", "eb6bc9765f7a293b", "c4f8656c7713634a",
        "0e2a8ce2a874f727", "5b6fe49af5bccc10", "f811312098925500", "c0bdee0d044f399a",
    ]  # fmt: skip


def test_from_a_spec_over_a_plan_to_the_zoo_that_the_flags_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spec, made = tmp_path / "spec.json", tmp_path / "plan.json"
    recipe = {"architecture": "mlp-1-w4", "epochs": 1, "batch_size": 256}
    spec.write_text(json.dumps({"recipe": recipe, "grid": {"init": ["he", "xavier"]}, "runs": 3, "together": 2}))
    assert call(monkeypatch, "plan", spec, "--out", made) == 0
    shown = capsys.readouterr().out
    assert "2 recipes, 6 networks in 4 populations" in shown and "swept: init he, xavier" in shown
    for source, folder in ((spec, tmp_path / "one"), (made, tmp_path / "other")):
        assert call(monkeypatch, "run", "--plan", source, "--out", folder, "--workers", "0") == 0
        stored = json.loads(next(folder.glob("config-*.json")).read_text())
        assert stored["spec"]["grid"] == {"init": ["he", "xavier"]}
    assert call(monkeypatch, *COLLECT, "--init", "he", "xavier", "--out", tmp_path / "flags") == 0
    digests = [
        {each.id: each.header.digest for each in Zoo(tmp_path / name).populations} for name in ("one", "other", "flags")
    ]
    assert len(digests[0]) == 4 and digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "digit"], ["data set 'digit'", "'digits'"]),
        (["--init", "hee"], ["'hee'", "'he'"]),
        (["--architectures", "resent-8-w4"], ["'resent-8-w4'", "'resnet-8-w4'"]),
        (["--architectures", "resnet"], ["'resnet'", "resnet-20-w16"]),
        (["--epochs", "0"], ["epochs", "at least 1"]),
        (["--runs", "0"], ["runs", "at least 1"]),
        (["--batch-size", "9999"], ["1295 training images"]),
        (["--device", "cudda"], ["cannot train on device 'cudda'", "cuda:1"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    flags: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "zoo"
    assert call(monkeypatch, *COLLECT, *flags, "--out", folder) == EXIT_WRONG_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words), error
    assert not folder.exists()


def test_status_shows_what_is_missing_and_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    first, second = sorted(tmp_path.glob("*.h5"), key=lambda path: path.stat().st_size)
    first.unlink()  # the one with a single network
    capsys.readouterr()
    assert call(monkeypatch, "status", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "2 of 3" in shown and "3 networks: 2 done, 0 running, 0 failed, 1 open" in shown
    assert "networks per minute" in shown and " left with one process" in shown and "has begun" not in shown
    for population in (first.stem, second.stem):  # one that is missing and one that is there
        unfinished.path_of(tmp_path, population).parent.mkdir(exist_ok=True)
        unfinished.path_of(tmp_path, population).touch()
    assert call(monkeypatch, "status", tmp_path) == 0
    assert "the training of 1 of the missing files has begun" in capsys.readouterr().out
    second.write_bytes(second.read_bytes()[:-1])
    assert call(monkeypatch, "status", tmp_path) == 0
    shown = capsys.readouterr().out
    assert (
        "0 of 3" in shown
        and "0 done, 0 running, 2 failed, 1 open" in shown
        and "not usable" in shown
        and second.name in shown
    )


def test_verify_names_the_damaged_file_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    assert call(monkeypatch, "verify", tmp_path) == 0
    population = Zoo(tmp_path).populations[0]
    path, content = population.header.path, bytearray(population.header.path.read_bytes())
    content[population.header.weights.offset] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert call(monkeypatch, "status", tmp_path) == 0  # the cheap check cannot see it
    assert call(monkeypatch, "verify", tmp_path) == EXIT_WRONG_INPUT
    captured = capsys.readouterr()
    assert "1 files whole, 1 not usable" in captured.out and path.name in captured.err
    with pytest.raises(ZooError, match="no zoo"):
        cli.verify(tmp_path / "nowhere")


def flip(path: Path) -> None:
    """One bit of the weights, under an unchanged size and time."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[zoo_file.read_header(path).weights.offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_the_index_knows_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `status` and by `run`; a file that is new or has changed is opened once, and no other."""
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    opened: list[str] = []
    real = h5py.File

    def watched(path: str | Path, *more: Any, **how: Any) -> h5py.File:
        opened.append(Path(path).name)
        return real(path, *more, **how)

    monkeypatch.setattr(h5py, "File", watched)
    for command in (["status", tmp_path], [*COLLECT, "--out", tmp_path]):
        assert call(monkeypatch, *command) == 0
    assert opened == []
    first, second = sorted(tmp_path.glob("*.h5"))
    os.utime(second, ns=(0, 0))
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    assert opened == [second.name]
    assert call(monkeypatch, *COLLECT, "--verify", "--out", tmp_path) == 0
    assert sorted(opened[1:]) == [first.name, second.name]


def test_a_flipped_bit_is_found_by_verify_and_by_run_with_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    path = min(tmp_path.glob("*.h5"))
    whole = zoo_file.verify(path).digest
    flip(path)
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0  # the cheap check cannot see it
    assert call(monkeypatch, "verify", tmp_path) == EXIT_WRONG_INPUT
    assert "with --verify" in capsys.readouterr().out, "without, the way out would lead nowhere"
    assert call(monkeypatch, *COLLECT, "--verify", "--out", tmp_path) == 0
    assert f"moved aside to {path.name}.bad" in caplog.text and zoo_file.verify(path).digest == whole
    assert call(monkeypatch, "verify", tmp_path) == 0


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"x"])
def test_what_a_cheap_check_can_see_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    """Another size, under an index that knows the file, and even under its old time."""
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    path = min(tmp_path.glob("*.h5"))
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(damage(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert call(monkeypatch, *COLLECT, "--out", tmp_path) == 0
    assert zoo_file.verify(path)
    assert path.with_name(f"{path.name}.bad").exists() or damage(content).startswith(content)


def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (
            ["--help"],
            ["run --data digits", "run --plan PLAN.json", "status", "verify", "given again"],
        ),
        (["plan", "--help"], ['"log_uniform": [0.01, 0.3]', "independent", "--out"]),
        (
            ["run", "--help"],
            [
                "python -m collect run --data digits",
                "--architectures",
                "resnet-20-w16",
                "--first-seed",
                "--verify",
                "digests",
            ],
        ),
        *(
            ([name, "--help"], [f"Example: python -m collect {name} zoo/"])
            for name in ("status", "verify", "pack", "card")
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["collect", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


def test_as_a_module_with_a_worker_process(tmp_path: Path) -> None:
    """The whole way once, as a user goes it: a real interpreter that spawns a worker."""
    command = [sys.executable, "-m", "collect", *COLLECT[:-1], "1", "--out", str(tmp_path / "zoo")]
    root = Path(cli.__file__).parents[1]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "3 networks" in found.stdout and "3/3" in found.stderr
    assert len(Zoo(tmp_path / "zoo", verify=True)) == 3


def test_a_packed_zoo_passes_for_a_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "zoo", tmp_path / "out" / "zoo.h5"
    assert call(monkeypatch, *COLLECT, "--out", folder) == 0
    assert call(monkeypatch, "pack", folder, out) == 0
    for command in ("status", "verify"):
        assert call(monkeypatch, command, out) == 0
    shown = capsys.readouterr().out
    assert "3 networks in 2 populations" in shown and "2 files whole" in shown
    assert Zoo(out).runs == Zoo(folder).runs
    assert call(monkeypatch, "card", out, "--licence", "CC0-1.0") == 0
    assert "CC0-1.0" in out.with_suffix(".card.md").read_text()
