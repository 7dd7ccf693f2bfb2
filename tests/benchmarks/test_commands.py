"""Every benchmark starts as its documentation says: as a script, with its own folder first in Python's path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
SCRIPTS = [path for path in FILES if "__main__" in path.read_text()]
# One process for all, which forgets our packages before each: torch is imported once.
START = """
import runpy, sys
OURS = ("collect", "generators", "train_generators")
for script in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path.insert(0, script.rpartition("/")[0])
    runpy.run_path(script, run_name="benchmark")
    import collect
    assert collect.__file__ not in sys.argv
    print(script)
"""


def test_the_benchmark_called_collect_stands_in_for_the_package_in_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, *map(str, SCRIPTS)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == list(map(str, SCRIPTS)), found.stderr[-1000:]
