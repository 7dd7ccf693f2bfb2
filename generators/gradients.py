"""GradCosine: how much the gradients of parts of a batch point the same way (Yang, Wang, Yuan, Lin, "Towards
Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, arXiv 2210.05956).

    C = sum over i != j of cos(g_i, g_j) / (D^2 - D)

for the gradients g_1, ..., g_D of D parts of a batch, or of its D examples. The paper bounds training and
generalisation error by terms that fall with C at a limited gradient norm. A high C alone is no merit: a network that
explodes has one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from generators.batches import check_iterable, map_tensors
from generators.checking import check_model
from generators.errors import ConfigError, DataError, ModelError, PowerhouseError
from generators.functional import Functional, Weights, examples, size_of
from generators.initialiser import Request
from generators.inventory import inventory
from generators.seeds import isolated

CHUNK = 16  # examples whose gradients are taken, and held, at a time


@dataclass(frozen=True)
class GradCosine:
    """The figures of a model on some batches.

    Attributes:
        cosine: GradCosine in [-1, 1], averaged over the batches.
        gradient_norm: mean of `norms`.
        norms: Euclidean norm of the gradient of each part, or example, of each batch.
    """

    cosine: float
    gradient_norm: float
    norms: tuple[tuple[float, ...], ...]


def ranges(size: int, parts: int, overlap: float) -> list[tuple[int, int]]:
    """The examples `[start, stop)` of each part: equal ranges of n examples, longer by `overlap` n on inner sides.

    For two parts these are the ranges of the authors' code; with more, theirs grow from part to part.

    Raises:
        ConfigError: fewer than two parts, or an overlap outside [0, 1].
        DataError: the batch has fewer examples than there are parts.
    """
    if parts < 2 or not 0.0 <= overlap <= 1.0:
        raise ConfigError(f"a batch is cut into 2 or more parts that overlap by 0 to 1, got {parts} and {overlap}")
    length = size // parts
    if length < 1:
        raise DataError(f"a batch of {size} cannot be cut into {parts} parts; use larger batches, no short last one")
    starts = [max(int((part - overlap) * length), 0) for part in range(parts)]
    stops = [min(int((part + 1 + overlap) * length), size) for part in range(parts - 1)]
    return list(zip(starts, [*stops, size], strict=True))


def part_gradients(
    network: Functional, weights: Weights, batch: Any, parts: int, overlap: float, *, graph: bool = False
) -> Tensor:
    """Gradients `[D, P]` of the loss of D parts of a batch, P numbers in all weights together."""
    bounds = ranges(size_of(batch), parts, overlap)
    return torch.stack([network.gradient(weights, examples(batch, *bound), graph=graph) for bound in bounds])


def norms_of(vectors: Tensor, order: float = 2.0) -> Tensor:
    """Norms `[D]` of `[D, P]`; squares of huge numbers, as an exploding network has them, do not overflow."""
    largest = vectors.detach().abs().amax(1).clamp_min(torch.finfo(vectors.dtype).tiny)
    return largest * torch.linalg.vector_norm(vectors / largest[:, None], order, dim=1)


def _cosine(total: Tensor, norms: Tensor) -> Tensor:
    """GradCosine from the sum `[P]` of D unit vectors; its square has each pair of them twice, and each with itself."""
    count = len(norms)
    return (total.square().sum() - (norms > 0).sum()) / (count * count - count)


def _units(vectors: Tensor, norms: Tensor) -> Tensor:
    """Vectors `[D, P]` over their norms `[D]`; a vector of zeros stays one."""
    return vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny)[:, None]


def cosine_and_norms(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """GradCosine of the rows of `[D, P]`, and their norms `[D]`."""
    norms = norms_of(gradients)
    return _cosine(_units(gradients, norms).sum(0), norms), norms


def _by_loop(network: Functional, weights: Weights, batch: Any) -> Iterator[Tensor]:
    """Gradients of single examples, one after the other."""
    for index in range(size_of(batch)):
        yield network.gradient(weights, examples(batch, index, index + 1))[None]


def _by_vmap(network: Functional, weights: Weights, batch: Any) -> Iterator[Tensor]:
    """Gradients of single examples, many at a time."""

    def loss(weights: Weights, example: Any) -> Tensor:
        return network.evaluate(weights, map_tensors(lambda value: value[None], example))

    each = vmap(grad(loss), in_dims=(None, 0), randomness="different")
    for start in range(0, size_of(batch), CHUNK):
        found = each(weights, examples(batch, start, start + CHUNK))
        yield torch.cat([found[name].flatten(1) for name in weights], dim=1)


def _of_examples(gradients: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """`cosine_and_norms` of rows that come in pieces `[n, P]`, of which only the sum is held."""
    norms: list[Tensor] = []
    total: Tensor | float = 0.0
    for rows in gradients:
        norms.append(norms_of(rows))
        total = total + _units(rows, norms[-1]).double().sum(0)
    return _cosine(torch.as_tensor(total), torch.cat(norms)), torch.cat(norms)


def example_figures(network: Functional, weights: Weights, batch: Any) -> tuple[Tensor, Tensor]:
    """`cosine_and_norms` of the gradients of the examples of a batch, the fast way where the model allows it."""
    ranges(size_of(batch), 2, 0.0)
    network.loss(weights, batch)  # what is wrong with model, loss or data is told of the batch, not of an example
    if network.recurrent:  # torch has no batching rule, and warns of it
        return _of_examples(_by_loop(network, weights, batch))
    try:
        return _of_examples(_by_vmap(network, weights, batch))
    except (RuntimeError, ValueError, PowerhouseError):  # control flow by values, operations without a batching rule
        return _of_examples(_by_loop(network, weights, batch))


def grad_cosine(
    model: nn.Module, data: Iterable, loss: Callable, *, parts: int = 2, overlap: float = 0.0,
    per_sample: bool = False, batches: int | None = None, seed: int = 0,
) -> GradCosine:  # fmt: skip
    """GradCosine and gradient norm of a model, over all its trainable parameters; the model is not changed.

    Dropout is off, and batch norm uses the statistics of the part, or example, at hand.

    Args:
        model: any module.
        data: batches `(inputs, targets)`, examples on the first axis.
        loss: `loss(outputs, targets) -> scalar`, a mean over the examples.
        parts: how many parts a batch is cut into, at least 2.
        overlap: share of its length by which a part reaches into its neighbours, in [0, 1].
        per_sample: compare the gradients of single examples instead of parts.
        batches: how many batches to look at; None for all.
        seed: of loaders that shuffle; the global random state is neither used nor changed.

    Raises:
        ConfigError: `parts` or `overlap` make no sense, or the loss is no function.
        DataError: there are no data, or a batch is no pair, too small to be cut, or does not fit the loss.
        ModelError: the model has no trainable parameter or cannot be run, or its loss is no finite, differentiable
            scalar.
    """
    check_model(model)
    check_iterable(data)
    ranges(parts, parts, overlap)
    network = Functional(model, loss, inventory(model), "grad_cosine")
    if not network.weights:
        raise ModelError("grad_cosine: no parameter of the model is trainable, so there is no gradient; unfreeze some")
    found: list[tuple[Tensor, Tensor]] = []
    with network.differentiable(), isolated(seed, "grad_cosine"):
        weights = {name: value.requires_grad_() for name, value in network.weights.items()}
        for batch in islice(data, batches):
            if per_sample:
                found.append(example_figures(network, weights, batch))
            else:
                found.append(cosine_and_norms(part_gradients(network, weights, batch, parts, overlap)))
    if not found:
        raise DataError("grad_cosine needs data, but the data passed is empty")
    cosines, norms = zip(*found, strict=True)
    return GradCosine(
        cosine=torch.stack(cosines).mean().clamp(-1.0, 1.0).item(),
        gradient_norm=torch.cat(norms).mean().item(),
        norms=tuple(tuple(row.tolist()) for row in norms),
    )


def gradient_figures(model: nn.Module, batch: Any, request: Request, when: str) -> dict[str, float]:
    """`grad_cosine_<when>` and `gradient_norm_<when>` of a model on a batch, for reports.

    Empty if the request has no loss, or if gradients cannot be had: an initialiser that needs none works all the same.
    """
    if request.loss is None:
        return {}
    try:
        found = grad_cosine(model, [batch], request.loss, seed=request.seed)
    except PowerhouseError:
        return {}
    return {f"grad_cosine_{when}": found.cosine, f"gradient_norm_{when}": found.gradient_norm}
