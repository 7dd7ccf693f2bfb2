"""GHNs and models on any device: the same weights wherever they are, and no meeting of tensors of two devices.

Machines without an accelerator stand in for one: tensors of `Elsewhere` say that they are on another device, compute as
on the CPU, and refuse to meet tensors that are not there. As on a GPU, exceptions are copies, numbers (no axes) and
indices, which may lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from collect.architectures import build
from generators import init
from generators.ghn.codes import member_noise
from generators.ghn.config import GHNConfig
from generators.ghn.decoder import DECODERS
from generators.ghn.encoder import ENCODERS
from generators.ghn.ghn import GHN

THERE = torch.device("lazy:0")  # one that torch knows and does not try to wake
IMAGE = torch.zeros(1, 1, 8, 8)


class Elsewhere(Tensor):
    """A tensor on the device `THERE`, whose values are those of `held` on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        own: Any = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=THERE
        )
        own.held = held
        return own

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})


def execute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation of the dispatcher; the result is where the operands are, or where it is asked to be."""
    name = func.overloadpacket.__name__
    met = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = any(isinstance(value, Elsewhere) for value in met)
    if there and name not in ("_to_copy", "copy_"):
        indexed = name.startswith("index") and not name.startswith("index_select")
        bound = [args[0], *args[2:]] if indexed else met
        here = [value for value in bound if isinstance(value, Tensor) and not isinstance(value, Elsewhere)]
        if any(value.ndim for value in here) or (indexed and not isinstance(args[0], Elsewhere)):
            raise RuntimeError(
                f"{name} expects all tensors on one device, but found some on {THERE} and some on the cpu"
            )
    if name == "copy_":
        there = isinstance(args[0], Elsewhere)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == THERE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    own_args, own_kwargs = tree_map(lambda v: v.held if isinstance(v, Elsewhere) else v, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    if not there:
        return result
    wrapped = {id(value.held): value for value in met if isinstance(value, Elsewhere)}  # what was written in place
    return tree_map(lambda v: wrapped.get(id(v), Elsewhere(v)) if isinstance(v, Tensor) else v, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """The device to test on: a GPU if there is one."""
    if torch.cuda.is_available():
        yield torch.device("cuda:0")
        return
    with _Mode():
        yield THERE


def network(name: str = "vit-2-w16") -> nn.Module:
    return build(name, shape=(1, 8, 8), classes=10)


def ghn(encoder: str = "sparse", decoder: str = "core", **changes: Any) -> GHN:
    sizes = dict(hidden=16, heads=2, layers=2, width=24, rank=6, cells=8, block=16, block_kernel=3)
    return GHN(GHNConfig(encoder=encoder, decoder=decoder, **{**sizes, "anchor": 0.6, "code": 4, **changes}))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal up to the order of sums: other draws would differ by the whole spread of a tensor."""
    here = {name: value.detach().cpu() for name, value in found.items()}
    torch.testing.assert_close(here, {name: value.detach() for name, value in wanted.items()}, rtol=1e-3, atol=1e-5)


def test_the_stand_in_notices_two_devices() -> None:
    """What holds on a GPU holds on it: sums need one device, copies, numbers and indices do not."""
    with _Mode():
        there, here = torch.ones(3).to(THERE), torch.ones(3)
        assert there.device == torch.zeros(2, device=THERE).device == nn.Linear(3, 2).to(THERE).weight.device == THERE
        with pytest.raises(RuntimeError, match="one device"):
            there + here
        with pytest.raises(RuntimeError, match="one device"):
            here[torch.tensor([0]).to(THERE)]
        assert (there[torch.tensor([0, 2])] * torch.tensor(2.0)).device == THERE
        assert here.copy_(there).device == torch.device("cpu")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_seed_gives_the_same_members_on_every_device(encoder: str, decoder: str) -> None:
    """A GHN that has been moved, with a model that has not: as before the move."""
    mine, model = ghn(encoder, decoder), network()
    wanted = mine.sample(model, 3, seed=4, first=1)
    with accelerator() as device:
        assert_same(mine.to(device).sample(model, 3, seed=4, first=1), wanted)


def test_the_model_may_be_there_too() -> None:
    """GHN here or there, model there: it is filled where it is, as the model here was."""
    here, mine = network("resnet-8-w4"), ghn()
    init(here, mine, seed=2)
    for moved in (False, True):
        with accelerator() as device:
            model = network("resnet-8-w4").to(device)
            init(model, mine.to(device) if moved else mine, seed=2)
            assert all(value.device == device for value in model.state_dict().values())
            assert_same(model.state_dict(), here.state_dict())


@pytest.mark.parametrize("per", ["node", "network"])
def test_codes_from_either_device(per: str) -> None:
    """Codes are drawn here; given back from there, and in a block with members whose codes are not given, they fit."""
    mine, model = ghn(code_per=per), network("mlp-2-w8")
    codes = mine.codes(model, 2, seed=9)
    wanted = mine.sample(model, 2, codes=codes)
    with accelerator() as device:
        mine.to(device)
        assert torch.equal(mine.codes(model, 2, seed=9), codes)
        for given in (codes, codes.to(device)):
            assert_same(mine.sample(model, 2, codes=given), wanted)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_weights_can_be_differentiated_there(encoder: str) -> None:
    """`predict` with the noise of a member: weights and gradients of every parameter are there, and as here."""
    mine, model = ghn(encoder), network()
    found = []
    for moved in (False, True):
        with accelerator() as device:
            mine = mine.to(device) if moved else mine
            plan = mine.plan(model, IMAGE)
            codes = mine.code(1, 0, mine.code_nodes(plan))[None]
            made = mine.predict(plan, codes, member_noise(1, range(1)))
            assert {value.device for value in made.values()} == {mine.device}
            mine.zero_grad(set_to_none=True)
            sum(value.square().sum() for value in made.values()).backward()
            grads = {name: value.grad.cpu() for name, value in mine.named_parameters() if value.grad is not None}
            found.append(({name: value.detach().cpu() for name, value in made.items()}, grads))
    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


def test_a_plan_follows_the_ghn() -> None:
    """There and back: all of its tensors, and what it derives from them."""
    mine, model = ghn("gated"), network("resnet-8-w4")
    here = mine.plan(model, IMAGE)
    with accelerator() as device:
        there = mine.to(device).plan(model, IMAGE).table
        levels = [*there.traversals[0], *there.traversals[1]]
        derived = [value for level in levels for value in (level.nodes, level.sources, level.into, level.steps)]
        derived += [value for tile in there.tiles for value in (tile.sources, tile.relation)]
        assert all(value.device == device for value in (there.features, there.pairs, there.dense, *derived))
        assert torch.equal(there.dense.cpu(), here.table.dense)
        back = mine.to("cpu").plan(model, IMAGE).table
    assert torch.equal(back.pairs, here.table.pairs) and back.pairs.device == here.table.pairs.device


def test_weights_do_not_depend_on_autocast() -> None:
    """A caller's autocast would round them to bfloat16."""
    mine, model = ghn(), network()
    wanted = mine.sample(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mine.sample(model, 2)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
