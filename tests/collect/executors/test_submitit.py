"""What only submitit does: slices of the plan, jobs that are queued again or lost. Its local executor is our SLURM."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from collect import executors, unfinished
from collect.durable import _is_running
from collect.executors import make
from collect.executors.attempt import Attempt, Elsewhere
from collect.executors.submitit import Slice, Submitit
from collect.perform import Outcome
from collect.plan import plan
from collect.recipe import Recipe
from collect.runner import collect
from collect.workers import GRACE_SECONDS
from collect.zoo import scan
from collect.zoo_file import verify
from generators.commandline import Interrupted
from generators.errors import ConfigError

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install 'powerhouse-init[slurm]'")

SLOW = Recipe(architecture="mlp-1-w4", epochs=40, batch_size=64)


def digests(folder: Path) -> dict[str, str]:
    return {path.stem: verify(path).digest for path in folder.glob("*.h5")}


def test_a_preempted_job_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's signal comes to all processes of a job in the middle of a training."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(executors.submitit, "SLICES", 1)
    tasks, folder = plan([SLOW], runs=3, together=1), tmp_path / "zoo"
    collect(tasks, tmp_path / "here", workers=0)
    signalled: list[int] = []

    def preempt() -> None:
        end = time.monotonic() + 60

        def claims_of_the_second() -> list[Path]:
            stored = {path.stem for path in folder.glob("*.h5")}
            found = [path for path in folder.glob(".*.h5.claim@*") if path.name[1:].partition(".")[0] not in stored]
            return found if stored else []

        while not (claims := claims_of_the_second()):
            assert time.monotonic() < end
            time.sleep(0.02)
        worker = int(claims[0].name.split("@")[2].removesuffix(".tmp"))
        job = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        for process in (worker, job):
            os.kill(process, signal.SIGUSR2)
            signalled.append(process)

    thread = threading.Thread(target=preempt)
    thread.start()
    result = collect(tasks, folder, executor=make("submitit", workers=1, cluster="local", poll=0.2))
    thread.join()
    log = "".join(path.read_text() for path in (folder / "slurm").glob("*_log.*"))
    assert len(signalled) == 2 and "preempted" in log and "Requeued" in log
    assert len(result.trained) == 3  # what the first run of the job did is not forgotten
    assert digests(folder) == digests(tmp_path / "here")
    assert not list(folder.glob(".*")) and not (folder / "unfinished").exists()
    headers, bad = scan(folder)  # submitit's files are in nobody's way
    assert len(headers) == 3 and not bad


def test_a_cancelled_job_ends_where_this_process_ignores_interrupts(tmp_path: Path) -> None:
    """What a shell's script runs in the background ignores SIGINT, and submitit cancels its local jobs by that."""
    task = plan([replace(SLOW, epochs=100_000)], runs=1)[0]
    executor = make("submitit", workers=1, cluster="local", poll=0.2)
    working: list[int] = []

    def cancel() -> None:
        end = time.monotonic() + 60
        while not (claims := list(tmp_path.glob(".*.h5.claim@*"))) and time.monotonic() < end:
            time.sleep(0.02)
        working.extend(int(claim.name.split("@")[2].removesuffix(".tmp")) for claim in claims)
        executor.cancel()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Interrupted):
            collect([task], tmp_path, executor=executor)
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    end = time.monotonic() + GRACE_SECONDS  # submitit kills what does not end at once; the worker saves and follows
    while _is_running(*working) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(working) == 1 and not _is_running(working[0])
    assert unfinished.path_of(tmp_path, task.id).exists()


def test_what_is_queued_again_is_what_is_left(tmp_path: Path) -> None:
    first, second = (Attempt(task, tmp_path, None) for task in plan([SLOW], runs=2, together=1))
    running = Slice([first, second], (), grace=1.0)
    running.executor, running.thread = make("processes"), threading.Thread(target=lambda: None)
    running.thread.start()
    running.results.append(Outcome(first.task))
    again = running.checkpoint()
    assert again.function.attempts == [second] and again.function.results == [Outcome(first.task)]
    assert running.executor.stop.is_set()


def test_of_a_lost_job_counts_what_lies_in_the_zoo(tmp_path: Path) -> None:
    there, missing = plan([SLOW], runs=2, together=1)
    collect([there], tmp_path, workers=0)

    def result() -> None:
        raise submitit.core.utils.UncompletedJobError("no result")

    job = SimpleNamespace(job_id="7", paths=SimpleNamespace(stderr="7.err"), result=result)
    executor = make("submitit", cluster="local")
    assert isinstance(executor, Submitit)
    attempts = [Attempt(task, tmp_path, None) for task in (there, missing)]
    found, failed = executor._results(job, Slice(attempts, (), grace=1.0))
    assert found == Elsewhere(there, done=True)
    assert isinstance(failed, Outcome) and failed.error == "job 7 ended early; see 7.err"


@pytest.mark.parametrize("wrong", [{"slurm_partiton": "long"}, {"timeout_min": "soon"}])
def test_settings_of_slurm_are_checked_before_anything_is_done(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"does not take these settings: .*{next(iter(wrong))}"):
        make("submitit", cluster="local", slurm=wrong)


def test_without_slurm_nothing_starts_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, submitit would run the whole array here, all elements at once."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no SLURM on this machine .*--executor processes"):
        make("submitit")


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a SLURM that does nothing else writes down what it is given."""
    script = tmp_path / "bin" / "sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/batch.sh\necho "Submitted batch job 5"\n')
    for tool in (script, script.with_name("srun"), script.with_name("scancel"), script.with_name("sacct")):
        tool.write_text(script.read_text() if tool == script else "#!/bin/sh\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return tmp_path / "batch.sh"


@pytest.mark.parametrize(
    ("device", "settings", "asked"),
    [
        ("cpu", {}, []),
        ("cuda", {}, ["--gpus-per-node=1"]),
        ("cuda", {"slurm_gres": "gpu:a100:2"}, ["--gres=gpu:a100:2"]),
        ("cuda", {"gpus_per_node": "4"}, ["--gpus-per-node=4"]),
    ],
)
def test_jobs_ask_for_a_gpu_where_they_train_on_one_unless_the_settings_do(
    tmp_path: Path, batch: Path, device: str, settings: dict[str, str], asked: list[str]
) -> None:
    executor = make("submitit", workers=1, poll=0.05, grace=0.1, slurm=settings)
    executor.submit(Attempt(task, tmp_path, None, device=device) for task in plan([SLOW], runs=1))
    threading.Timer(0.3, executor.cancel).start()
    with pytest.raises(Exception, match="asked to stop"):
        list(executor.finished(lambda *progress: None))
    lines = [line.removeprefix("#SBATCH ") for line in batch.read_text().splitlines()]
    assert [line for line in lines if line.startswith(("--gpu", "--gres"))] == asked


def test_slices_have_a_share_of_the_long_tasks_each_and_the_array_a_cap(tmp_path: Path, batch: Path) -> None:
    tasks = plan([SLOW], runs=9, together=1)
    executor = make("submitit", workers=2, poll=0.05, grace=0.1, slurm={"slurm_partition": "long", "timeout_min": "90"})
    executor.submit(Attempt(task, tmp_path, None) for task in tasks)
    threading.Timer(0.3, executor.cancel).start()
    with pytest.raises(Exception, match="asked to stop"):
        list(executor.finished(lambda *progress: None))
    written = batch.read_text()
    assert "--array=0-7%2" in written and "--partition=long" in written and "--signal=USR2@90" in written
    assert "--time=90\n" in written
    parts = [
        submitit.core.utils.DelayedSubmission.load(path).function
        for path in (tmp_path / "slurm").glob("*submitted.pkl")
    ]
    assert sorted(len(part.attempts) for part in parts) == [1] * 7 + [2]
    assert {each.task.id for part in parts for each in part.attempts} == {task.id for task in tasks}
