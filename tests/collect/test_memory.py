"""Freed memory is kept: page faults are counted, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import collect
from collect.memory import keep_freed_memory

COUNT = """
import resource, sys, torch
from collect.data import load
from collect.memory import keep_freed_memory
from collect.recipe import Recipe
from collect.training import Setup, Stack
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
stack = Stack(Setup(Recipe(architecture="cnn-3-w16"), load("digits"), device=torch.device("cpu")), range(16))
for _ in range(15):
    stack.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    stack.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    folder = Path(collect.__file__).parents[1]
    command = [sys.executable, "-c", COUNT, way]
    return int(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_training_steps_cost_no_page_faults() -> None:
    """Six steps; as it is, every one has thousands."""
    assert 10 * faults("keep") < faults("as it is")
