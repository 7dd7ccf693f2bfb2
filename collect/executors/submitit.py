"""In a SLURM job array, through submitit: each element of the array takes a slice of the plan.

A job runs worker processes on the cores that it was given. Before its time is over, or when it is preempted, SLURM
sends a signal: the workers save what they need, and the job is queued again with what is left. Jobs share nothing but
the zoo's folder, which every node must see under the same path. They go on if the collector that started them is
killed; another collector on the same folder gives way to them.

submitit keeps a pickle and two logs per job in a folder of its own; nothing in it is needed once the array has ended.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from collect.executors.attempt import Attempt, Elsewhere, check
from collect.executors.base import Executor, Result, at_least_one
from collect.executors.processes import Processes
from collect.perform import Outcome
from collect.workers import GRACE_SECONDS, Tick
from collect.zoo_file import path_of
from generators.commandline import Interrupted
from generators.errors import ConfigError

WORKERS = 16  # elements of an array that run at once
SLICES = 4  # elements per worker, so that none ends long after the others; few, for clusters dislike short jobs
DEFAULTS: dict[str, Any] = {"name": "collect", "timeout_min": 240, "cpus_per_task": 1}
TIMEOUTS = 1000  # how often a job may be queued again; what it did is kept
LOGS = "slurm"  # folder in the zoo
GPU_WORDS = ("gpu", "gres")  # in the names of settings that ask for GPUs


def _submitit() -> ModuleType:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("the executor 'submitit' needs submitit: pip install 'powerhouse-init[slurm]'") from error
    return submitit


def _value(text: Any) -> Any:
    """What a setting from a command line means: "240" is a number, "long" a text."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, processes are started such that SIGINT ends them.

    submitit cancels the jobs of its local cluster by SIGINT. Where this process ignores it, as what a script runs in
    the background does, they would inherit that and stay.
    """
    main = threading.current_thread() is threading.main_thread()  # no other may set signal handlers
    ignored = main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Slice:
    """The work of one element of the array; submitit calls it, and `checkpoint` when its time is over.

    Args:
        attempts: what to do.
        results: what earlier runs of this slice did.
        grace: seconds from `checkpoint` to its return, at most; the signal must come earlier before the end.
    """

    def __init__(self, attempts: Sequence[Attempt], results: Sequence[Result], grace: float) -> None:
        self.attempts, self.results, self.grace = list(attempts), list(results), grace

    def _work(self) -> None:
        self.executor.submit(self.attempts)
        try:
            self.results.extend(self.executor.finished(lambda *progress: None))
        except Interrupted as reason:
            print(f"{reason}: {len(self.results)} results", flush=True)  # into the log of the job

    def __call__(self) -> list[Result]:
        # The work has a thread of its own, for `checkpoint` is called by a signal handler in the main thread, and may
        # return only when all is saved.
        self.executor = Processes(grace=self.grace)
        self.thread = threading.Thread(target=self._work)
        self.thread.start()
        try:
            self.thread.join()
        finally:
            self._end()
        return self.results

    def _end(self) -> None:
        self.executor.cancel()
        self.thread.join()

    def checkpoint(self) -> Any:
        """What is to be queued in place of this job."""
        self._end()
        done = {result.task.id for result in self.results}
        left = [attempt for attempt in self.attempts if attempt.task.id not in done]
        return _submitit().helpers.DelayedSubmission(Slice(left, self.results, self.grace))


class Submitit(Executor):
    """One job array per collection.

    Args:
        workers: elements of the array that run at once at most.
        slurm: settings of `submitit.AutoExecutor.update_parameters`, such as `timeout_min`, `cpus_per_task` (each has a
            worker process), `mem_gb`, `slurm_partition`, `slurm_account`; numbers may come as text. Where the device
            is cuda and no setting speaks of GPUs, `gpus_per_node` is 1.
        cluster: "slurm"; or "local" for processes of this machine, all at once, to try things out.
        logs: folder of submitit's files; None for `slurm` in the zoo.
        poll: seconds between looks at the zoo and the jobs.
        grace: seconds that jobs have to save what they need when they are stopped.

    Raises:
        ConfigError: submitit is not installed, there is no SLURM here, or a setting makes no sense.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        slurm: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
        logs: str | Path | None = None,
        poll: float = 5.0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        super().__init__()
        self._submitit, self._cluster, self._poll, self._grace = _submitit(), cluster, poll, grace
        self._workers = at_least_one(workers) or WORKERS
        self._settings = DEFAULTS | {"slurm_array_parallelism": self._workers}
        self._settings |= {key: _value(value) for key, value in (slurm or {}).items()}
        self._logs = logs
        if cluster == "slurm" and shutil.which("srun") is None:  # submitit would run the whole array here, at once
            raise ConfigError(
                "there is no SLURM on this machine (no srun in PATH); log in to the cluster, or train in worker "
                "processes with --executor processes"
            )
        with tempfile.TemporaryDirectory() as empty:
            self._array(empty, device="cpu")  # wrong settings are found before anything is written

    def _array(self, logs: str | Path, *, device: str) -> Any:
        """The executor of submitit, with all settings."""
        settings = self._settings
        if torch.device(device).type == "cuda" and not any(word in name for name in settings for word in GPU_WORDS):
            settings = settings | {"gpus_per_node": 1}
        try:
            limits = {f"{cluster}_max_num_timeout": TIMEOUTS for cluster in ("slurm", "local")}
            array = self._submitit.AutoExecutor(logs, cluster=self._cluster, **limits)
            array.update_parameters(**settings)
        except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"submitit does not take these settings: {str(error).splitlines()[0]}") from error
        return array

    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """See `Executor.finished`. A job that is lost gives an error for each population that it leaves undone."""
        if not self.waiting:
            return
        attempts = list(self.waiting)
        self.waiting.clear()
        array = self._array(self._logs or attempts[0].folder / LOGS, device=attempts[0].device)
        number = min(len(attempts), SLICES * self._workers)
        slices = [Slice(attempts[first::number], (), self._grace) for first in range(number)]  # of about equal cost
        with _interruptible(), array.batch():
            submitted = [array.submit(each) for each in slices]
        running = list(zip(submitted, slices, strict=True))
        unseen = {path_of(attempt.folder, attempt.task.id): attempt.task.id for attempt in attempts}
        try:
            while running:
                for job, part in [pair for pair in running if pair[0].done()]:
                    running.remove((job, part))
                    yield from self._results(job, part)
                for path in [path for path in unseen if path.exists()]:
                    on_tick(unseen.pop(path), 1.0)
                if self.stop.is_set():
                    raise Interrupted("asked to stop")
                if running:
                    self.stop.wait(self._poll)
        finally:
            self._end([job for job, _ in running])

    def _results(self, job: Any, part: Slice) -> list[Result]:
        """What a job did. If it was lost, what lies in the zoo counts."""
        try:
            return job.result()
        except (self._submitit.core.utils.UncompletedJobError, self._submitit.core.utils.FailedJobError):
            lost = f"job {job.job_id} ended early; see {job.paths.stderr}"
            return [
                Elsewhere(each.task, done=True)
                if check(each.task, each.folder) is None
                else Outcome(each.task, error=lost)
                for each in part.attempts
            ]

    def _end(self, jobs: list[Any]) -> None:
        """Cancel jobs, and wait until they are gone."""
        for job in jobs:
            job.cancel(check=False)
        end = time.monotonic() + self._grace
        while any(not job.done() for job in jobs) and time.monotonic() < end:
            time.sleep(min(self._poll, 1.0))
