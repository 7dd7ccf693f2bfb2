"""Members of a GHN: bit for bit those of (seed, index), in whatever number, process or form they are asked for."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from generators import init, load, save
from generators.ghn import ghn as module
from generators.ghn.codes import member_noise
from generators.ghn.ghn import GHN
from generators.initialiser import Request
from generators.inventory import inventory
from small_ghn import IMAGE, NOISY, SMALL, equal, network


def test_members_of_a_deterministic_ghn_are_equal():
    """All decoded tensors of all members, bit for bit; another seed changes nothing either."""
    ghn, model = GHN(SMALL), network()
    assert ghn.kind_name == "ghn"
    states = ghn.sample(model, 11, seed=1)
    for value in states.values():
        assert all(torch.equal(member, value[0]) for member in value)
    assert equal(states, ghn.sample(model, 11, seed=2))


@pytest.mark.parametrize("changes", [{"anchor": 0.5}, {"code": 4}, {"anchor": 0.5, "code": 4}])
def test_members_of_a_noise_ghn_differ(changes):
    """Every decoded tensor of every two of ten members (two blocks), by anchor or by code alone; so do seeds."""
    ghn, model = GHN(replace(SMALL, **changes)), network()
    assert ghn.kind_name == "noise-ghn"
    states, others = ghn.sample(model, 10, seed=1), ghn.sample(model, 10, seed=2)
    names = {name for group in ghn.plan(model, IMAGE).groups for name in group.names}
    assert len(names) >= 8
    for name in names:
        flat = torch.cat([states[name], others[name]]).flatten(1)
        assert torch.pdist(flat).min() > 0, name


@pytest.mark.parametrize("config", [SMALL, NOISY, replace(SMALL, code=4)], ids=["ghn", "noise-ghn", "code"])
@pytest.mark.parametrize("name", ["resnet-8-w4", "vit-2-w16", "mlp-2-w40"])
def test_member_3_of_5_is_member_3_of_50(config, name):
    """Bit for bit, and what `first=3` gives and `init(member=3)` writes; also member 49 in a block of its own."""
    ghn, model = GHN(config), network(name)
    five, fifty = ghn.sample(model, 5, seed=4), ghn.sample(model, 50, seed=4)
    for member in (3, 49):
        wanted = {key: value[member] for key, value in fifty.items()}
        alone = {key: value[0] for key, value in ghn.sample(model, 1, seed=4, first=member).items()}
        assert equal(alone, wanted)
        filled = copy.deepcopy(model)
        init(filled, ghn, seed=4, member=member)
        assert equal(filled.state_dict(), wanted)
    assert equal({key: value[3] for key, value in five.items()}, {key: value[3] for key, value in fifty.items()})


def test_request_decides_the_member():
    """`propose` is the proposal of the member that the request names."""
    ghn, model = GHN(NOISY), network()
    request = Request(inventory(model), seed=2, member=6)
    one, many = ghn.propose(model, request), ghn.propose_stack(model, request, range(4, 8))
    assert equal(one.values, {name: value[2] for name, value in many.values.items()}) and one.sources == many.sources


@pytest.mark.parametrize("numbers", [1, 10**4, 10**9])
def test_size_of_a_block_changes_no_weight(monkeypatch, numbers):
    """Members decoded one by one, in blocks, or eight at once agree to rounding with one `predict` of all."""
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", numbers)
    ghn, model = GHN(NOISY), network()
    states = ghn.sample(model, 9, seed=3)
    plan = ghn.plan(model, IMAGE)
    codes = torch.stack([ghn.code(3, member, len(plan.table.features)) for member in range(9)])
    with torch.no_grad():
        wanted = ghn.predict(plan, codes, member_noise(3, range(9)))
    for name, value in wanted.items():
        torch.testing.assert_close(states[name], value, rtol=1e-4, atol=1e-5)


PROCESS = """
import hashlib, torch
from collect.architectures import build
from generators.ghn.ghn import GHN, GHNConfig
ghn = GHN(GHNConfig(hidden=16, heads=2, layers=2, width=24, rank=6, cells=8, anchor=0.6, code=4))
states = ghn.sample(build("vit-2-w16", shape=(1, 8, 8), classes=10), 3, seed=9)
digest = hashlib.sha256()
for name in sorted(states):
    digest.update(states[name].numpy().tobytes())
print(digest.hexdigest())
"""


def test_another_process_gives_the_same_bits():
    """A fresh interpreter with another hash seed, against this one."""
    states = GHN(NOISY).sample(network("vit-2-w16"), 3, seed=9)
    digest = hashlib.sha256()
    for name in sorted(states):
        digest.update(states[name].numpy().tobytes())
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert done.stdout.strip() == digest.hexdigest(), done.stderr


def test_random_streams_of_the_caller_are_untouched():
    """Making, sampling and initialising draw nothing from the global stream, and do not depend on it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ghn, model = GHN(NOISY), network()
    states = ghn.sample(model, 2)
    init(copy.deepcopy(model), ghn)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(states, GHN(NOISY).sample(model, 2))
    assert not equal(states, GHN(replace(NOISY, seed=1)).sample(model, 2)), "the seed of the start values counts"


def test_defaults_of_the_caller_change_no_weight():
    """Another default device or data type."""
    ghn, model = GHN(NOISY), network("vit-2-w16")
    wanted = ghn.sample(model, 2, seed=1)
    try:
        torch.set_default_dtype(torch.float64)
        assert equal(GHN(NOISY).sample(model, 2, seed=1), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert equal(GHN(NOISY).sample(model, 2, seed=1), wanted)


def test_saved_and_loaded_gives_the_same_bits(tmp_path):
    ghn = GHN(NOISY, name="mine")
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save(ghn, tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert again.config == NOISY and again.name == "mine" and isinstance(again, GHN)
    assert equal(ghn.sample(network(), 3, seed=2), again.sample(network(), 3, seed=2))


@pytest.mark.parametrize("name", ["resnet-8-w4", "vgg-4-w4", "mobilenet-3-w8", "vit-2-w16", "mlp-2-w8"])
def test_weights_do_not_depend_on_the_traced_inputs(name):
    """With the tracer's guess, with one image and with five: the same bits."""
    ghn, model = GHN(NOISY), network(name)
    guessed = ghn.sample(model, 1)
    for count in (1, 5):
        assert equal(guessed, ghn.sample(model, 1, example_inputs=torch.zeros(count, 1, 8, 8)))


@pytest.mark.parametrize("name", ["resnet-8-w4", "vit-2-w16"])
def test_stack_for_vmap_against_a_loop(name):
    """An ensemble by vmap over functional_call gives the logits of networks loaded one by one, in eval and training."""
    ghn, model = GHN(NOISY), network(name)
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, buffers = ghn.sample(model, 3, seed=5, stacked=True)
    assert [key for key, _ in model.named_parameters()] == list(parameters)
    assert [value.requires_grad for value in parameters.values()] == [each.requires_grad for each in model.parameters()]
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    states = ghn.sample(model, 3, seed=5)
    for training in (False, True):
        model.train(training)
        stacked = torch.func.vmap(
            lambda own, rest: torch.func.functional_call(model, (own, rest), images), randomness="same"
        )(parameters, {key: value.clone() for key, value in buffers.items()})
        for member in range(3):
            alone = copy.deepcopy(model)
            alone.load_state_dict({key: value[member] for key, value in states.items()})
            torch.testing.assert_close(stacked[member], alone(images), rtol=1e-4, atol=1e-4)
    for value in (*parameters.values(), *buffers.values()):
        value.detach().zero_()
    assert equal(model.state_dict(), before), "nothing of the stack is the model's own"
