"""K networks of one architecture, run as one.

Three forms of the same computation, from images `[K, N, C, H, W]` to logits `[K, N, classes]`:

- `Grouped`: activations `[N, K C, H, W]` in channels-last order, convolutions with K groups, batch norm over K C
  channels (which *is* one per member), linear layers as batched products. Fastest for small networks on a CPU.
- `Vmap`: `torch.func.vmap` over `functional_call`, for modules that `Grouped` has no rule for.
- `Loop`: one member after the other. Slow and obvious; the others are measured against it.

`choose` accepts a form only if its outputs, gradients and running statistics agree with the loop.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from collect.architectures import Architecture, build
from collect.architectures.resnet import Shortcut
from collect.architectures.vit import ClassToken, Mix, Tokens, ToTokens
from generators.errors import ConfigError
from generators.seeds import stream

log = logging.getLogger(__name__)

LARGEST_STACKED = (
    256  # pixels of an image; measured on a CPU: above, activations leave the cache and the loop is faster
)
CALIBRATION_IMAGES = 512  # training images on which batch-norm statistics are re-estimated for an evaluation
EVALUATION_BATCH = 64  # images at a time in evaluations: small, so that activations of all members stay in cache

Tensors = dict[str, Tensor]


class UnsupportedError(Exception):
    """A form cannot run this module."""


class Form(Protocol):
    """One way to run K members. `module` is the template; its own weights are never used."""

    name: str
    module: nn.Module

    def __init__(self, module: nn.Module) -> None: ...

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """Logits `[K, N, classes]` for images `[K, N, C, H, W]`.

        Args:
            parameters: name -> `[K, ...]`.
            buffers: name -> `[K, ...]`, contiguous; running statistics are updated in place when training.
            images: K members, N images each.
            training: batch norm uses the statistics of the batch.
        """


class Loop:
    """One member after the other."""

    name = "loop"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        members: list[Tensors] = [{} for _ in images]
        for name, stacked in (parameters | buffers).items():
            for member, own in zip(members, stacked.unbind(), strict=True):
                member[name] = own
        inputs = (own.contiguous(memory_format=torch.channels_last) for own in images)
        return torch.stack(
            [functional_call(self.module, member, (own,)) for member, own in zip(members, inputs, strict=True)]
        )


class Vmap:
    """All members through `torch.func.vmap`."""

    name = "vmap"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        return vmap(lambda *state: functional_call(self.module, state[:2], state[2:]))(parameters, buffers, images)


# ---- the grouped form: one rule per kind of leaf module --------------------------------------------------------------
# A rule gets the leaf module, the stacked tensors of its own (leaf name -> [K, ...]), the value and K. A value is
# [N, K C, H, W] up to `Flatten` or `ToTokens`, and [K, N, ..., features] after it.

Rule = Callable[[Any, Tensors, Tensor, int], Tensor]


def _convolution(module: nn.Conv2d, own: Tensors, images: Tensor, members: int) -> Tensor:
    if module.padding_mode != "zeros":
        raise UnsupportedError(f"convolution with padding mode {module.padding_mode}")
    weight, bias = own["weight"].flatten(0, 1), own["bias"].flatten() if "bias" in own else None
    # A calibration pass has hundreds of images; outside the cache grouped convolution is up to four times slower.
    pieces = (images,) if torch.is_grad_enabled() else images.split(EVALUATION_BATCH)
    groups = members * module.groups
    outputs = [
        F.conv2d(piece, weight, bias, module.stride, module.padding, module.dilation, groups) for piece in pieces
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _batch_norm(module: nn.BatchNorm2d, own: Tensors, images: Tensor, members: int) -> Tensor:
    if not module.track_running_stats or not module.affine or module.momentum is None:
        raise UnsupportedError("batch norm without running statistics, scale or momentum")
    if module.training:
        own["num_batches_tracked"].add_(1)
    # view, not flatten: the statistics are updated in place
    return F.batch_norm(
        images, own["running_mean"].view(-1), own["running_var"].view(-1), own["weight"].flatten(),
        own["bias"].flatten(), module.training, module.momentum, module.eps,
    )  # fmt: skip


def _linear(module: nn.Linear, own: Tensors, features: Tensor, members: int) -> Tensor:
    rows, weight = features.flatten(1, -2), own["weight"].transpose(1, 2)
    outputs = torch.baddbmm(own["bias"][:, None], rows, weight) if "bias" in own else rows @ weight
    return outputs.unflatten(1, features.shape[1:-1])


def _flatten(module: nn.Flatten, own: Tensors, images: Tensor, members: int) -> Tensor:
    if module.start_dim != 1 or module.end_dim != -1:
        raise UnsupportedError("flattening of some axes only")
    return images.unflatten(1, (members, -1)).flatten(2).transpose(0, 1)


def _shortcut(module: Shortcut, own: Tensors, images: Tensor, members: int) -> Tensor:
    pixels = images[:, :, :: module.stride, :: module.stride].permute(0, 2, 3, 1).unflatten(3, (members, -1))
    return F.pad(pixels, (module.before, module.after)).flatten(3).permute(0, 3, 1, 2)


def _to_tokens(module: ToTokens, own: Tensors, images: Tensor, members: int) -> Tensor:
    return images.permute(0, 2, 3, 1).unflatten(3, (members, -1)).flatten(1, 2).movedim(2, 0)


def _tokens(module: Tokens, own: Tensors, patches: Tensor, members: int) -> Tensor:
    token = own["token"].expand(-1, patches.shape[1], -1, -1)
    return torch.cat([token, patches], dim=2) + own["position"]


def _layer_norm(module: nn.LayerNorm, own: Tensors, value: Tensor, members: int) -> Tensor:
    scale, shift = (own[name].view(members, *[1] * (value.dim() - 2), -1) for name in ("weight", "bias"))
    return F.layer_norm(value, module.normalized_shape, eps=module.eps) * scale + shift


def _unchanged(module: nn.Module, own: Tensors, value: Tensor, members: int) -> Tensor:
    return module(value)


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    nn.Flatten: _flatten,
    Shortcut: _shortcut,
    ToTokens: _to_tokens,
    Tokens: _tokens,
    nn.LayerNorm: _layer_norm,
    **dict.fromkeys((nn.ReLU, nn.GELU, nn.Identity), _unchanged),  # elementwise
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _unchanged),  # channel by channel
    **dict.fromkeys((Mix, ClassToken), _unchanged),  # work on the last axes
}


class _Tracer(fx.Tracer):
    """Symbolic tracing that stops at the modules for which there is a rule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES


@dataclass(frozen=True)
class _Step:
    """One operation: `result` <- `rule` of leaf `module` on `inputs`, or their sum where `module` is None."""

    result: str
    inputs: tuple[str, ...]
    module: nn.Module | None
    own: tuple[tuple[str, str], ...]  # (leaf name, full name) of the module's tensors
    done_with: tuple[str, ...]  # values that no later step reads


class Grouped:
    """All members as one network with K groups.

    Raises:
        UnsupportedError: the module does anything else than chain leaf modules with rules and add their results.
    """

    name = "grouped"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps = tuple(self._compile(module))

    @staticmethod
    def _compile(module: nn.Module) -> Iterator[_Step]:
        try:
            graph = _Tracer().trace(module)
        except Exception as error:  # whatever the model's own code raises under symbolic tracing
            raise UnsupportedError(f"not traceable: {error}") from error
        last_reader: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            last_reader.update(dict.fromkeys(node.all_input_nodes, node))
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            leaf = None
            if node.op == "call_module":
                leaf = module.get_submodule(str(node.target))
            elif node.target not in (operator.add, torch.add) or len(node.all_input_nodes) != 2:
                raise UnsupportedError(f"operation {node.target}")
            names = [name for name, _ in (*leaf.named_parameters(), *leaf.named_buffers())] if leaf else []
            yield _Step(
                result=node.name,
                inputs=tuple(source.name for source in node.all_input_nodes),
                module=leaf,
                own=tuple((name, f"{node.target}.{name}") for name in names),
                done_with=tuple(source.name for source, reader in last_reader.items() if reader is node),
            )

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        members = len(images)
        tensors = parameters | buffers
        merged = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        values = {self.steps[0].inputs[0]: merged}
        for step in self.steps:
            inputs = [values[name] for name in step.inputs]
            for name in step.done_with:
                del values[name]
            if step.module is None:
                value = operator.add(*inputs)
            else:
                own = {leaf: tensors[name] for leaf, name in step.own}
                value = RULES[type(step.module)](step.module, own, inputs[0], members)
            values[step.result] = value
        return value


# ---- choosing a form -------------------------------------------------------------------------------------------------

FORMS: tuple[type[Form], ...] = (Grouped, Vmap)


def template(architecture: Architecture | str, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The module that says what to compute, on the meta device: it has no weights of its own."""
    with torch.device("meta"):
        return build(architecture, shape=shape, classes=classes)


def _probe(module: nn.Module, shape: tuple[int, int, int]) -> tuple[Tensors, Tensors, Tensor]:
    """Two members with random weights, and four images for each, in double precision."""
    generator = stream(0, "probe of the forms")
    parameters: Tensors = {}
    buffers: Tensors = {}
    for name, value in module.named_parameters():
        spread = 1 / math.sqrt(max(1, value.numel() // value.shape[0])) if value.dim() > 1 else 0.1
        drawn = spread * torch.randn(2, *value.shape, generator=generator, dtype=torch.float64)
        parameters[name] = drawn.add_(value.dim() == 1).requires_grad_()  # vectors near 1, matrices near 0
    for name, buffer in module.named_buffers():
        kept = torch.float64 if buffer.is_floating_point() else buffer.dtype
        buffers[name] = torch.ones(2, *buffer.shape, dtype=kept)
    return parameters, buffers, torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)


def agree(form: Form, reference: Form, shape: tuple[int, int, int], *, tolerance: float = 1e-8) -> bool:
    """Whether two forms of one module give the same networks: logits, gradients and running statistics, in double."""
    results = []
    for candidate in (form, reference):
        parameters, buffers, images = _probe(candidate.module, shape)
        trained = candidate(parameters, buffers, images, training=True)
        gradients = torch.autograd.grad(trained.square().sum(), list(parameters.values()))
        with torch.no_grad():
            evaluated = candidate(parameters, buffers, images, training=False)
        results.append([trained, evaluated, *gradients, *(value.double() for value in buffers.values())])
    return all(
        torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, float(theirs.detach().abs().max())))
        for ours, theirs in zip(*results, strict=True)
    )


@lru_cache(maxsize=256)
def choose(architecture: str, *, shape: tuple[int, int, int], classes: int) -> Form:
    """The form for an architecture, the same in every process.

    It is the first of `FORMS` that can run the architecture and agrees with the loop, and the loop for images of more
    than `LARGEST_STACKED` pixels.
    """
    module = template(architecture, shape=shape, classes=classes)
    loop = Loop(module)
    for kind in FORMS if math.prod(shape[1:]) <= LARGEST_STACKED else ():
        try:
            form = kind(module)
            if agree(form, loop, shape):
                return form
            log.warning("%s: the %s form differs from the loop and is not used", architecture, form.name)
        except (UnsupportedError, RuntimeError) as error:
            log.debug("%s: no %s form (%s)", architecture, kind.name, error)
    return loop


# ---- evaluation ------------------------------------------------------------------------------------------------------


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Make one training pass set the running statistics to those of its batch."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def calibrate(form: Form, parameters: Tensors, buffers: Tensors, images: Tensor) -> tuple[Tensors, Tensor]:
    """Running statistics of `images` `[N, C, H, W]`, the same images for all members.

    Returns:
        A copy of `buffers` with these statistics, and the logits `[K, N, classes]` of the pass that took them.
    """
    if not buffers:
        return buffers, logits(form, parameters, buffers, images)
    copies = {name: value.clone() for name, value in buffers.items()}
    with _batch_statistics(form.module):
        found = form(parameters, copies, _shared(images, parameters), training=True)
    return copies, found


def _shared(images: Tensor, parameters: Tensors) -> Tensor:
    """Images `[N, C, H, W]` for every member, without a copy."""
    return images.expand(len(next(iter(parameters.values()))), *images.shape)


@torch.no_grad()
def logits(
    form: Form, parameters: Tensors, buffers: Tensors, images: Tensor, *, batch: int = EVALUATION_BATCH
) -> Tensor:
    """Logits `[K, N, classes]` of all members on the same images `[N, C, H, W]`, `batch` at a time, evaluation mode."""
    parts = [form(parameters, buffers, _shared(part, parameters), training=False) for part in images.split(batch)]
    return torch.cat(parts, dim=1)


def predict(
    architecture: Architecture | str,
    states: Tensors,
    images: Tensor,
    *,
    shape: tuple[int, int, int],
    classes: int,
    calibration: Tensor | None,
    batch: int = EVALUATION_BATCH,
) -> Tensor:
    """Logits of K networks of one architecture on the same images.

    Args:
        architecture: or its name.
        states: every tensor of the state dict, stacked: name -> `[K, ...]`.
        images: float32 `[N, C, H, W]`, normalised as for training.
        shape: `(C, H, W)` the networks were built for.
        classes: number of logits.
        calibration: training images `[M, C, H, W]` on which batch-norm statistics are re-estimated (as
            `Recipe.statistics = "train"` does with the first `CALIBRATION_IMAGES`), or None for the running ones.
        batch: images at a time.

    Returns:
        float32 `[K, N, classes]`.

    Raises:
        ConfigError: `states` does not hold exactly the tensors of the architecture.
    """
    form = choose(str(architecture), shape=tuple(shape), classes=classes)
    wanted = dict(form.module.state_dict())
    if states.keys() != wanted.keys():
        lost, extra = sorted(wanted.keys() - states.keys()), sorted(states.keys() - wanted.keys())
        raise ConfigError(f"states are not those of {architecture}: missing {lost[:3]}, unknown {extra[:3]}")
    for name, value in states.items():
        if value.shape[1:] != wanted[name].shape:
            raise ConfigError(
                f"{name} has shape {tuple(value.shape)}, {architecture} needs [K, *{tuple(wanted[name].shape)}]"
            )
    stacked = {name: value.to(images.device, wanted[name].dtype).contiguous() for name, value in states.items()}
    trained = {name for name, _ in form.module.named_parameters()}
    parameters = {name: value for name, value in stacked.items() if name in trained}
    buffers = {name: value for name, value in stacked.items() if name not in trained}
    if calibration is not None:
        buffers, _ = calibrate(form, parameters, buffers, calibration)
    return logits(form, parameters, buffers, images, batch=batch)


def stack(states: Sequence[Tensors]) -> Tensors:
    """State dicts of K members as one: name -> `[K, ...]`."""
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
