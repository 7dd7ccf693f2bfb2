"""The two-sample test: can a classifier tell generated slices from trained ones?

A small network learns the difference on one half of the generated slices and on slices of some trained networks, and is
judged on the other half and on slices of other networks, which it has not seen (classifier two-sample tests, Lopez-Paz
& Oquab, arXiv 1610.06545). What the networks have in common counts, then, and not what it could know by heart. The
figure is the area under the ROC curve: 0.5 for slices that it cannot tell apart, 1 for slices that it always can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from generators.local.fidelity import covariance
from generators.seeds import derive, stream

MOST = 8192  # slices of a side that are used, chosen at random
EPOCHS, BATCH, LR, WIDTH = 8, 256, 3e-3, 64


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a score of `positive` `[P]` is above one of `negative` `[N]`; a tie counts half."""
    ordered = negative.sort().values
    below, up_to = (torch.searchsorted(ordered, positive, right=right) for right in (False, True))
    return ((below + up_to).double().mean() / (2 * len(negative))).item()


def _some(slices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the slices at random, flat, `[count, d]`."""
    return slices.flatten(1)[torch.randperm(len(slices), generator=generator)[:count]].float()


def _features(slices: Tensor, whiten: Tensor) -> Tensor:
    """What the classifier sees of slices `[N, d]`: principal components of unit variance, and their size, `[N, 2 d]`.

    A covariance that differs shows in the sizes, as do tails.
    """
    components = slices @ whiten
    return torch.cat([components.clamp(-5, 5), torch.log1p(components.square())], dim=1)


def _fit(features: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A network `[N, 2 d] -> [N, 1]`, fitted to labels 0 and 1 by logistic loss."""
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.default_generator.manual_seed(derive(seed, "classifier"))
        network = nn.Sequential(
            nn.Linear(features.shape[1], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)
        )
    optimiser = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-2)
    steps = EPOCHS * -(-len(features) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 - step / steps)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(features), generator=stream(seed, "epoch", epoch)).split(BATCH):
            loss = functional.binary_cross_entropy_with_logits(network(features[rows]).squeeze(1), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network


@torch.enable_grad()
def two_sample_auroc(generated: Tensor, learn: Tensor, judge: Tensor, *, seed: int) -> float:
    """How well a classifier tells generated slices from those of networks that it has not seen.

    The two sides have as many slices each, so the smallest set decides how many are used.

    Args:
        generated: G independent slices `[G, *shape]`; one half is learned from, the other is judged.
        learn: slices `[L, *shape]` of the networks that the classifier learns from.
        judge: slices `[J, *shape]` of other networks.
        seed: of the choice of slices, of the first weights and of the batches.

    Returns:
        The area under the ROC curve.
    """
    draws = stream(seed, "two-sample")
    halves = generated.tensor_split(2)
    sides = []
    for false, true in zip(halves, (learn, judge), strict=True):
        count = min(len(false), len(true), MOST)
        sides.append((_some(false, count, draws), _some(true, count, draws)))
    (false, true), (judged_false, judged_true) = sides
    values, vectors = torch.linalg.eigh(covariance(true))
    whiten = (vectors * values.clamp_min(values.max().clamp_min(1e-12) * 1e-6).rsqrt()).float()
    labels = torch.cat([torch.zeros(len(false)), torch.ones(len(true))])
    network = _fit(_features(torch.cat([false, true]), whiten), labels, seed)
    with torch.no_grad():
        scores = [network(_features(slices, whiten)).squeeze(1) for slices in (judged_true, judged_false)]
    return auroc(*scores)


def told_apart(generated: Tensor, first: Tensor, second: Tensor, *, seed: int) -> dict[str, float]:
    """The two-sample test of generated slices, of what He draws, and of a normal, against two sets of trained networks.

    Each set is learned from once and judged on once; figures are means of both.

    Args:
        generated: G independent slices `[G, *shape]`.
        first, second: slices `[N, *shape]` and `[M, *shape]` of two sets of networks without a common one.
        seed: see `two_sample_auroc`.

    Returns:
        `auroc`: of the generated slices (0.5 is right);
        `auroc_he`: of white noise of the same second moment as the trained slices;
        `auroc_normal`: of normal slices with mean and covariance of the first set, which is all that calibration gives.
    """
    power = torch.cat([first, second]).double().square().mean().item()
    white = torch.randn(generated.shape, generator=stream(seed, "he")) * power**0.5
    values, vectors = torch.linalg.eigh(covariance(first))
    noise = torch.randn(generated.flatten(1).shape, generator=stream(seed, "normal"))
    coloured = noise @ (values.clamp_min(0).sqrt() * vectors).float().T + first.flatten(1).mean(0)

    def both(slices: Tensor) -> float:
        there, back = ((first, second), (second, first))
        return (two_sample_auroc(slices, *there, seed=seed) + two_sample_auroc(slices, *back, seed=seed)) / 2

    return {
        "auroc": both(generated),
        "auroc_he": both(white),
        "auroc_normal": both(coloured.reshape(generated.shape)),
    }
