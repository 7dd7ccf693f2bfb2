"""A real Ray cluster on this machine, one for all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU each; more are added with `cluster.add_node(**NODE)`."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'powerhouse-init[ray]'")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DISABLE_IMPORT_WARNING": "1"}
    from ray.cluster_utils import Cluster

    # Not pytest's folder: the names of sockets in it would be too long.
    folder = tempfile.mkdtemp(prefix="ray")
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Cluster leaves its address there, whatever temp_dir says
    head = NODE | {"include_dashboard": False, "temp_dir": folder}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(**NODE)
    yield made
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
