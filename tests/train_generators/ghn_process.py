"""One process of a training for `test_processes.py`: `torchrun --nproc-per-node N ghn_process.py OUT`.

Also imported by the test, which does the same in its own process.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from collect.data import ImageSet, load
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from train_generators.ghn import fit
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.ghn_step import gradients
from train_generators.processes import join
from train_generators.subject import ImageStream, Subject

CONFIG = GHNTrainingConfig(
    architectures=("cnn-2-w4", "mlp-1-w8", "resnet-8-w4"), held_out=("mlp-1-w6",), steps=4, meta_batch=4, batch_size=16,
    draws=2, cosine_weight=0.1, log_every=1, evaluate_every=4, save_every=2,
    ghn=GHNConfig(hidden=16, layers=1, heads=2, width=16, rank=8, cells=8, anchor=0.5, code=4),
)  # fmt: skip


def one_step(fabric, images: ImageSet) -> dict[str, Tensor]:
    """Loss and gradients of one step; gradients that are None are left out."""
    ghn = GHN(CONFIG.ghn)
    subjects = [Subject(name, ghn, images, draws=CONFIG.draws) for name in CONFIG.architectures]
    source = ImageStream(images, batch_size=CONFIG.batch_size, augmentation="none", seed=CONFIG.seed)
    loss, parts = gradients(fabric, ghn, subjects, CONFIG, source, 3)
    found = {name: value.grad.clone() for name, value in ghn.named_parameters() if value.grad is not None}
    return found | {"loss": torch.tensor(loss)} | {f"part {name}": torch.tensor(value) for name, value in parts.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, images, fabric = Path(sys.argv[1]), load("digits"), join("cpu")
    found = one_step(fabric, images)
    save_file(found, out / f"gradients-{fabric.global_rank}.safetensors")
    fit(CONFIG, out / "ghn", images=images, fabric=fabric, quiet=True)
