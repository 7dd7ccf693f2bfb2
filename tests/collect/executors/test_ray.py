"""What only Ray does: shared data sets, nodes that die, nodes that do not see the zoo."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from collect import data, zoo_file
from collect.durable import _is_running
from collect.executors import make
from collect.executors import ray as module
from collect.executors.attempt import Attempt, Elsewhere
from collect.executors.ray import _as_arrays, _as_images, _in_worker
from collect.perform import Outcome
from collect.plan import plan
from collect.recipe import Recipe
from collect.runner import collect
from generators.errors import ConfigError

pytest.importorskip("ray", reason="Ray is not installed: pip install 'powerhouse-init[ray]'")

SLOW = Recipe(architecture="mlp-1-w4", epochs=40, batch_size=64)  # about a second


def digests(folder: Path) -> dict[str, str]:
    return {path.stem: zoo_file.verify(path).digest for path in folder.glob("*.h5")}


def at_work_on(node: Any, folder: Path) -> dict[str, int]:
    """Population id -> process, of those that workers of `node` have claimed."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = {}
    for path in folder.glob(".*.h5.claim@*"):
        process = int(path.name.split("@")[2].removesuffix(".tmp"))
        if int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]) == raylet:
            found[path.name[1:].partition(".")[0]] = process
    return found


@pytest.fixture
def connected(cluster: Any) -> Iterator[Any]:
    """Ray, connected by the test and not by the executor."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


def test_a_node_killed_in_the_middle_costs_nothing(connected: Any, cluster: Any, tmp_path: Path) -> None:
    tasks = plan([SLOW], runs=5, together=1)
    collect(tasks, tmp_path / "here", workers=0)
    doomed, lost = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20), {}

    def kill(amount: float) -> None:
        at_work = {} if lost else at_work_on(doomed, tmp_path / "ray")
        if at_work:
            lost.update(at_work)
            cluster.remove_node(doomed, allow_graceful=False)

    result = collect(tasks, tmp_path / "ray", executor=make("ray"), on_progress=kill)
    assert lost, "the node was to be killed while it trained"
    end = time.monotonic() + 30
    while any(map(_is_running, lost.values())):
        assert time.monotonic() < end, "the workers of a node were to end with it"
        time.sleep(0.1)
    assert connected.is_initialized(), "what the executor did not start it must not end"
    assert lost.keys() < set(result.trained + result.found) == {task.id for task in tasks}
    assert digests(tmp_path / "ray") == digests(tmp_path / "here")
    assert not list((tmp_path / "ray").glob(".*"))


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    with pytest.raises(ConfigError, match=r"cannot connect .* `ray start --head`"):
        collect(plan([SLOW], runs=1), zoo, executor=make("ray", address="127.0.0.1:1"), config={"who": "began"})
    assert not zoo.exists()


def test_a_cluster_is_not_asked_for_when_nothing_is_left_to_do(tmp_path: Path) -> None:
    tasks = plan([SLOW], runs=1)
    collect(tasks, tmp_path, workers=0)
    assert collect(tasks, tmp_path, executor=make("ray", address="127.0.0.1:1")).found == (tasks[0].id,)


def test_a_cluster_without_gpus_is_refused_before_anything_is_written(connected: Any, tmp_path: Path) -> None:
    zoo, tasks = tmp_path / "zoo", plan([SLOW], runs=1)
    with pytest.raises(ConfigError, match="has 0 GPUs, and each task on device 'cuda' needs 1"):
        collect(tasks, zoo, executor=make("ray"), device="cuda")
    with pytest.raises(ConfigError, match="it is Ray that chooses"):
        collect(tasks, zoo, executor=make("ray"), device="cuda:1")
    assert not zoo.exists()
    for gpus in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="a share of one"):
            make("ray", gpus=gpus)


class Stub:
    """Stands for Ray, connected to a cluster with 16 CPUs and 2 GPUs: notes what is asked for, gives each back."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.pending: list[int] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0, "GPU": 2.0}

    def remote(self, **options: Any) -> Any:
        self.asked.append(options)
        return lambda function: SimpleNamespace(remote=lambda attempt, images: Elsewhere(attempt.task, done=True))

    def put(self, value: Any) -> None:
        return None

    def wait(self, references: list, *, num_returns: int, timeout: float) -> tuple[list, list]:
        self.pending.append(len(references))
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        return reference


@pytest.mark.parametrize(
    ("device", "gpus", "asked", "window"), [("cuda", None, 1.0, 4), ("cuda", 0.25, 0.25, 16), ("cpu", None, 0, 32)]
)
def test_tasks_ask_for_a_gpu_where_they_train_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: float | None, asked: float, window: int
) -> None:
    """And no more of them wait at once than the cluster needs to stay busy."""
    stub, tasks = Stub(), plan([SLOW], runs=40, together=1)
    monkeypatch.setattr(module, "_ray", lambda: stub)
    result = collect(tasks, tmp_path, executor=make("ray", gpus=gpus), device=device)
    assert set(result.found) == {task.id for task in tasks}
    (options,) = stub.asked
    assert (options["num_cpus"], options["num_gpus"]) == (1, asked) and not options["retry_exceptions"]
    assert max(stub.pending) == window


def test_data_sets_cross_the_object_store_as_they_are() -> None:
    images = data.load("digits")
    arrays = _as_arrays(images)
    for part in ("train", "validation", "test"):
        for array in arrays[part]:
            array.flags.writeable = False  # as Ray gives them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = _as_images(arrays)
    assert back.describe() == images.describe()
    for part in ("train", "validation", "test"):
        for name in ("images", "labels"):
            expected, found = (getattr(getattr(each, part), name) for each in (images, back))
            assert torch.equal(expected, found) and expected.data_ptr() == found.data_ptr()  # not a copy


def test_a_node_that_does_not_see_the_zoo(tmp_path: Path) -> None:
    (task,) = plan([SLOW], runs=1)
    outcome = _in_worker(Attempt(task, tmp_path / "elsewhere", None), None)
    assert isinstance(outcome, Outcome) and outcome.fatal
    assert "does not see the zoo" in outcome.error and "share" in outcome.error
