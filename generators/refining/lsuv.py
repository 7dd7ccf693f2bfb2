"""LSUV, layer-sequential unit variance (Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv 1511.06422).

On one batch, in the order of the forward pass, divide the weight of each convolution and linear layer by the standard
deviation of the layer's output until that is 1 within a tolerance. The paper starts from orthogonal weights:
`"orthogonal+lsuv"`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from generators.batches import call, first_batch, inputs_of
from generators.initialiser import Kind, Proposal, Request, register
from generators.seeds import isolated


def _spread(output: Any) -> float:
    """Standard deviation of a layer's output, NaN if it has none."""
    return output.float().std().item() if isinstance(output, Tensor) and output.numel() > 1 else math.nan


@dataclass(frozen=True)
class LSUV:
    """Layer-sequential unit variance, in one forward pass: each layer is fixed when the pass comes by.

    The pass runs on a copy in evaluation mode, so dropout is off and normalisation layers with fresh statistics hand
    their input on. A layer that is used twice is fixed for its first use. Weights that are frozen, tied or computed
    (weight norm) are left alone, and so is a layer whose output is constant.

    Attributes:
        tolerance: largest distance of an output's standard deviation from 1.
        tries: most divisions per layer; more than one is needed only where a bias is not 0.
    """

    tolerance: float = 0.1
    tries: int = 10
    name: str = "lsuv"
    kind: Kind = Kind.REFINING
    needs: tuple[str, ...] = ("data",)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Rescaled weights of every convolution and linear layer that the model's forward pass calls."""
        proposal = Proposal()
        work = copy.deepcopy(model).eval()
        uses = Counter(id(value) for _, value in work.named_parameters(remove_duplicate=False))
        for path, module in work.named_modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if not isinstance(module, _ConvNd | nn.Linear) or weight is None:
                continue
            if weight.requires_grad and uses[id(weight)] == 1:
                self._watch(f"{path}.weight" if path else "weight", module, weight, proposal)
        with torch.no_grad(), isolated(request.seed, self.name, request.member):
            call(work, inputs_of(first_batch(request.data, self.name)))
        if not proposal.values:
            proposal.notes.append("lsuv: the forward pass calls no convolution or linear layer that it could rescale")
        return proposal

    def _watch(self, name: str, module: nn.Module, weight: Tensor, proposal: Proposal) -> None:
        """Fix `weight` when `module` is first called, and hand the fixed output on."""

        def fix(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> Tensor | None:
            handle.remove()
            before, start = weight.clone(), _spread(output)
            std, tries = start, 0
            while abs(std - 1.0) > self.tolerance and tries < self.tries and math.isfinite(std) and std > 0.0:
                weight.div_(std)
                output = module.forward(*arguments, **keywords)
                std, tries = _spread(output), tries + 1
            if not math.isfinite(std) or std <= 0.0:
                weight.copy_(before)
                proposal.notes.append(f"lsuv: {name} left as it was, the spread of its output is {start:.3g}")
                return None
            proposal.values[name] = weight.clone()
            proposal.sources[name] = f"{self.name}: output std {start:.3g} -> {std:.3g}"
            return output

        handle = module.register_forward_hook(fix, with_kwargs=True)


register(
    "lsuv", kind=Kind.REFINING, needs=("data",), paper="Mishkin and Matas, ICLR 2016, arXiv 1511.06422",
    summary="unit output std for every convolution and linear layer, on one batch",
)(LSUV)  # fmt: skip
