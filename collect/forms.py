"""Three ways to run K networks of one architecture as one, and which of them an architecture gets.

Three forms of the same computation, from images `[K, N, C, H, W]` to logits `[K, N, classes]`:

- `Grouped` (`collect.grouped`): one network with K groups. Fastest for small networks on a CPU.
- `Vmap`: `torch.func.vmap` over `functional_call`, for modules that `Grouped` has no rule for.
- `Loop`: one member after the other, for networks that are large enough to keep a core busy on their own. Slow and
  obvious in single precision; the others are measured against it. It can also compile the network, and compute in
  bfloat16.

`choose` accepts a stacked form only if its outputs, gradients and running statistics agree with the loop.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from collect.architectures import Architecture, build
from collect.dropout import mask_classifier
from collect.grouped import Grouped, Tensors, UnsupportedError
from generators.seeds import stream

log = logging.getLogger(__name__)

LARGEST_STACKED = 8192  # numbers in a feature map; measured on a CPU: above it two members gain nothing over one


class Form(Protocol):
    """One way to run K members. `module` is the template; its own weights are never used."""

    name: str
    module: nn.Module

    def __init__(self, module: nn.Module) -> None: ...

    def __hash__(self) -> int: ...

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """Logits `[K, N, classes]` for images `[K, N, C, H, W]`.

        Args:
            parameters: name -> `[K, ...]`.
            buffers: name -> `[K, ...]`, contiguous; running statistics are updated in place when training.
            images: K members, N images each.
            training: batch norm uses the statistics of the batch.
        """


class Loop:
    """One member after the other, in channels-last order.

    Args:
        module: the template.
        precision: `"float32"`, or `"bfloat16"` for convolutions and matrix products under `torch.autocast`; weights,
            gradients and logits stay in float32.
        compiled: put training steps through `torch.compile`, once for all members; evaluations are not worth it. Where
            that fails, for want of a C++ compiler for example, a warning says so and the steps run as they are.
    """

    name = "loop"

    def __init__(self, module: nn.Module, *, precision: str = "float32", compiled: bool = False) -> None:
        self.module = module
        self.precision = precision
        self._compiled = torch.compile(self._one, dynamic=False) if compiled else None
        if compiled:
            self.name = "compiled"

    def _one(self, tensors: Tensors, images: Tensor) -> Tensor:
        """Logits of one member, of tensors `[1, ...]`."""
        return functional_call(self.module, {name: value[0] for name, value in tensors.items()}, (images,))

    def _run(self, tensors: Tensors, images: Tensor) -> Tensor:
        if self._compiled is not None and self.module.training and torch.is_grad_enabled():
            try:
                return self._compiled(tensors, images)
            except RuntimeError as error:  # what torch.compile raises; an error of the network itself comes again below
                log.warning("not compiled, which costs up to a third more time: %s", str(error).strip().split("\n")[0])
                self._compiled, self.name = None, "loop"
        return self._one(tensors, images)

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        tensors = parameters | buffers
        members = [tensors]  # a compiled function warns about inputs that are views of parameters
        if len(images) > 1:
            rows = zip(*(value.split(1) for value in tensors.values()), strict=True)
            members = [dict(zip(tensors, row, strict=True)) for row in rows]
        low = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            logits = [
                self._run(member, own.contiguous(memory_format=torch.channels_last))
                for member, own in zip(members, images, strict=True)
            ]
        return torch.stack(logits).to(images.dtype)


class Vmap:
    """All members through `torch.func.vmap`."""

    name = "vmap"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        return vmap(lambda *state: functional_call(self.module, state[:2], state[2:]))(parameters, buffers, images)


FORMS: tuple[type[Form], ...] = (Grouped, Vmap)


def template(
    architecture: Architecture | str, *, shape: tuple[int, int, int], classes: int, dropout: bool = False
) -> nn.Module:
    """The module that says what to compute, on the meta device: it has no weights of its own. See `collect.dropout`."""
    with torch.device("meta"):
        module = build(architecture, shape=shape, classes=classes)
    if dropout:
        mask_classifier(module)
    return module


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


def _largest_feature_map(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """How many numbers the largest output of a convolution has, per image; 0 without convolutions."""
    sizes = [0]
    hooks = [
        part.register_forward_hook(lambda _, inputs, output: sizes.append(output[0].numel()))
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    ]
    module.eval()(torch.empty(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return max(sizes)


@lru_cache(maxsize=256)
def choose(
    architecture: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    precision: str = "float32",
    compiled: bool = False,
    dropout: bool = False,
) -> Form:
    """The form for an architecture, the same in every process.

    It is the first of `FORMS` that can run the architecture and agrees with the loop; and the loop itself if a
    convolution makes more than `LARGEST_STACKED` numbers per image, which is 8 channels of 32x32 pixels, or if
    `precision` is not float32: small networks gain nothing from another.

    Args:
        architecture: its name.
        shape: `(C, H, W)` of one image.
        classes: number of logits.
        precision, compiled: of the loop.
        dropout: whether there are masks, see `collect.dropout`.
    """
    module = template(architecture, shape=shape, classes=classes, dropout=dropout)
    loop = Loop(module)
    stackable = precision == "float32" and _largest_feature_map(module, shape) <= LARGEST_STACKED
    for kind in FORMS if stackable else ():
        try:
            form = kind(module)
            if agree(form, loop, shape):
                return form
            log.warning("%s: the %s form differs from the loop and is not used", architecture, form.name)
        except (UnsupportedError, RuntimeError) as error:
            log.debug("%s: no %s form (%s)", architecture, kind.name, error)
    return Loop(module, precision=precision, compiled=compiled)
