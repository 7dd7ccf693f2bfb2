"""Batches for K members at once: each has its own order and augmentation, drawn from the streams of its own seed.

Augmentations: `"shift"` moves an image by up to an eighth of its side (at least one pixel) in each direction and fills
with black; `"flip-crop"` also mirrors every other image, the usual one for CIFAR (He et al. 2016, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from collect.data import ImageSet
from generators.seeds import stream


@dataclass(frozen=True)
class Augmentation:
    """`shift`: whether images move. `mirror`: whether they are mirrored."""

    shift: bool
    mirror: bool


AUGMENTATIONS = {
    "none": Augmentation(shift=False, mirror=False),
    "shift": Augmentation(shift=True, mirror=False),
    "flip-crop": Augmentation(shift=True, mirror=True),
}


class Batches:
    """An endless source of epochs of training batches.

    Args:
        images: the set whose training images are used.
        seeds: one per member; a member's batches depend on its own seed only.
        batch_size: images per member and batch; what is left at the end of an epoch is dropped.
        augmentation: key of `AUGMENTATIONS`.
        device: where the batches are made. The draws are made on the CPU, the same for every device.
    """

    def __init__(
        self, images: ImageSet, seeds: Sequence[int], *, batch_size: int, augmentation: str, device: torch.device
    ) -> None:
        self.kind = AUGMENTATIONS[augmentation]
        self.batch_size = batch_size
        _, self.height, self.width = images.shape
        self.margin = max(1, min(self.height, self.width) // 8) if self.kind.shift else 0
        black = -torch.tensor(images.mean) / torch.tensor(images.std)
        bordered = images.train.images - black[:, None, None]
        bordered = F.pad(bordered, (self.margin,) * 4) + black[:, None, None]
        # [N, 2 margin + 1, 2 margin + 1, C, H, W], every shift of every image, without a copy
        self.windows = bordered.to(device).unfold(2, self.height, 1).unfold(3, self.width, 1).movedim(1, 3)
        self.labels = images.train.labels.to(device)
        self.device = device
        self.reseed(seeds)

    def reseed(self, seeds: Sequence[int]) -> None:
        """Start the streams of `seeds`, one per member, from their beginning."""
        self.orders = [stream(seed, "order") for seed in seeds]
        self.draws = [stream(seed, "augmentation") for seed in seeds]

    def state(self) -> dict[str, Tensor]:
        """The states of all streams, uint8 `[K, bytes]` each, from which `load` draws the same epochs once more."""
        streams = {"orders": self.orders, "draws": self.draws}
        return {name: torch.stack([one.get_state() for one in each]) for name, each in streams.items() if each}

    def load(self, state: dict[str, Tensor]) -> None:
        """Set the streams to what `state` returned, of as many members."""
        for name, streams in (("orders", self.orders), ("draws", self.draws)):
            for one, own in zip(streams, state[name], strict=True):
                one.set_state(own.clone())

    def _stacked(self, draws: list[Tensor]) -> Tensor:
        """Draws of the members, with the member as last axis."""
        return torch.stack(draws, dim=-1).to(self.device)

    def epoch(self, *, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, without the first `skip` batches; the draws are made for all of it when the first is asked for.

        Yields:
            Images `[K, B, C, H, W]` of K members, laid out in memory as `[B, H, W, K, C]`, which the grouped form reads
            without a copy; and labels `[K, B]`.
        """
        count = len(self.labels)
        order = self._stacked([torch.randperm(count, generator=generator) for generator in self.orders])  # [N, K]
        corners = torch.zeros(1, 2, 1, dtype=torch.int64, device=self.device).expand(count, 2, 1)  # [N, 2, K]
        if self.kind.shift:
            span = (2 * self.margin + 1, (count, 2))
            corners = self._stacked([torch.randint(*span, generator=generator) for generator in self.draws])
        if self.kind.mirror:
            mirrored = self._stacked([torch.rand(count, generator=generator) < 0.5 for generator in self.draws])
        for start in range(skip * self.batch_size, count - self.batch_size + 1, self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen, y, x = order[part], corners[part, 0], corners[part, 1]
            batch = self.windows[chosen, y, x]  # [B, K, C, H, W]
            if self.kind.mirror:
                batch = torch.where(mirrored[part, :, None, None, None], batch.flip(4), batch)
            # [B, H, W, K, C]; contiguous() would keep odd strides of axes of length 1, which choose other kernels
            batch = batch.permute(0, 3, 4, 1, 2).clone(memory_format=torch.contiguous_format)
            yield batch.permute(3, 0, 4, 1, 2), self.labels[chosen].T
