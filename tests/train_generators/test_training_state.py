"""The training state: bit-exact round trips, resumed against uninterrupted training, damage, failed writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from collect import durable
from generators.errors import CheckpointError, ZooError
from train_generators.training_state import load_state, save_state


def test_round_trip_keeps_nests_types_and_bits(tmp_path):
    path = tmp_path / "state.safetensors"
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "plain": shared,
        "view": shared.t(),  # shares storage and is not contiguous
        "nest": {0: {"step": torch.tensor(3.0), "none": None}, "groups": [{"betas": (0.9, 0.999), "params": [0, 1]}]},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "rng": torch.Generator().manual_seed(5).get_state(),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 3),
    }
    save_state(path, tensors, {"step": 7, "loss": 0.5})
    found, meta = load_state(path)
    assert meta == {"step": 7, "loss": 0.5}
    assert torch.equal(found["plain"], shared) and torch.equal(found["view"], shared.t())
    assert found["nest"][0]["none"] is None and found["nest"][0]["step"] == 3.0
    assert found["nest"]["groups"] == [{"betas": (0.9, 0.999), "params": [0, 1]}]
    assert found["half"].dtype is torch.bfloat16 and found["rng"].dtype is torch.uint8
    assert found["scalar"].isnan() and found["empty"].shape == (0, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


def _train(steps: int, resume_at: int | None, path) -> dict:
    """SGD noise from one generator, Adam with momentum; optionally through a file after `resume_at` steps."""

    def fresh():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Linear(5, 3)
        return model, torch.optim.Adam(model.parameters(), lr=0.1), torch.Generator().manual_seed(2)

    model, optimiser, order = fresh()
    for step in range(steps):
        if step == resume_at:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "order": order.get_state()}
            save_state(path, state, {"step": step})
            model, optimiser, order = fresh()
            found, _ = load_state(path)
            model.load_state_dict(found["model"])
            optimiser.load_state_dict(found["optimiser"])
            order.set_state(found["order"])
        optimiser.zero_grad()
        model(torch.randn(8, 5, generator=order)).square().mean().backward()
        optimiser.step()
    return model.state_dict()


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole, resumed = _train(9, None, None), _train(9, 4, tmp_path / "state.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_every_flipped_byte_of_a_small_state_is_noticed(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"weight": torch.arange(4.0)}, {"step": 1})
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"state\.safetensors"):
            load_state(path)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_missing_empty_and_foreign_files(tmp_path, content):
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"delete it|no training state"):
        load_state(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(tmp_path / "foreign.safetensors")


def test_a_failure_while_writing_leaves_the_former_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, {"weight": torch.ones(2)}, {"step": 1})

    def broken(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(durable.os, "fsync", broken)
    with pytest.raises(ZooError, match="disk full"):
        save_state(path, {"weight": torch.zeros(2)}, {"step": 2})
    monkeypatch.undo()
    assert load_state(path)[1] == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


def test_what_is_neither_tensor_nor_json_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"model/odd.*set"):
        save_state(tmp_path / "state.safetensors", {"model": {"odd": {1, 2}}}, {})
    assert not list(tmp_path.iterdir())
