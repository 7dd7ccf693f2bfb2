"""What a GHN is trained for, as a weighted sum of three objectives over M draws of generated weights W.

    images    cross-entropy of the generated networks as they are (Knyazev et al. 2021, arXiv 2110.13100), plus
              cosine_weight times the cosine between the draws' logits (arXiv 2310.16695)
    adapted   cross-entropy after k steps of SGD from W, to first order: dL/dW = dL/dW_k (Nichol et al. 2018,
              arXiv 1803.02999); k grows to `horizon` during the training
    zoo       KL(teacher || student) of the logits of collected networks, each with a code of its own that is learned
              under the prior N(0, I), so that draws of that prior should give networks like those of the zoo; the
              learned codes stay in the state of the training

`images` looks no further than step 0; `adapted` asks for a start that trains well; `zoo` for networks like the ones
that were trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.data import ImageSet
from collect.view import PopulationView
from collect.zoo import Zoo
from generators.errors import ConfigError
from train_generators.subject import Subject

GROWTH = 0.8  # share of the training over which k grows to the horizon
PARTS = {"horizon": "adapted", "inner_lr": "adapted", "inner_momentum": "adapted", "prior": "zoo"}
"""Settings that only one of the objectives reads."""


@dataclass(frozen=True)
class Objective:
    """Weights and settings of the objectives.

    Attributes:
        images: Weight of the cross-entropy at step 0.
        adapted: Weight of the cross-entropy after k steps of training.
        zoo: Weight of the divergence from collected networks; needs a --zoo with networks of every architecture.
        horizon: Largest k.
        inner_lr: Learning rate of the k steps, SGD with momentum.
        inner_momentum: Its momentum.
        prior: Weight of the prior N(0, I) on the codes of collected networks.
    """

    images: float = 1.0
    adapted: float = 0.0
    zoo: float = 0.0
    horizon: int = 16
    inner_lr: float = 0.05
    inner_momentum: float = 0.9
    prior: float = 1e-3

    def __post_init__(self) -> None:
        weights = (self.images, self.adapted, self.zoo, self.prior)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights[:3]):
            raise ConfigError(
                f"objective: weights must be numbers of at least 0, and one of images, adapted, zoo above 0, got {self}"
            )
        if self.horizon < 1 or not 0 < self.inner_lr < math.inf or not 0 <= self.inner_momentum < 1:
            raise ConfigError(
                "objective: horizon must be at least 1, inner_lr a number above 0 and inner_momentum in [0, 1), got "
                f"{self}"
            )
        for name, part in PARTS.items():
            if getattr(self, name) != getattr(Objective, name) and not getattr(self, part):
                raise ConfigError(
                    f"objective: {name} is {getattr(self, name)}, but belongs to {part}, whose weight is 0; give "
                    f"--objective.{part} a weight, or leave --objective.{name.replace('_', '-')} alone"
                )

    def steps_ahead(self, step: int, steps: int) -> int:
        """How far ahead `adapted` looks (k) at one of `steps` steps of the GHN's training."""
        return max(1, round(self.horizon * min(1.0, step / (GROWTH * steps))))


def images_loss(logits: Tensor, labels: Tensor, cosine_weight: float) -> tuple[Tensor, dict[str, float]]:
    """The loss of M draws as they are, and its parts.

    Args:
        logits: `[M, B, classes]`.
        labels: `[B]`.
        cosine_weight: weight of the mean cosine over pairs of draws, each draw's logits as one vector.
    """
    draws = len(logits)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.repeat(draws))
    parts = {"cross_entropy": entropy.item()}
    if draws < 2:
        return entropy, parts
    flat = F.normalize(logits.flatten(1), dim=1)
    cosine = ((flat @ flat.T).sum() - draws) / (draws * (draws - 1))
    parts["cosine"] = cosine.item()
    return entropy + cosine_weight * cosine if cosine_weight else entropy, parts


def adapted_loss(
    subject: Subject, decoded: dict[str, Tensor], batches: Sequence[tuple[Tensor, Tensor]], objective: Objective
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy on the last batch after a step of SGD on each of the others, from the weights of M draws.

    All parameters take part in the steps, also those that are not decoded.

    Returns:
        The mean over the draws; its gradient with respect to `decoded` is that with respect to the adapted weights.
    """
    draws = len(next(iter(decoded.values())))
    start = subject.fixed | decoded
    weights = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    leaves = list(weights.values())
    velocities = [torch.zeros_like(value) for value in leaves]
    for number, (images, labels) in enumerate(batches):
        logits = subject.logits(weights, images.expand(draws, *images.shape))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(draws))
        if number + 1 == len(batches):
            break
        gradients = torch.autograd.grad(loss * draws, leaves)  # each draw descends its own loss
        with torch.no_grad():
            for value, velocity, gradient in zip(leaves, velocities, gradients, strict=True):
                velocity.mul_(objective.inner_momentum).add_(gradient)
                value.sub_(velocity, alpha=objective.inner_lr)
    names = list(decoded)
    gradients = torch.autograd.grad(loss, [weights[name] for name in names])
    linear = sum(
        ((decoded[name] * slope).sum() for name, slope in zip(names, gradients, strict=True)), loss.new_zeros(())
    )
    return loss.detach() + linear - linear.detach(), {"adapted_cross_entropy": loss.item()}


class Teachers(nn.Module):
    """The networks of a zoo that have the architectures in training, and a learned code for each.

    Args:
        zoo: the collected networks; diverged ones are left out.
        subjects: the architectures.
        images: the data, which must be what the networks were trained on.
        code: length of a code; 0 for a GHN without codes, which then fits the mean of the networks.

    Attributes:
        digest: of the ids of the networks, in the order of their codes.

    Raises:
        ConfigError: an architecture without networks in the zoo, or other data.
    """

    def __init__(self, zoo: Zoo, subjects: Sequence[Subject], images: ImageSet, *, code: int) -> None:
        super().__init__()
        self._views: dict[str, list[PopulationView]] = {}
        codes = {}
        for subject in subjects:
            views = zoo.where(architecture=subject.name, status="ok").populations
            if not views:
                raise ConfigError(
                    f"objective.zoo: the zoo has no network of {subject.name} that did not diverge; collect some, or "
                    "train on the architectures of the zoo only"
                )
            if other := {view.header.attributes["data_digest"] for view in views} - {images.digest}:
                raise ConfigError(
                    f"objective.zoo: networks of {subject.name} were trained on other data (digest {min(other)}) than "
                    f"{images.name} ({images.digest}); give the --data of the zoo"
                )
            self._views[subject.name] = views
            count = sum(len(view) for view in views)
            codes[subject.name] = nn.Parameter(torch.zeros(count, subject.codes, code))
        runs = [f"{view.id} {seed}" for views in self._views.values() for view in views for seed in view.seeds]
        self.digest = hashlib.blake2b(" ".join(runs).encode(), digest_size=16).hexdigest()
        self.codes = nn.ParameterDict({self._key(name): value for name, value in codes.items()})

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "_")

    def count(self, name: str) -> int:
        """How many networks of an architecture there are."""
        return len(self.codes[self._key(name)])

    def code(self, name: str, number: int) -> Tensor:
        """The code `[codes, code]` of one network."""
        return self.codes[self._key(name)][number]

    def state(self, name: str, number: int) -> dict[str, Tensor]:
        """Weights and buffers of one network, name -> `[1, *shape]`."""
        for view in self._views[name]:
            if number < len(view):
                chosen = PopulationView(view.place, (view.rows[number],))
                return chosen.states()
            number -= len(view)
        raise IndexError(f"no network {number} of {name}")


def zoo_loss(
    subject: Subject, decoded: dict[str, Tensor], teacher: dict[str, Tensor], code: Tensor, images: Tensor,
    *, prior: float,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Divergence of one generated network from the collected one that its code stands for, and the prior of the code.

    Args:
        subject: their architecture.
        decoded: of one draw, made from `code`: name -> `[1, *shape]`.
        teacher: tensors of the collected network, name -> `[1, *shape]`.
        code: `[codes, code]`.
        images: `[B, C, H, W]`; both networks use the statistics of this batch.
        prior: weight of half the mean square of the code.
    """
    pictures = images[None]
    fixed = {name: value[:1] for name, value in subject.fixed.items()}
    buffers = {name: value[:1].clone() for name, value in subject.buffers.items()}
    with torch.no_grad():
        own = {name: teacher[name].to(images.device) for name, _ in subject.form.module.named_parameters()}
        target = subject.run(own, {name: value.clone() for name, value in buffers.items()}, pictures)
    logits = subject.run(fixed | decoded, buffers, pictures)
    divergence = F.kl_div(logits[0].log_softmax(-1), target[0].log_softmax(-1), log_target=True, reduction="batchmean")
    loss = divergence + prior * code.square().mean() / 2 if code.numel() else divergence
    return loss, {"zoo_divergence": divergence.item()}
