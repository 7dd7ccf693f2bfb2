"""GHN trainings of a few steps, which tests of `train_generators` start from."""

from __future__ import annotations

from dataclasses import replace

from generators.ghn.config import GHNConfig
from train_generators.ghn_config import GHNTrainingConfig

SHAPE = GHNConfig(hidden=16, heads=2, layers=1, width=32, rank=8, cells=8)
QUICK = GHNTrainingConfig(
    architectures=("resnet-8-w4", "mlp-1-w16"), steps=8, batch_size=32, lr=5e-3, log_every=3, evaluate_every=1000,
    save_every=4, ghn=SHAPE, anchor_warm_up=0.5, cosine_weight=0.0, draws=1,
)  # fmt: skip
NOISY = replace(QUICK, ghn=replace(SHAPE, anchor=0.5, code=4), draws=2, cosine_weight=0.3, name="n")
