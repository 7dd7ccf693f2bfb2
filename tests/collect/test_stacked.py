"""Predictions and statistics of stacked networks against the modules themselves."""

import pytest
import torch
from torch import Tensor, nn

from collect import architectures, stacked
from collect.stacked import predict
from generators.errors import ConfigError
from generators.filling import init

SHAPE = (1, 8, 8)
NETWORKS = ("resnet-8-w4", "vgg-3-w5", "mobilenet-4-w6", "cnn-3-w8", "mlp-2-w12", "vit-2-w16")
MEMBERS = 3


def _modules(name: str) -> list[nn.Module]:
    modules = [architectures.build(name, shape=SHAPE, classes=10) for _ in range(MEMBERS)]
    for seed, module in enumerate(modules):
        init(module, "he", seed=seed)
    return modules


def _images(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NETWORKS)
def test_predict_against_each_module(name: str) -> None:
    """Running statistics as stored; more images than one batch; step counters as floats, as a zoo stores them."""
    modules, images = _modules(name), _images(100)
    for number, module in enumerate(modules):
        module.train()(_images(32, seed=number))  # running statistics of their own
    states = stacked.stack([module.state_dict() for module in modules])
    states = {key: value.float() for key, value in states.items()}
    found = predict(name, states, images, shape=SHAPE, classes=10, calibration=None)
    assert found.shape == (MEMBERS, 100, 10)
    for logits, module in zip(found, modules, strict=True):
        torch.testing.assert_close(logits, module.eval()(images), rtol=1e-4, atol=1e-4)


def test_calibration_against_a_training_pass_of_each_module() -> None:
    """Re-estimated statistics are those of the calibration images alone, and leave the given states untouched."""
    modules, images, calibration = _modules("resnet-8-w4"), _images(40), _images(200, seed=3)
    states = stacked.stack([module.state_dict() for module in modules])
    before = {key: value.clone() for key, value in states.items()}
    found = predict("resnet-8-w4", states, images, shape=SHAPE, classes=10, calibration=calibration)
    for logits, module in zip(found, modules, strict=True):
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None  # cumulative average: after one pass, the statistics of that pass
        module.train()(calibration)
        torch.testing.assert_close(logits, module.eval()(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(states[key], value) for key, value in before.items())
    again = predict("resnet-8-w4", states, images, shape=SHAPE, classes=10, calibration=calibration)
    assert torch.equal(found, again)


def test_predict_refuses_foreign_states() -> None:
    states = stacked.stack([module.state_dict() for module in _modules("mlp-2-w12")])
    with pytest.raises(ConfigError, match="missing"):
        predict("mlp-3-w12", states, _images(4), shape=SHAPE, classes=10, calibration=None)
    with pytest.raises(ConfigError, match="has shape"):
        predict("mlp-2-w13", states, _images(4), shape=SHAPE, classes=10, calibration=None)
