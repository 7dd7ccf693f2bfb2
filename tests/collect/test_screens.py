"""Tables stay short and say what differs."""

from __future__ import annotations

from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.screens import MOST_ROWS, plan_table, swept, zoo_table

TINY = Recipe(architecture="mlp-1-w4", epochs=1)


def test_swept_names_what_differs_and_shortens_long_rows() -> None:
    rates = [0.01 * (number + 1) for number in range(20)]
    found = swept(sweep(TINY, init=["he", "xavier"], lr=rates, saved=["last", (0, 1)]))
    assert found == "init he, xavier; lr 0.01 to 0.2 (20 values); saved last, (0, 1)"
    assert swept([TINY]) == ""


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
    table = zoo_table([], missing)
    assert [column.header for column in table.columns] == [
        "data", "architecture", "init", "networks", "diverged", "test accuracy"
    ]  # fmt: skip
    assert list(table.columns[3].cells) == [f"0 of {2 * MOST_ROWS}"] * 2
