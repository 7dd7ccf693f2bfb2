"""What a GHN is trained on: an architecture to generate weights for, and the batches of images that judge them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from collect.architectures import build, parse
from collect.augmentation import Batches
from collect.data import ImageSet
from collect.forms import Form, choose
from generators.errors import ConfigError
from generators.ghn.familiar import sort_of
from generators.ghn.ghn import GHN
from generators.ghn.plan import DecodePlan
from generators.initialiser import Proposal, Request
from generators.pointwise import HE
from generators.seeds import derive


class Subject:
    """One architecture in training, on the device of the GHN: how to run it, what to decode, what the fallback gives.

    Args:
        name: of the architecture.
        ghn: what generates it.
        images: what it is for.
        draws: networks at once.
        autocast: context of every pass, such as `Fabric.autocast`; weights, gradients and logits stay in float32.

    Attributes:
        codes: how many noise codes a member has: one per node of the graph, or one in all.
        fixed: what is not decoded, as the fallback gives it: name -> `[draws, *shape]`.
        buffers: running statistics of `draws` members; nothing reads them.
    """

    def __init__(
        self, name: str, ghn: GHN, images: ImageSet, *, draws: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:  # fmt: skip
        classes = len(images.classes)
        module = build(parse(name), shape=images.shape, classes=classes)
        self.name, self.autocast = name, autocast
        self.form: Form = choose(name, shape=images.shape, classes=classes)
        self.plan: DecodePlan = ghn.plan(module, torch.zeros(1, *images.shape))
        self.codes = ghn.code_nodes(self.plan)
        proposal, request = Proposal(), Request(self.plan.found)
        for info in self.plan.found:
            if info.name in self.plan.left_out:
                HE.fill(proposal, info, request, because="not decoded")
        start = {name: value.detach() for name, value in module.named_parameters()} | proposal.values
        start = {name: value.to(ghn.device) for name, value in start.items()}
        decoded = {name for group in self.plan.groups for name in group.names}
        self.fixed = {name: value.expand(draws, *value.shape) for name, value in start.items() if name not in decoded}
        self.buffers = {
            name: value.detach().to(ghn.device).expand(draws, *value.shape).clone()
            for name, value in module.named_buffers()
        }

    @property
    def sorts(self) -> set[str]:
        """The sorts of layers that are decoded, see `generators.ghn.familiar`."""
        return {sort_of(self.plan.found[name]) for group in self.plan.groups for name in group.names}

    def logits(self, decoded: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits `[M, B, classes]` of M generated networks on images `[M, B, C, H, W]`, batch statistics.

        `decoded` may also hold what else is to stand in for the fallback's values.
        """
        return self.run(self.fixed | decoded, self.buffers, images)

    def run(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits of the networks with these parameters, batch statistics; `buffers` are updated in place."""
        with self.autocast():
            return self.form(parameters, buffers, images, training=True).float()


class ImageStream:
    """Batches of training images that depend on nothing but (seed, step, number, unit).

    Raises:
        ConfigError: a batch would have more images than there are.
    """

    def __init__(
        self, images: ImageSet, *, batch_size: int, augmentation: str, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        count = len(images.train.labels)
        if batch_size > count:
            raise ConfigError(
                f"batch_size is {batch_size}, but {images.name} has {count} training images; give a --batch-size of at "
                "most that"
            )
        self.seed = seed
        self.batches = Batches(
            images, [0], batch_size=batch_size, augmentation=augmentation, device=torch.device(device)
        )  # fmt: skip

    def batch(self, step: int, number: int = 0, *, unit: int = 0) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` and labels `[B]`: the first batch of an epoch of its own.

        Args:
            step: of the GHN's training.
            number: which batch of this unit.
            unit: of the step.
        """
        place = (step, number, unit) if unit else (step, number) if number else (step,)
        self.batches.reseed([derive(self.seed, "ghn-batch", *place)])
        drawn, labels = next(self.batches.epoch())
        return drawn[0], labels[0]
