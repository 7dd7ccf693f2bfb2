"""Local generators on models that no zoo holds: every tensor has its group, or He and the reason why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck, ResNet

from generators.filling import init, take_inventory
from generators.inventory import MATRIX_ROLES
from generators.local.config import LocalConfig
from generators.local.generator import SLICE_MODELS, LocalGenerator

GROUPS = ("conv_weight-3x3-0", "conv_weight-3x3-2", "conv_weight-5-0", "conv_weight-3x3x3-0", "matrix-1x8-1")
FIRST, LAST = "conv_weight-3x3-0", "conv_weight-3x3-2"
PATCHES = "matrix-1x8-1"
HE = "local leaves the output layer to He"


class Voxels(nn.Module):
    """Kernels of one and of three axes, a recurrent layer and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 8, 5)
        self.longer = nn.Conv1d(8, 8, 9)
        self.memory = nn.LSTM(8, 8)
        self.space = nn.Conv3d(1, 4, 3)
        self.time = nn.Conv3d(4, 4, (3, 1, 1))
        self.head = nn.Linear(4, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "resnet50 with one block a stage": (
        lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8, num_classes=10),
        {
            "conv1.weight": f"{FIRST}, resized to 7x7 kernels",
            "layer1.0.conv1.weight": f"{PATCHES}, the nearest in depth to matrix-1x8-0",
            "layer1.0.conv2.weight": FIRST,
            "layer4.0.conv2.weight": LAST,
            "layer4.0.downsample.0.weight": PATCHES,
            "layer4.0.bn3.weight": "local models kernels and matrices only",
            "fc.weight": HE,
        },
    ),
    "convnext with one block a stage": (
        lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10),
        {
            "features.0.0.weight": f"{FIRST}, resized to 4x4 kernels",
            "features.1.0.block.0.weight": f"{FIRST}, resized to 7x7 kernels",
            "features.1.0.block.3.weight": PATCHES,
            "features.2.1.weight": "resized to 2x2 kernels",
            "features.3.0.block.0.weight": f"{LAST}, resized to 7x7 kernels",
            "features.1.0.layer_scale": "local models kernels and matrices only",
            "classifier.2.weight": HE,
        },
    ),
    "vit with two blocks": (
        lambda: VisionTransformer(
            image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        ),
        {
            "conv_proj.weight": "local was fitted on no 16x16 kernels, only on 3x3 kernels",
            "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": PATCHES,
            "encoder.layers.encoder_layer_0.self_attention.out_proj.weight": PATCHES,
            "encoder.layers.encoder_layer_1.mlp.0.weight": PATCHES,
            "encoder.pos_embedding": "local models kernels and matrices only",
            "heads.head.weight": HE,
        },
    ),
    "one and three axes": (
        Voxels,
        {
            "embedding.weight": "local models kernels and matrices only",
            "line.weight": "conv_weight-5-0",
            "longer.weight": "conv_weight-5-0, resized to 9 kernels",
            "memory.weight_ih_l0": PATCHES,
            "space.weight": "conv_weight-3x3x3-0",
            "time.weight": "local was fitted on no 3x1x1 kernels",
            "head.weight": HE,
        },
    ),
}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]()


def local(kind: str = "conv-vae") -> LocalGenerator:
    options = dict(channels=4, hidden=8, most_stretch=3.0)
    return LocalGenerator(LocalConfig(kind=kind, groups=GROUPS, **options), name="local").eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_group_or_its_fallback_with_the_reason(name):
    model = network(name)
    report = init(model, local(), seed=0)
    accounts = report.generated | report.fallbacks | report.kept
    for info in take_inventory(model)[0]:
        if info.name in report.generated:
            assert info.role in MATRIX_ROLES and not info.output
            assert report.generated[info.name].removeprefix("local: ").split(",")[0] in GROUPS
        else:
            reasons = ("leaves the output layer to He", "was fitted on no")
            wanted = reasons if info.role in MATRIX_ROLES else ("models kernels and matrices only",)
            assert any(f"local {reason}" in accounts[info.name] for reason in wanted), info
    for tensor, expected in MODELS[name][1].items():
        assert expected in accounts[tensor], tensor


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet50 with one block a stage"])
def test_every_kind_makes_the_same_tensors_and_leaves_the_others_to_the_same_fallback_with_the_same_values(name):
    """Else a comparison of kinds would compare other things too. The ResNet is too wide for a PixelCNN in a test."""
    model, known = network(name), None
    for kind in SLICE_MODELS:
        report = init(model, local(kind), seed=0)
        left = {each: value.clone() for each, value in model.named_parameters() if each in report.fallbacks}
        accounts = (report.generated, report.fallbacks, report.kept)
        if known is None:
            known = accounts, left
        assert accounts == known[0], kind
        assert all(torch.equal(left[each], value) for each, value in known[1].items()), kind
