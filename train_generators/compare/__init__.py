"""Compare initialisers over populations that have been trained already: `run(CompareConfig(zoo=(folder,)))`.

Evaluation is collection: the populations hold the curves and the weights, this package only reads them. The config is
light to import; what reads, tests and plots is loaded with the first use of `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train_generators.compare.config import CompareConfig

if TYPE_CHECKING:
    from train_generators.compare.comparison import run
    from train_generators.compare.result import ComparisonResult

__all__ = ["CompareConfig", "ComparisonResult", "main", "run"]


def main(config: CompareConfig) -> None:
    """Compare initialisers over the trained populations of one or more zoo folders.

    Prints a table and writes report.html, report.md, results.json, plots/ and records/.
    """
    from train_generators.compare.comparison import run

    run(config)


def __getattr__(name: str) -> Any:
    if name in ("ComparisonResult", "run"):
        from train_generators.compare import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
