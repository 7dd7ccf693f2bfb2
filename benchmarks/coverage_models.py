"""The registries of the coverage benchmark: classification models of torchvision, timm, transformers, and kin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

SIDES = (64, 96, 128, 224)  # forwards are run at the first that the model takes


@dataclass(frozen=True)
class Case:
    """One model of the registries.

    Attributes:
        model: built, on the CPU.
        inputs: what a forward takes, each to be tried in turn; a tuple of positional or a dict of keyword arguments.
        example: `example_inputs` of the tracer, None to let it guess.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    example: Any = None


@dataclass(frozen=True)
class Family:
    """Models of one origin: their names, and how one is built."""

    names: Callable[[], Iterable[str]]
    build: Callable[[str], Case]


def images(*sides: int, channels: int = 3) -> tuple[Any, ...]:
    return tuple((torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)),) for side in sides)


def classifier(name: str) -> Case:
    without_own_start = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return Case(torchvision.models.get_model(name, **without_own_start), images(*SIDES))


def detector_or_segmenter(name: str) -> Case:
    """Backbones are not downloaded, and images are not enlarged to the 800 pixels of the recipes."""
    small = {"min_size": 64, "max_size": 96} if name in DETECTORS and not name.startswith("ssd") else {}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **small)
    batch = images(64)[0]
    inputs = (list(batch[0]),) if name in DETECTORS else batch
    return Case(model, (inputs,), inputs)


DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)
SEGMENTERS = torchvision.models.list_models(module=torchvision.models.segmentation)


def smallest_of_module(module: str) -> Case:
    """The model of fewest parameters of a module of `timm.models`, leaving out the toys of timm's own tests."""
    import timm

    sizes: dict[str, int] = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = sum(value.numel() for value in timm.create_model(name).parameters())
    real = [name for name in sizes if not name.startswith("test_")] or list(sizes)
    model = timm.create_model(min(real, key=sizes.__getitem__))
    channels, *own = model.pretrained_cfg["input_size"]
    return Case(model, images(*(side for side in SIDES if side < own[0]), *own[:1], channels=channels))


def modules_of_timm() -> list[str]:
    import timm

    return [module for module in timm.list_modules() if timm.list_models(module=module)]


def language_model(name: str) -> Case:
    """Small models built from a config; nothing is downloaded."""
    import transformers

    kind, settings, inputs = LANGUAGE[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    head = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForSequenceClassification", "Llama": "LlamaForCausalLM",
            "T5": "T5ForConditionalGeneration"}[kind]  # fmt: skip
    return Case(getattr(transformers, head)(config), (inputs,), inputs if name == "t5" else None)


TOKENS = torch.arange(32).reshape(2, 16)
LANGUAGE: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "gpt2": ("GPT2", dict(n_layer=3, n_head=4, n_embd=64, vocab_size=100, n_positions=64), {"input_ids": TOKENS}),
    "bert": ("Bert", dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=64, intermediate_size=128,
                          vocab_size=100), {"input_ids": TOKENS}),
    "llama": ("Llama", dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
                            intermediate_size=128, vocab_size=100), {"input_ids": TOKENS}),
    "t5": ("T5", dict(num_layers=2, num_heads=4, d_model=64, d_kv=16, d_ff=128, vocab_size=100),
           {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
}  # fmt: skip


class Recurrent(nn.Module):
    """Words, an LSTM of two layers, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(24, 3)
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids))[0][:, -1])


def plain(name: str) -> Case:
    return PLAIN[name]()


PLAIN: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), ((torch.ones(2, 64),),)),
    "signal": lambda: Case(
        nn.Sequential(
            nn.Conv1d(2, 16, 9, 4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 9, 4), nn.BatchNorm1d(32),
            nn.PReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5),
        ),
        ((torch.rand(2, 2, 256, generator=torch.Generator().manual_seed(0)),),),
    ),
    "lstm": lambda: Case(Recurrent(), ((TOKENS,),)),
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "torchvision": Family(lambda: torchvision.models.list_models(module=torchvision.models), classifier),
    "timm": Family(modules_of_timm, smallest_of_module),
    "transformers": Family(lambda: LANGUAGE, language_model),
    "detection_segmentation": Family(lambda: [*DETECTORS, *SEGMENTERS], detector_or_segmenter),
    "plain": Family(lambda: PLAIN, plain),
}

SUBSET = (
    "torchvision/densenet121", "torchvision/googlenet", "torchvision/mobilenet_v3_small", "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5", "torchvision/squeezenet1_1", "torchvision/swin_t",
    "timm/coat", "timm/convit", "timm/edgenext", "timm/efficientformer_v2", "timm/pit",
    "transformers/gpt2", "transformers/bert", "transformers/t5",
    "detection_segmentation/fasterrcnn_mobilenet_v3_large_320_fpn", "detection_segmentation/lraspp_mobilenet_v3_large",
    "plain/mlp", "plain/signal", "plain/lstm",
)  # fmt: skip
"""What `--quick` and the tests of every commit cover: each family, and of each kind of layer a small model."""


def every(*, without: Collection[str] = ()) -> list[str]:
    """Names of all models, as `family/name`, but for the families in `without`."""
    chosen = {family: entry for family, entry in FAMILIES.items() if family not in without}
    return [f"{family}/{name}" for family, entry in chosen.items() for name in entry.names()]
