"""What a GHN's weights need in a network without normalisation: layers of unit output spread.

A decoded matrix has few directions, and a layer reads those that the layer before it writes. So activations grow there,
by up to `sqrt(n / rank)` per layer of n channels: no harm behind batch norm, and without it a network that cannot be
trained. What the GHN knows lies in the directions, so the size of each matrix is set anew by LSUV
(`generators.refining.lsuv`) on white noise. It is the drawn weights that are
rescaled; the weights that a GHN is trained with are as it decodes them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from generators.batches import map_tensors
from generators.errors import PowerhouseError
from generators.functional import HALF, single_precision
from generators.graph import Graph
from generators.graph.inputs import Inputs, as_inputs
from generators.graph.replica import Replica
from generators.initialiser import Proposal, Request
from generators.inventory import ParameterInfo
from generators.refining.lsuv import LSUV
from generators.white_noise import white_noise

DEEP = 5  # so many decoded matrices in a row without normalisation are rescaled, and as many more for each of ...
OUTPUT = 2.0  # a classifier becomes at most so much larger: of few outputs after pooling the spread says little
LARGEST = 100.0  # a size that would change by more is left alone: something else is odd there
WITHOUT_WEIGHTS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)  # ... these without, which are no nodes


def longest_run(graph: Graph, decoded: Collection[int]) -> int:
    """The most of the nodes `decoded` in a row, on any way through the graph, without normalisation between them."""
    runs: list[int] = []
    for index, node in enumerate(graph.nodes):
        before = max((runs[source] for source in graph.predecessors[index]), default=0)
        runs.append(0 if node.kind == "normalisation" else before + (index in decoded))
    return max(runs, default=0)


def needs_rescaling(model: nn.Module, run: int) -> bool:
    """Whether activations would grow in a network with such a run of decoded matrices, see `longest_run`."""
    layers = (each for each in model.modules() if isinstance(each, WITHOUT_WEIGHTS))
    unseen = sum(next(each.parameters(), None) is None for each in layers)
    return run >= DEEP * (unseen + 1)


def _as_in_training(model: nn.Module) -> Replica:
    """A copy whose batch norms, and only they, are in training mode: new ones have nothing but a batch to go by."""
    replica = Replica(model, meta=False, training=False)
    for module in replica.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    return replica


def _settled(
    replica: Replica, values: dict[str, Tensor], written: Sequence[ParameterInfo], request: Request, inputs: Inputs
) -> dict[str, Tensor]:
    """The values of one member that change, after LSUV on `inputs`."""
    with torch.no_grad():
        for info in written:
            replica.parameters[info.name].copy_(values[info.tied_to or info.name])
    found = LSUV().settle(replica.module, request.inventory, inputs)
    changed = {}
    for info in written:
        scale = found.statistics.get(info.name, {}).get("scale", math.nan)
        if 1 / LARGEST <= scale <= LARGEST:
            changed[info.name] = found.values[info.name] * (min(1.0, OUTPUT / scale) if info.output else 1.0)
    return changed


def rescale(model: nn.Module, proposal: Proposal, request: Request, graph: Graph, *, run: int) -> None:
    """Rescale the values `[M, ...]` of a proposal of M members, and say so in its accounts and notes.

    A copy of the model without the user's hooks is run. What is frozen counts as it is. If the copy cannot be run, the
    proposal stays what it is. `run` is for the note, see `longest_run`.
    """
    example = as_inputs(request.example_inputs) if request.example_inputs is not None else graph.inputs
    written = [info for info in request.inventory if info.trainable and (info.tied_to or info.name) in proposal.values]
    matrices = [info.name for info in written if not info.tied_to and len(info.shape) > 1]
    members = range(len(proposal.values[matrices[0]]))
    reason, settled = "it is not known what real numbers it takes", None
    for inputs in white_noise(example):
        try:
            replica = _as_in_training(model)
            if any(value.dtype in HALF for value in replica.parameters.values()):
                replica.module.float()
                inputs = Inputs(*(map_tensors(single_precision, part) for part in (inputs.args, dict(inputs.kwargs))))
            rows = ({name: value[row] for name, value in proposal.values.items()} for row in members)
            settled = [_settled(replica, row, written, request, inputs) for row in rows]
            break
        except PowerhouseError as error:
            reason = str(error)
    why = f"this model has {run} layers in a row without normalisation, where activations of a GHN's weights grow"
    if not settled:
        proposal.notes.append(
            f"{why}, and cannot be run on white noise to rescale them ({reason}); +lsuv does it with data=batches"
        )
        return
    for row, found in enumerate(settled):
        for name, value in found.items():
            proposal.values[name][row] = value
    changed = [name for name in matrices if name in settled[0]]
    left = [name for name in matrices if name not in settled[0]]
    for name in changed:
        table = proposal.fallbacks if name in proposal.fallbacks else proposal.sources
        table[name] += ", rescaled to unit output spread on white noise"
    note = f"{why}: {len(changed)} of its matrices were rescaled to unit output spread on white noise"
    proposal.notes.append(f"{note}, and {len(left)} were not ({', '.join(left[:3])}, ...)" if left else note)
