"""The flags of `python -m collect run`: a sweep of the simplest sort, in words of the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from collect.executors import Executor, make
from collect.spec import FIELDS, Spec


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is trained: every architecture x every initialiser x every learning rate, `--runs` times each; or a plan."""

    architectures: tuple[str, ...] = ()
    """Networks as FAMILY-DEPTH-wWIDTH: resnet-20-w16, vgg-6-w16, mobilenet-6-w16, mlp-3-w64, vit-4-w32."""
    plan: Path | None = None
    """A plan or a spec, in place of the flags that say what to train; see `python -m collect plan --help`."""
    out: Path
    """Folder of the zoo; made if it is not there, added to if it is."""
    data: str = "digits"
    """digits (no download), a torchvision set like cifar10, or FILE.npz with x_train, y_train, x_test, y_test."""
    init: tuple[str, ...] = ("he",)
    """Initialisers; `python -m generators list` shows all. Runs with equal seeds under two of them are pairs."""
    lr: tuple[float, ...] = (0.1,)
    """Highest learning rates."""
    runs: int = 8
    """Networks for every combination."""
    first_seed: int = 0
    """Seed of the first run. To add 8 networks to a zoo of 8: --first-seed 8 --runs 8."""
    together: int | None = None
    """Most networks in one file. By default 8, and more, up to 256, where there are many networks and small ones."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """Update rule."""
    momentum: float = 0.9
    """Of SGD; the first beta of AdamW."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    weight_decay: float = 5e-4
    """On all parameters."""
    schedule: Literal["cosine", "step", "linear", "constant"] = "cosine"
    """Learning rate over time."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate at the start, part of --epochs."""
    augmentation: Literal["none", "shift", "flip-crop"] = "none"
    """Random changes of training images."""
    label_smoothing: float = 0.0
    """Of the training loss."""
    clip_norm: float = 0.0
    """Largest gradient norm of a network, 0 for no clipping."""
    evaluations_per_epoch: int = 1
    """How often metrics are measured; once before any training comes on top."""
    evaluation_steps: tuple[int, ...] = ()
    """Steps after which metrics are measured besides, such as: 50 200 1000."""
    saved: Literal["last", "all"] | tuple[int, ...] = "last"
    """Epochs whose weights are kept: last, all (0 included), or a list of epochs."""
    statistics: Literal["train", "running"] = "train"
    """Batch-norm statistics in evaluations: measured anew on training images, or the running averages."""
    dropout: float = 0.0
    """Probability with which inputs of the classifier are dropped in training."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forward and backward passes; weights and optimiser stay in float32."""
    trajectory: Literal["float32", "float16"] = "float32"
    """How the weights of epochs before the last are stored."""
    classifier_lr: float = 1.0
    """Learning rate of the last linear layer, as a multiple of that of all others."""
    workers: int | None = None
    """Processes; default one per usable core. 0 trains in this process."""
    device: str = "cpu"
    """Of torch, where every process trains: cpu, cuda, cuda:1. Several processes may share a GPU."""
    executor: Literal["processes", "ray", "submitit"] = "processes"
    """Where to train: worker processes of this machine, a Ray cluster, or a SLURM array."""
    address: str | None = None
    """Of the Ray cluster: auto, or HOST:PORT; by default the one of RAY_ADDRESS, else one on this machine."""
    gpus: float | None = None
    """Of each task on a Ray cluster with --device cuda: 1 by default; 0.25 lets four tasks share a GPU."""
    slurm: dict[str, int | str] = field(default_factory=dict)
    """Settings of a SLURM job as pairs, such as: timeout_min 120 slurm_partition cpu."""
    data_root: Path | None = None
    """Folder of downloaded data sets."""
    download: bool = False
    """Fetch the data set if it is not there."""
    verify: bool = False
    """Compare every byte of what is there with its digests first, and train anew what is damaged."""

    def made_executor(self) -> Executor:
        """The executor that the flags ask for. Raises what `collect.executors.make` raises."""
        settings = {"address": self.address, "gpus": self.gpus, "slurm": self.slurm or None}
        if self.executor == "processes" and self.workers == 0:
            return make("here", **settings)
        return make(self.executor, workers=self.workers, **settings)

    def spec(self) -> Spec:
        """What the flags say. Raises what `Spec` raises."""
        flags = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        grid = {"architecture": flags["architectures"], "init": flags.pop("init"), "lr": flags.pop("lr")}
        recipe = {name: value for name, value in flags.items() if name in FIELDS}
        return Spec(runs=self.runs, first_seed=self.first_seed, together=self.together, recipe=recipe, grid=grid)
