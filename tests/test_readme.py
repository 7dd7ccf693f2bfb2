"""README snippets run as they stand, and the commands it names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from collect.runner import collect
from collect.spec import from_json
from generators import list_initialisers

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_snippets_run_and_give_what_their_comments_say() -> None:
    """The second goes on with the model of the first."""
    first, second = (each for each in SNIPPETS if "generators.init" in each)
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    report = names["report"]
    assert {*report.generated, *report.fallbacks, *report.kept} == set(names["model"].state_dict())
    assert names["ensemble"]["fc.weight"].shape == (5, 10, 512)
    exec(compile(second, "README.md", "exec"), names)
    model, trained, report = (names[name] for name in ("model", "trained", "report"))
    assert {*report.generated, *report.fallbacks, *report.kept} == set(model.state_dict())
    assert torch.equal(model.conv1.weight, trained.conv1.weight)


def test_the_table_of_initialisers_is_the_registry() -> None:
    rows = dict(
        re.findall(r"^\| (pointwise|refining|inherited|of hypernetworks) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    )
    found = {name: kind for kind, cell in rows.items() for name in re.findall("`(.*?)`", cell)}
    registered = {
        info.name: "of hypernetworks" if info.name.startswith("hyperfan") else info.kind
        for info in list_initialisers()
        if "checkpoint" not in info.needs
    }
    assert found == registered


def test_the_spec_and_what_is_read_from_its_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec plans what its comment says; with fewer and shorter runs it is collected, and the snippet reads it."""
    (block,) = (each for each in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) if "spec.json" in each)
    (text,) = re.findall(r"echo '(.*?)'", block, flags=re.DOTALL)
    tasks = from_json(json.loads(text)).plan()
    networks = sum(len(task.seeds) for task in tasks)
    assert f"# {len({task.recipe for task in tasks})} recipes, {networks} networks" in block
    small = json.loads(text) | {"runs": 4}
    small["recipe"]["epochs"], small["random"]["count"] = 4, 1
    collect(from_json(small).plan(), tmp_path / "zoo", workers=0)
    (snippet,) = (each for each in SNIPPETS if "Zoo(" in each)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    good, kernels, network = (names[name] for name in ("good", "kernels", "network"))
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert kernels.shape == (len(good), sum(part.weight.numel() for part in convolutions)) and len(good) > 0
    assert {run["architecture"] for run in good.runs} == {"resnet-8-w4"}


def test_the_table_holds_the_figures_of_the_recorded_run() -> None:
    """Every number of the table against docs/results/demo/results.json, which `make demo` wrote."""
    figures = json.loads((ROOT / "docs/results/demo/results.json").read_text())["figures"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if "-w12 |" in line]
    assert len(rows) == 15
    for architecture, start, *cells in rows:

        def percent(key: str, row: str = f"{architecture}/{start}") -> str:
            return f"{100 * figures[f'{row}/{key}']:.1f}"

        steps = [percent(f"step_{step}/accuracy_mean") for step in (0, 10, 100)]
        assert cells[:4] == [*steps, f"{percent('accuracy_end_mean')} ± {percent('accuracy_end_std')}"]
        bounds = [
            f"{100 * figures.get(f'{architecture}/{start}/step_240/difference_{key}', 0):+.1f}"
            for key in ("mean", "low", "high")
        ]
        assert cells[4] == ("" if start == "he" else f"{bounds[0]} [{bounds[1]}, {bounds[2]}]")


def test_the_headline_holds_the_figures_of_the_recorded_cifar10_run() -> None:
    """The CIFAR-10 sentence against docs/results/cifar10-long/results.json."""
    figures = json.loads((ROOT / "docs/results/cifar10-long/results.json").read_text())["figures"]

    def cell(start: str, key: str) -> str:
        return f"{100 * figures[f'resnet-20-w16/{start}/{key}']:.1f}"

    ghn, he = "long-s0", "he"
    words = " ".join(TEXT.split())
    halfway = [cell(start, "step_351/accuracy_mean") for start in (ghn, he)]
    end = [f"{cell(start, 'accuracy_end_mean')} ± {cell(start, 'accuracy_end_std')}" for start in (ghn, he)]
    assert f"{halfway[0]} against {halfway[1]} % after 351 steps" in words
    assert f"{end[0]} against {end[1]} % after 702" in words
    assert f"starts at {cell(ghn, 'step_0/accuracy_mean')} %" in words
    lead, low, high = (cell(ghn, f"step_702/difference_{key}") for key in ("mean", "low", "high"))
    assert f"a difference of {lead} points (95 %: {low} to {high})" in words


def test_there_is_a_snippet_and_every_named_file_and_target_exists() -> None:
    assert SNIPPETS
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
