"""What the benchmarks share: CPU time, peak memory, a process of one's own, and the record of figures.

A benchmark is a script that puts this checkout in the place of its own folder in Python's path, where `collect` would
otherwise be the benchmark of that name.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD

from collect.durable import durable
from collect.provenance import provenance


def cpu_seconds(work: Callable[[], object], rounds: int = 1) -> float:
    """CPU time of this process for `work`, the median of some rounds."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def plain_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A training step as everyone writes it: forward, backward, SGD."""
    optimiser = SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimiser.step()

    return step


class Peak:
    """The rise of this process's peak memory from now on, as Linux counts it."""

    def __init__(self) -> None:
        gc.collect()
        self._before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def rise(self) -> int:
        """In bytes."""
        return _memory("VmHWM") - self._before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_process(script: str, *arguments: object) -> dict[str, float]:
    """What `script one-side ARGUMENTS` prints last, JSON, in a fresh interpreter with one thread.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, script, "one-side", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(figures: Mapping[str, float], meaning: Callable[[str], str] | None = None) -> None:
    """Print a table of figures, with what they mean if that is told."""
    table = Table("figure", "what", "value") if meaning else Table("figure", "value")
    for name, value in figures.items():
        told = (meaning(name),) if meaning else ()
        table.add_row(name, *told, f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
    Console(soft_wrap=True).print(table)


def store(json_file: Path, figures: Mapping[str, float], **facts: Any) -> None:
    """Write flat JSON: the figures, the facts given, machine, versions, commit and load."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    with durable(json_file) as temporary:
        record = {**provenance(), "load_average": os.getloadavg()[0], **facts, **figures}
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True))
