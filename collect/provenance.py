"""Which software on which machine made a file."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import h5py
import torch


@functools.cache
def commit() -> str:
    """The commit of this checkout, with `-dirty` if files were changed since; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
        return found.stdout.strip()
    return "unknown"


def provenance() -> dict[str, str | int]:
    """Versions, commit, machine and the time now, as flat values for attributes or JSON."""
    try:
        package = version("powerhouse-init")
    except PackageNotFoundError:
        package = "unknown"
    return {
        "package_version": package,
        "torch_version": str(torch.__version__),  # a subclass of str that HDF5 does not know
        "h5py_version": h5py.__version__,
        "python_version": platform.python_version(),
        "git_commit": commit(),
        "machine": platform.machine(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """What a checkpoint's card says of the software that fitted it: no times, so that equal fits have equal cards."""
    made = provenance()
    return {name: str(made[name]) for name in ("package_version", "torch_version", "git_commit")}
