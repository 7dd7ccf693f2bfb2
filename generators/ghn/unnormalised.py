"""What a GHN's weights need in a network without normalisation: every layer brought to unit output spread.

A decoded matrix has few directions, and a layer reads those that the layer before it writes. So activations grow there,
by up to `sqrt(n / rank)` per layer of n channels: no harm behind batch norm, and without it a network that cannot be
trained. What the GHN knows lies in the directions, so the size of each matrix is set anew by LSUV
(`generators.refining.lsuv`), on the first batch of the data if there are any, else on white noise in the shape of the
inputs that the model was traced with.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from generators.batches import map_tensors
from generators.errors import PowerhouseError
from generators.graph import Graph
from generators.initialiser import Proposal, Request
from generators.refining.lsuv import LSUV
from generators.seeds import stream

DEEP = 5  # matrices from which on a network without normalisation is rescaled
VECTORS = 64  # inputs of two axes are vectors, of which there are so many; others have places enough
GROWS = "this model has no normalisation layers, in which activations of a GHN's weights grow with depth"


def white_noise(graph: Graph, seed: int) -> Any:
    """Inputs as those that the model was traced with, N(0, 1); None if they are not known or are no real numbers."""
    arguments, keywords = graph.inputs.args, dict(graph.inputs.kwargs)
    known: list[bool] = []
    map_tensors(lambda value: known.append(value.is_floating_point()), [arguments, keywords])
    if not known or not all(known) or (arguments and keywords):
        return None
    draws = stream(seed, "ghn-white-noise")

    def drawn(value: Tensor) -> Tensor:
        shape = (VECTORS, value.shape[1]) if value.ndim == 2 else value.shape
        return torch.randn(shape, generator=draws)

    return map_tensors(drawn, keywords or arguments)


def rescaled(model: nn.Module, proposal: Proposal, request: Request, graph: Graph, members: range) -> None:
    """Rescale the values `[M, ...]` of a proposal of M members for a network without normalisation, with a note.

    What is frozen counts as it is. If the model cannot be run, the proposal stays what it is, and the note says so.
    """
    data, what = request.data, "the first batch of the data"
    if data is None:
        noise = white_noise(graph, request.seed)
        data, what = None if noise is None else [(noise, None)], "white noise"
    if data is None:
        proposal.notes.append(f"{GROWS}, unless a step behind it such as +lsuv (with data=batches) rescales them")
        return
    written = [info.name for info in request.inventory if info.trainable and info.name in proposal.values]
    found = []
    try:
        work = copy.deepcopy(model)
        tensors = dict(work.named_parameters())
        for row, member in enumerate(members):
            for name in written:
                tensors[name].data.copy_(proposal.values[name][row])
            found.append(LSUV().propose(work, replace(request, member=member, data=data, loss=None)))
    except (PowerhouseError, RuntimeError, TypeError) as error:  # the latter two: modules that cannot be copied
        proposal.notes.append(
            f"{GROWS}, and it could not be run on {what} to rescale them ({error}); put +lsuv (with data=batches) "
            "behind it"
        )
        return
    for row, each in enumerate(found):
        for name, value in each.values.items():
            proposal.values[name][row] = value
    for name in found[0].values:
        table = proposal.fallbacks if name in proposal.fallbacks else proposal.sources
        table[name] += f", rescaled to unit output spread on {what}"
    left = [name for name in written if name in found[0].kept]
    note = f"{GROWS}, so that of each layer was set to 1 on {what}"
    if left:
        note += f", but of {len(left)} whose output does not follow the size of their weight ({left[0]}, ...)"
    proposal.notes.append(note)
