"""The processes and the device of a training: one process, or as many as `torchrun` started.

    torchrun --nproc-per-node 4 -m train_generators noise-ghn --meta-batch 8 ...

Lightning Fabric joins them (gloo on CPUs, nccl on GPUs). The work is divided by units of a step, each with random
streams of its own, and gradients are summed: so many processes give the gradients of one, up to the order of the sum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from generators.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


def join(device: Device = "auto", *, precision: Precision = "float32") -> Fabric:
    """This process among those of the training.

    Args:
        device: "auto" takes GPUs if there are any, one per process.
        precision: what `Fabric.autocast` computes in.

    Raises:
        ConfigError: no such device here.
    """
    from lightning_fabric import Fabric

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave --device at auto, or install torch for CUDA")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    everywhere = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=kind, devices=here, num_nodes=everywhere // here, strategy="ddp" if everywhere > 1 else "auto",
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
    )  # fmt: skip
    fabric.launch()
    return fabric


def total(fabric: Fabric, value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    return fabric.all_reduce(value, reduce_op="sum") if fabric.world_size > 1 else value  # type: ignore[return-value]


def sum_gradients(fabric: Fabric, parameters: Sequence[Tensor]) -> None:
    """Make every gradient the sum over all processes; one that no process has stays None, as in a single process."""
    if fabric.world_size == 1:
        return
    device = parameters[0].device
    found = torch.tensor([value.grad is not None for value in parameters], dtype=torch.float32, device=device)
    flat = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    summed = total(fabric, torch.cat([found, *(value.flatten() for value in flat)]))
    used, *parts = summed.split([len(parameters), *(value.numel() for value in parameters)])
    for value, count, part in zip(parameters, used.tolist(), parts, strict=True):
        value.grad = part.view_as(value) if count else None
