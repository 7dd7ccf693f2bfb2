"""Tables stay short and say what differs; their numbers are those of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collect.index import open_index
from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.screens import MOST_ROWS, lasting, plan_table, show, swept, table_of, zoo_table
from collect.zoo import scan

TINY = Recipe(architecture="mlp-1-w4", epochs=1)


def test_swept_names_what_differs_and_shortens_long_rows() -> None:
    rates = [0.01 * (number + 1) for number in range(20)]
    found = swept(sweep(TINY, init=["he", "xavier"], lr=rates, saved=["last", (0, 1)]))
    assert found == "init he, xavier; lr 0.01 to 0.2 (20 values); saved last, (0, 1)"
    assert swept([TINY]) == ""


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0.0245, "less than a minute"),
        (1, "1.0 minutes"),
        (119, "119.0 minutes"),
        (5_495, "3.8 days"),
        (1_500, "25.0 hours"),
        (5.5e6, "3,819.4 days"),
    ],
)
def test_times_are_in_a_unit_that_suits_them(minutes: float, words: str) -> None:
    assert lasting(minutes) == words


def test_a_long_name_is_folded_and_no_letter_of_it_is_lost(capsys: pytest.CaptureFixture) -> None:
    """A path as the initialiser, on a narrow terminal."""
    name = "runs/a-noise-ghn-with-a-long-name-that-fills-the-line-and-more-than-half-of-another-one"
    table = table_of("init", "networks", left=("init",))
    table.add_row(name, "8")
    show("title", table=table)
    shown = "".join(capsys.readouterr().out.split()[1:])
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown and shown.replace("8", "").endswith(name)


def test_a_plan_of_many_architectures_has_one_row_per_data_set() -> None:
    few = plan(sweep(TINY, architecture=["mlp-1-w4", "mlp-1-w5"], lr=[0.1, 0.2]), runs=3, together=2)
    table = plan_table(few)
    assert table.row_count == 2
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["recipes"] == ["2", "2"] and cells["populations"] == ["4", "4"] and cells["networks"] == ["6", "6"]
    many = plan(sweep(TINY, architecture=[f"mlp-1-w{width + 1}" for width in range(MOST_ROWS + 1)]), runs=1)
    table = plan_table(many)
    assert table.row_count == 1 and [column.header for column in table.columns][:2] == ["data", "recipes"]


def test_a_zoo_of_many_learning_rates_has_one_row_for_all() -> None:
    missing = plan(sweep(TINY, init=["he", "xavier"], lr=[0.01 * (number + 1) for number in range(MOST_ROWS)]), runs=2)
    table = zoo_table(None, missing)
    assert [column.header for column in table.columns] == [
        "data", "architecture", "init", "networks", "diverged", "test accuracy"
    ]  # fmt: skip
    assert list(table.columns[3].cells) == [f"0 of {2 * MOST_ROWS}"] * 2


def test_the_numbers_of_a_zoo_are_those_of_its_files(tmp_path: Path) -> None:
    """Counts, mean and deviation per row, from the columns of the index, against run by run from every file."""
    short = replace(TINY, batch_size=256)
    tasks = plan(sweep(short, init=["he", "xavier"], lr=[0.1, 1e30]), runs=5, together=2)
    collect(tasks[1:], tmp_path, workers=0)
    index, _ = open_index(tmp_path)
    assert index is not None
    table = zoo_table(index.runs, tasks[:1])
    cells = [list(column.cells) for column in table.columns]
    expected = []
    for init, lr, wanted in (("he", 0.1, "3 of 5"), ("he", 1e30, "5"), ("xavier", 0.1, "5"), ("xavier", 1e30, "5")):
        values = [
            header.metrics[row, -1, header.metric_names.index("test_accuracy")]
            for header in scan(tmp_path)[0]
            for row, run in enumerate(header.runs)
            if (run["init"], run["lr"], run["status"]) == (init, lr, "ok")
        ]
        words = f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else ""
        expected.append(("digits", "mlp-1-w4", init, str(lr), "1", wanted, str(0 if values else 5), words))
    assert sorted(zip(*cells, strict=True)) == sorted(expected)
    assert any(row[-1] for row in expected) and not all(row[-1] for row in expected)
