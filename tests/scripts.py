"""Scripts as modules: the benchmarks, and programs of the tests that also run as processes of their own.

No test is timed: `operations` stands in for the seconds of a benchmark.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def operations(work: Callable[[], object], rounds: int = 1) -> int:
    """In place of `cpu_seconds`: products counted, the same on every machine however busy; at least one."""
    with FlopCounterMode(display=False) as counted:
        work()
    return 1 + counted.get_total_flops()


def load_script(path: Path) -> ModuleType:
    """The script at `path` as a new module. While it is loaded its folder is first in Python's path, as in a run."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look themselves up there
    before = sys.path
    sys.path = [str(path.parent), *before]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path = before
    return module
