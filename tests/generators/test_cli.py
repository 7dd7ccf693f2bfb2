"""`python -m generators`: every command, its files, and its answers to wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from generators.cli import main
from generators.errors import CheckpointError, ConfigError, DataError, ModelError, PowerhouseError, UnknownNameError
from generators.filling import init
from generators.initialiser import list_initialisers

ROOT = Path(__file__).parents[2]


def _net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "generators", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's own module that can be imported, as `--model` wants it."""
    (tmp_path / "mine_for_cli.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net(width=8):\n"
        "    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))\n"
        "def batches():\n    return [(torch.eye(4).repeat(4, 1), None)]\n"
        "def broken():\n    raise RuntimeError('no weights today')\n"
        "number = int\nlisted = batches()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_cli", raising=False)
    return "mine_for_cli:net"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Every registered name stands in the table, and the JSON form is complete."""
    main(["list"])
    table = capsys.readouterr().out
    assert all(info.name in table for info in list_initialisers())
    main(["list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in rows["initialisers"] + rows["generators"]]
    assert names == [info.name for info in list_initialisers()]
    assert isinstance(rows["generators"], list)


def test_lsuv_without_data_looks_at_white_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "w.safetensors"
    main(["init", "--model", "torchvision:resnet18", "--with", "he+lsuv", "--out", str(out)])
    assert "no --data: lsuv looks at white noise" in caplog.text
    report = json.loads((tmp_path / "w.safetensors.json").read_text())["report"]
    assert report["statistics"]["layer1.0.conv1.weight"]["output_std_after"] == pytest.approx(1.0, abs=0.1)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "lsuv"])
    assert json.loads(capsys.readouterr().out)["needs"] == ["data"]
    with pytest.raises(UnknownNameError, match="'lsuv'"):
        main(["show", "lsvu"])


def test_init_writes_what_the_library_gives(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds the tensors of `init` with the same seed and member; settings and report lie beside it."""
    out = tmp_path / "new folder" / "w.safetensors"
    main(["init", "--model", model, "--with", "he", "--seed", "3", "--member", "2", "--out", str(out), "--measure"])
    expected = _net()
    init(expected, "he", seed=3, member=2)
    written = safetensors.torch.load_file(out)
    assert written.keys() == expected.state_dict().keys()
    assert all(torch.equal(written[name], value) for name, value in expected.state_dict().items())
    record = json.loads(Path(f"{out}.json").read_text())
    assert record["command"]["with_"] == "he"
    assert record["command"]["seed"] == 3
    assert record["report"]["generated"]["0.weight"] == "he"
    assert record["measured"]["0.weight"]["numeric_rank"] == 4
    assert {path.name for path in out.parent.iterdir()} == {"w.safetensors", "w.safetensors.json"}
    assert "tensors generated" in capsys.readouterr().out


def test_init_with_data_and_arguments(model: str, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    main(
        [
            *("init", "--model", model, "--model-arguments", '{"width": 5}', "--out", str(out)),
            *("--with", "he+lsuv", "--data", "mine_for_cli:batches"),
        ]
    )
    written = safetensors.torch.load_file(out)
    assert written["0.weight"].shape == (5, 4)
    outputs = torch.eye(4) @ written["0.weight"].T
    assert outputs.repeat(4, 1).std().item() == pytest.approx(1.0, abs=0.1)


def test_init_from_a_relative(model: str, tmp_path: Path) -> None:
    """A wider net of the same class with weights from a file: what the library makes of it."""
    trained, out = tmp_path / "trained.safetensors", tmp_path / "w.safetensors"
    relative, expected = _net(16), _net(8)
    init(relative, "he", seed=9)
    safetensors.torch.save_model(relative, str(trained))
    options = ["--model", model, "--with", "weight-selection", "--out", str(out), "--input-shape", "2", "4"]
    wide = ["--relative", model, "--relative-weights", str(trained), "--relative-arguments", '{"width": 16}']
    main(["init", *options, *wide])
    init(expected, "weight-selection", relative=relative)
    written = safetensors.torch.load_file(out)
    assert all(torch.equal(written[name], value) for name, value in expected.state_dict().items())
    assert torch.equal(written["0.weight"], relative[0].weight[::2])
    assert json.loads(Path(f"{out}.json").read_text())["command"]["relative_weights"] == str(trained)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], ConfigError, "weight-selection needs relative"),
        (["--relative-weights", "w.safetensors"], ConfigError, "whose.* Pass --relative"),
        (["--relative", "torchvision:resnet18"], ConfigError, "not trained; pass its weights, --relative-weights"),
        (["--relative", "mine_for_cli:nett"], UnknownNameError, "'net'"),
        (
            ["--relative", "mine_for_cli:net", "--relative-arguments", "["],
            ConfigError,
            "arguments '.' is not JSON",
        ),
        (["--relative", "mine_for_cli:net", "--relative-weights", "no.safetensors"], CheckpointError, "no.safetensors"),
        (["--relative", "mine_for_cli:net", "--relative-weights", __file__], CheckpointError, "read as safetensors"),
        (["--relative", "mine_for_cli:net", "--relative-weights", "FILE"], CheckpointError, "does not fit .*size mism"),
    ],
)
def test_relatives_that_cannot_be_had(
    model: str, tmp_path: Path, arguments: list[str], error: type[PowerhouseError], words: str
) -> None:
    trained, out = tmp_path / "trained.safetensors", tmp_path / "w.safetensors"
    safetensors.torch.save_model(_net(16), str(trained))
    given = [str(trained) if text == "FILE" else text for text in arguments]
    with pytest.raises(error, match=words):
        main(["init", "--model", model, "--with", "weight-selection", "--out", str(out), *given])
    assert not out.exists()


def test_sample(model: str, tmp_path: Path) -> None:
    """Member i of the stack equals `init` with member=i, and does not depend on n."""
    small, large = tmp_path / "2.safetensors", tmp_path / "4.safetensors"
    main(["sample", "--model", model, "--with", "orthogonal", "-n", "2", "--out", str(small)])
    main(["sample", "--model", model, "--with", "orthogonal", "-n", "4", "--out", str(large)])
    two, four = safetensors.torch.load_file(small), safetensors.torch.load_file(large)
    expected = _net()
    init(expected, "orthogonal", member=1)
    for name, value in expected.state_dict().items():
        assert four[name].shape == (4, *value.shape)
        assert torch.equal(two[name][1], value)
        assert torch.equal(four[name][:2], two[name])


def test_torchvision_models(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    main(["init", "--model", "torchvision:shufflenet_v2_x0_5", "--with", "xavier", "--out", str(out)])
    assert safetensors.torch.load_file(out)["conv1.0.weight"].shape == (24, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--model", "torchvision:resnet81", "--with", "he"], UnknownNameError, "resnet18"),
        (["--model", "no.such.module:net", "--with", "he"], ConfigError, "is it installed"),
        (["--model", "mine_for_cli", "--with", "he"], ConfigError, "module.path:callable"),
        (["--model", "mine_for_cli:nett", "--with", "he"], UnknownNameError, "'net'"),
        (["--model", "mine_for_cli:number", "--with", "he"], ModelError, "not a torch.nn.Module"),
        (["--model", "mine_for_cli:broken", "--with", "he"], ModelError, "no weights today"),
        (["--model", "mine_for_cli:net", "--with", "hee"], UnknownNameError, "'he'"),
        (["--model", "mine_for_cli:net", "--with", "he+nio"], ConfigError, "needs loss; pass --loss"),
        (
            ["--model", "mine_for_cli:net", "--with", "he+nio", "--loss", "torch.nn.functional:cross_entropy"],
            ConfigError,
            "needs data; pass --data",
        ),
        (["--model", "mine_for_cli:net", "--with", "he", "--model-arguments", "{"], ConfigError, "JSON"),
        (["--model", "mine_for_cli:net", "--with", "he", "--model-arguments", "[]"], ConfigError, "object"),
        (["--model", "mine_for_cli:net", "--with", "he", "--model-arguments", '{"depth": 1}'], ModelError, "depth"),
    ],
)
def test_wrong_input_writes_nothing(
    model: str, tmp_path: Path, arguments: list[str], error: type[PowerhouseError], words: str
) -> None:
    before = set(tmp_path.rglob("*.safetensors*"))
    with pytest.raises(error, match=words):
        main(["init", *arguments, "--out", str(tmp_path / "w.safetensors")])
    assert set(tmp_path.rglob("*.safetensors*")) == before


def test_wrong_out_and_n(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must end in"):
        main(["init", "--model", model, "--with", "he", "--out", str(tmp_path / "w.pt")])
    with pytest.raises(ConfigError, match="at least one"):
        main(["sample", "--model", model, "--with", "he", "-n", "0", "--out", str(tmp_path / "w.safetensors")])


def test_exit_code_of_the_program() -> None:
    """From a shell: 2 with one line on stderr and nothing on stdout; the other codes are those of `commandline.run`."""
    unknown = _run("show", "hee")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: unknown initialiser or generator 'hee': did you mean 'he'?\n"


def test_wrong_usage() -> None:
    for arguments in (["shwo"], [], ["init", "--model", "x:y"], ["sample", "-n", "many"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_data_are_batches_or_a_callable(model: str, tmp_path: Path) -> None:
    """Named batches serve as what their callable gives; one that raises is told before anything is written."""
    command = ["init", "--model", model, "--with", "he+lsuv"]
    for name in ("listed", "batches"):
        main([*command, "--data", f"mine_for_cli:{name}", "--out", str(tmp_path / f"{name}.safetensors")])
    one, other = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("listed", "batches"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    with pytest.raises(DataError, match="mine_for_cli:broken' cannot be made: .*no weights today"):
        main([*command, "--data", "mine_for_cli:broken", "--out", str(tmp_path / "none.safetensors")])
    assert not (tmp_path / "none.safetensors").exists()
