"""`import generators` loads little: checked as a set of modules, which does not depend on the machine's mood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = (
    "h5py", "sklearn", "scipy", "torchvision", "timm", "wandb", "ray", "torch_geometric", "tyro", "rich", "matplotlib",
    "huggingface_hub", "torchmetrics", "pandas", "collect", "train_generators",
)  # fmt: skip

PROBE = """
import json, sys
import torch, numpy, safetensors
with_torch = set(sys.modules)
import generators
bare = set(sys.modules) - with_torch
generators.init(torch.nn.Linear(2, 2), "he")
generators.list_generators()
used = set(sys.modules) - with_torch
import generators.inventory
assert len(generators.inventory(torch.nn.Linear(2, 2))) == 2
print(json.dumps([sorted(bare), sorted(used)]))
"""


def test_import_loads_nothing_heavy() -> None:
    """Neither the import nor a pointwise init brings in a heavy package.

    The import brings one module of our own: the function `generators.inventory` must stand in front of its module.
    """
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    bare, used = json.loads(answer.stdout)
    assert "generators" in bare
    assert "generators.initialiser" in used
    assert not {name.partition(".")[0] for name in (*bare, *used)} & set(HEAVY)
    assert [name for name in bare if name.startswith("generators")] == ["generators", "generators.inventory"]


def test_public_names_resolve() -> None:
    """Every name of `__all__` can be had, and a name that does not exist is an AttributeError."""
    import generators

    for name in generators.__all__:
        assert getattr(generators, name) is not None
    assert set(generators.__all__) <= set(dir(generators))
    assert not hasattr(generators, "no_such_name")
