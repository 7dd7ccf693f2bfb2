"""`InitReport`: the partition of the state dict, and its readable and JSON forms."""

from __future__ import annotations

import json

import pytest

from generators.errors import ProposalError
from generators.report import InitReport


def _report(**changes: object) -> InitReport:
    values: dict = dict(
        initialiser="he+lsuv", seed=1, member=2, generated={"a": "he", "b": "he"}, fallbacks={"c": "he (why)"},
        kept={"d": "frozen"}, statistics={"a": {"std": 0.5}}, notes=("wide",),
    )  # fmt: skip
    return InitReport(**(values | changes))


def test_partition_is_accepted() -> None:
    report = _report()
    report.check({"a", "b", "c", "d"})
    assert report.coverage == 0.5


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, {"a", "b", "c", "d", "e"}),
        ({}, {"a", "b", "c"}),
        ({"kept": {"d": "frozen", "a": "also here"}}, {"a", "b", "c", "d"}),
    ],
)
def test_what_is_no_partition_is_refused(changes: dict, names: set[str]) -> None:
    with pytest.raises(ProposalError, match="exactly once"):
        _report(**changes).check(names)


def test_json_holds_everything() -> None:
    read = json.loads(_report().to_json())
    assert read["generated"] == {"a": "he", "b": "he"}
    assert read["statistics"]["a"]["std"] == 0.5
    assert read["notes"] == ["wide"]


def test_text_counts_reasons() -> None:
    text = str(_report())
    assert "2 tensors generated, 1 by a fallback, 1 kept" in text
    assert "2 x he\n" in text
    assert "note: wide" in text


def test_empty_report() -> None:
    assert _report(generated={}, fallbacks={}, kept={}).coverage == 0.0
