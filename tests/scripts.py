"""Scripts as modules: the benchmarks, and programs of the tests that also run as processes of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
