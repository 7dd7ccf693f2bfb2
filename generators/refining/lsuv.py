"""LSUV, layer-sequential unit variance (Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv 1511.06422).

On one batch, in the order of the forward pass, divide the weight of each convolution and linear layer by the standard
deviation of the layer's output until that is 1 within a tolerance. The paper starts from orthogonal weights:
`"orthogonal+lsuv"`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from generators.batches import arguments_of, call, first_batch, inputs_of, map_tensors
from generators.errors import DataError
from generators.functional import HALF, single_precision
from generators.gradients import gradient_figures
from generators.graph.inputs import Inputs
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES, Inventory, Role
from generators.seeds import isolated


def _spread(output: Any) -> float:
    """Standard deviation of a layer's output, NaN if it has none."""
    return output.float().std().item() if isinstance(output, Tensor) and output.numel() > 1 else math.nan


def _layers(model: nn.Module, found: Inventory) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, owner and value of every weight that one layer alone owns and uses as it is stored."""
    tied = {info.tied_to for info in found}
    for info in found.where(Role.CONV_WEIGHT, Role.LINEAR_WEIGHT):
        owner = model.get_submodule(info.module)
        alone = info.trainable and not info.tied_to and info.name not in tied
        if alone and info.name.rpartition(".")[2] == "weight" and not any(owner.children()):
            yield info.name, owner, model.get_parameter(info.name)


def _check_finite(inputs: Any) -> None:
    def check(value: Tensor) -> None:
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all():
            raise DataError("lsuv: the first batch holds NaN or infinity; pass data without them")

    map_tensors(check, inputs)


@dataclass(frozen=True)
class LSUV:
    """Layer-sequential unit variance, in one forward pass: each layer is fixed when the pass comes by.

    The pass runs on a copy in evaluation mode and, of a model in half precision, in float32, so dropout is off and
    normalisation layers with fresh statistics hand their input on. A layer that is used twice is fixed for its first
    use. Weights that are frozen, tied, computed (weight norm) or of no layer of their own (recurrent ones, the stacked
    projections of an attention) are left alone, and so is a layer whose output does not come within the tolerance: it
    is constant, does not follow the size of the weight (weight standardisation), or its bias alone spreads more. Notes
    say so.

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
        """Rescaled weights of the convolutions and linear layers that the model's forward pass calls.

        `statistics` have the `scale` of each, its `output_std_before` and `output_std_after` and the number of
        `divisions`; `figures` the `layers`, and, where a loss is given that can be differentiated,
        GradCosine and gradient norm on the batch before and after.
        """
        work = copy.deepcopy(model).eval()
        half = any(value.dtype in HALF for value in work.parameters())
        with isolated(request.seed, self.name, request.member):
            batch = first_batch(request.data, self.name)
            before = gradient_figures(model, batch, request, "before")
            inputs = inputs_of(batch)
            _check_finite(inputs)
            arguments = arguments_of(map_tensors(single_precision, inputs) if half else inputs)
            proposal = self.settle(work.float() if half else work, request.inventory, Inputs(*arguments))
        known = proposal.values.keys() | proposal.kept.keys()
        left = [info.name for info in request.inventory.where(*MATRIX_ROLES) if info.name not in known]
        if not known:
            proposal.notes.append("lsuv: the forward pass calls no convolution or linear layer that it could rescale")
        elif left:
            proposal.notes.append(
                f"lsuv: {len(left)} matrices are as they were ({', '.join(left[:3])}{', ...' if left[3:] else ''}): "
                "frozen, tied, computed, or of no convolution or linear layer that the forward pass calls"
            )
        proposal.figures = {
            "layers": float(len(proposal.values)), **before, **gradient_figures(work, batch, request, "after"),
        }  # fmt: skip
        return proposal

    @torch.no_grad()
    def settle(self, work: nn.Module, found: Inventory, inputs: Inputs) -> Proposal:
        """Rescale the weights of `work` in place, in one forward pass on `inputs`.

        Raises:
            ModelError: the forward raised; it is the cause.
        """
        proposal = Proposal()
        hooks = [self._watch(*layer, proposal) for layer in _layers(work, found)]
        try:
            call(work, inputs.kwargs if inputs.kwargs and not inputs.args else inputs.args)
        finally:
            for hook in hooks:  # of layers that the pass did not come by
                hook.remove()
        return proposal

    def _watch(self, name: str, module: nn.Module, weight: Tensor, proposal: Proposal) -> RemovableHandle:
        """Fix `weight` when `module` is first called, and hand the fixed output on."""

        def fix(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> Tensor | None:
            handle.remove()
            before, start = weight.clone(), _spread(output)
            std, scale, divisions = start, 1.0, 0
            while abs(std - 1.0) > self.tolerance and divisions < self.tries and math.isfinite(std) and std > 0.0:
                weight.div_(std)
                output = module.forward(*arguments, **keywords)
                std, scale, divisions = _spread(output), scale / std, divisions + 1
            if not abs(std - 1.0) <= self.tolerance:  # so is NaN
                weight.copy_(before)
                proposal.kept[name] = f"lsuv left it as it was: the spread of its output is {start:.3g}"
                proposal.kept[name] += f" and stays {std:.3g} after {divisions} divisions" if divisions else ""
                proposal.notes.append(f"{name}: {proposal.kept[name]}")
                return None
            proposal.values[name] = weight.clone()
            proposal.sources[name] = f"{self.name}: output std 1"
            proposal.statistics[name] = {
                "scale": scale, "divisions": float(divisions), "output_std_before": start, "output_std_after": std
            }  # fmt: skip
            return output

        handle = module.register_forward_hook(fix, with_kwargs=True)
        return handle


register(
    "lsuv", kind=Kind.REFINING, needs=("data",), paper="Mishkin and Matas, ICLR 2016, arXiv 1511.06422",
    summary="unit output std for every convolution and linear layer, on one batch",
)(LSUV)  # fmt: skip
