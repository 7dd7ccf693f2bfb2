"""On a Ray cluster: one plain remote task per population, one CPU each, and a GPU where it trains on one.

Ray (Moritz et al., 2018) restarts tasks whose process or node is lost, which is safe because an attempt may run twice.
Data sets lie in the object store, once per node, and workers read them there without a copy. What comes back is ids and
a summary. The zoo's folder must be on a file system that every node sees under the same path; so must the files of a
checkpoint that a recipe starts from. Progress shows whole populations.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collect import data
from collect.executors.attempt import Attempt
from collect.executors.base import Executor, Result, at_least_one
from collect.perform import Outcome
from collect.workers import GRACE_SECONDS, Tick, stoppable
from generators.commandline import Interrupted
from generators.errors import ConfigError, PowerhouseError

RETRIES = 3  # of a task whose process or node was lost
CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.5
_PARTS = ("train", "validation", "test")


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the executor 'ray' needs Ray: pip install 'powerhouse-init[ray]'") from error
    return ray


def _reach(address: str | None) -> None:
    """`OSError` if nobody listens at an address `HOST:PORT`: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


# --- data sets: arrays in the object store, tensors over them in the workers ---------------------------------------


def _as_arrays(images: data.ImageSet) -> dict[str, Any]:
    """The fields of a data set, with numpy arrays, which Ray shares between processes."""
    parts = {name: getattr(images, name) for name in _PARTS}
    return vars(images) | {name: (part.images.numpy(), part.labels.numpy()) for name, part in parts.items()}


def _as_images(stored: dict[str, Any]) -> data.ImageSet:
    """The data set over arrays in shared, read-only memory. Training never writes to its images."""

    def tensor(array: np.ndarray) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)

    parts = {name: data.Split(*map(tensor, stored[name])) for name in _PARTS}
    return data.ImageSet(**stored | parts)


class _Store:
    """Data sets in the object store, each put there when it is first asked for."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._references: dict[tuple, Any] = {}

    def reference(self, attempt: Attempt) -> Any:
        """Of the data set of `attempt`; None if it is not here as planned, which leaves it to the worker to read."""
        name, digest = attempt.task.recipe.data, attempt.task.data_digest
        key = (name, digest, attempt.root)
        if key not in self._references:
            self._references[key] = None
            with contextlib.suppress(PowerhouseError):
                images = data.load(name, root=attempt.root)
                if images.digest == digest:
                    self._references[key] = self._ray.put(_as_arrays(images))
        return self._references[key]


# --- in a worker ---------------------------------------------------------------------------------------------------


def _in_worker(attempt: Attempt, stored: dict[str, Any] | None) -> Result:
    if not any(attempt.folder.glob("plan-*.json")):  # the collector wrote one
        reason = f"{socket.gethostname()} does not see the zoo {attempt.folder}"
        return Outcome(
            attempt.task, error=f"{reason}; its folder must be on a file system that all nodes share", fatal=True
        )
    torch.set_num_threads(1)
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())  # so Ray tells a task that it is cancelled
    try:
        return attempt(stoppable(lambda *progress: None, stop), images=None if stored is None else _as_images(stored))
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the caller -------------------------------------------------------------------------------------------------


class Ray(Executor):
    """One remote task per population, in a bounded window.

    Args:
        address: of a cluster: "auto", "HOST:PORT"; None for the one this process is connected to or that RAY_ADDRESS
            names, else Ray is started on this machine and ended afterwards.
        workers: how many populations are trained at once at most, None for as many as there is room for.
        gpus: of each task, where the device is cuda; below 1 several share one.
        grace: seconds that tasks have to save what they need when they are stopped.

    Raises:
        ConfigError: Ray is not installed, or a number that makes no sense.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus: float = 1.0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        super().__init__()
        if not (0 < gpus <= 1 or (gpus > 1 and gpus == int(gpus))):
            raise ConfigError(f"gpus must be a share of one, such as 0.25, or a whole number, got {gpus}")
        self._ray, self._address, self._workers, self._grace = _ray(), address, at_least_one(workers), grace
        self._gpus = gpus

    @contextlib.contextmanager
    def opened(self, *, device: str) -> Iterator[None]:
        """See `Executor.opened`: Ray, connected to the cluster."""
        with self._connected():
            needs, there = self._needs(device).get("GPU", 0), self._ray.cluster_resources().get("GPU", 0)
            if torch.device(device).index:
                raise ConfigError(f"on a Ray cluster it is Ray that chooses the GPU: --device cuda, not {device}")
            if there < needs:
                raise ConfigError(
                    f"the Ray cluster has {there:g} GPUs, and each task on device {device!r} needs {needs:g}; add a "
                    "node that has one, or train on the CPU"
                )
            yield

    def _needs(self, device: str) -> dict[str, float]:
        """What each task asks of the cluster. Ray hides the GPUs of a node from tasks that ask for none."""
        return {"CPU": 1, "GPU": self._gpus} if torch.device(device).type == "cuda" else {"CPU": 1}

    def _room(self, needs: dict[str, float]) -> int:
        """How many tasks the cluster, as it is now, runs at once."""
        there = self._ray.cluster_resources()
        return max(1, min(int(there.get(name, 0) / each) for name, each in needs.items()))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Ray, initialised; what is started here is ended here."""
        ray = self._ray
        if ray.is_initialized():
            yield
            return
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            _reach(self._address)
            ray.init(address=self._address, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot connect to a Ray cluster at {self._address!r} ({error}); start one with `ray start --head`, "
                "or give no address to use this machine"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
        try:
            yield
        finally:
            ray.shutdown()

    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """See `Executor.finished`. Losing a worker or node does not end it: its tasks are tried again elsewhere."""
        if not self.waiting:
            return
        ray, needs = self._ray, self._needs(self.waiting[0].device)
        given = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0)}
        remote = ray.remote(max_retries=RETRIES, retry_exceptions=False, **given)(_in_worker)
        store = _Store(ray)
        pending: dict[Any, Attempt] = {}
        try:
            while self.waiting or pending:
                window = self._workers or 2 * self._room(needs)
                while self.waiting and len(pending) < window:
                    attempt = self.waiting.popleft()
                    pending[remote.remote(attempt, store.reference(attempt))] = attempt
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
                if self.stop.is_set():
                    raise Interrupted("asked to stop")
                for reference in ready:
                    yield self._result(reference, pending.pop(reference))
        finally:
            self.waiting.clear()
            self._end(list(pending))

    def _result(self, reference: Any, attempt: Attempt) -> Result:
        """What a remote task returned; its failure outside of our code is an outcome as well."""
        try:
            return self._ray.get(reference)
        except Interrupted:
            raise
        except self._ray.exceptions.RayError as error:
            return Outcome(attempt.task, error=f"Ray could not run it: {' '.join(str(error).split())}")

    def _end(self, pending: list[Any]) -> None:
        """Cancel tasks; those that run are asked first."""
        for reference in pending:
            self._ray.cancel(reference, force=False)
        if pending:
            _, pending = self._ray.wait(pending, num_returns=len(pending), timeout=self._grace)
        for reference in pending:
            self._ray.cancel(reference, force=True)
