"""Mimetic initialisation: the products of projections against their formulas, in every form of self-attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from generators.filling import init
from generators.refining.mimetic import Mimetic, halves
from generators.seeds import stream
from small_models import Forward

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

CHANNELS, HEADS = 64, 4
WIDTH = CHANNELS // HEADS
TOKENS = torch.zeros(2, 8, CHANNELS)


def _heads(value: Tensor) -> Tensor:
    return value.unflatten(-1, (HEADS, -1)).transpose(-2, -3)


def _attend(query: Tensor, key: Tensor, value: Tensor, fused: bool = True) -> Tensor:
    """Of `[..., heads, tokens, width]`, by torch's operation or by hand, joined to `[..., tokens, channels]`."""
    if fused:
        answer = F.scaled_dot_product_attention(query, key, value)
    else:
        answer = ((query * WIDTH**-0.5) @ key.transpose(-2, -1)).softmax(-1) @ value
    return answer.transpose(-2, -3).flatten(-2)


def _stacked(fused: bool) -> nn.Module:
    """One projection with query, key and value in thirds, as in timm."""

    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = m.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).movedim(-3, 0).transpose(-2, -3).unbind(0)
        return x + m.out(_attend(query, key, value, fused))

    return Forward(forward, qkv=nn.Linear(CHANNELS, 3 * CHANNELS), out=nn.Linear(CHANNELS, CHANNELS))


def _separate(fused: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.out(_attend(_heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x)), fused))

    return Forward(forward, **{name: nn.Linear(CHANNELS, CHANNELS) for name in ("q", "k", "v", "out")})


def _inputs_first() -> nn.Module:
    """Square weights that stand to the right of the tokens, as in GPT-2: nothing in their shape shows it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return x + _attend(_heads(x @ m.q), _heads(x @ m.k), _heads(x @ m.v)) @ m.out

    return Forward(forward, **{name: nn.Parameter(torch.randn(CHANNELS, CHANNELS)) for name in ("q", "k", "v", "out")})


def _torch() -> nn.Module:
    attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
    return Forward(lambda m, x: x + m.attention(x, x, x, need_weights=False)[0], attention=attention)


def _parts(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V `[channels, channels]` and W_proj as the paper writes them: rows times matrix."""
    named = dict(model.named_parameters())
    if "q" in named:
        query, key, value, out = (named[name].detach().double() for name in ("q", "k", "v", "out"))
        return query, key, value, out
    stack = next((value for name, value in named.items() if name.endswith(("qkv.weight", "in_proj_weight"))), None)
    parts = [named[f"{name}.weight"] for name in "qkv"] if stack is None else stack.chunk(3)
    output = next(value for name, value in named.items() if name.endswith(("out.weight", "out_proj.weight")))
    query, key, value, out = (part.detach().double().T for part in (*parts, output))
    return query, key, value, out


FORMS = {
    "stacked": lambda: _stacked(True),
    "stacked by hand": lambda: _stacked(False),
    "separate": lambda: _separate(True),
    "separate by hand": lambda: _separate(False),
    "inputs first": _inputs_first,
    "torch": _torch,
}


@pytest.mark.parametrize("form", FORMS)
def test_products(form: str) -> None:
    """Per head, W_Q W_K^T is the best approximation at rank k of the draw; W_V W_proj is the draw itself.

    The draws are made again, and factored by numpy in float64.
    """
    model = FORMS[form]()
    biases = {name: value.clone() for name, value in model.named_parameters() if value.ndim == 1}
    report = init(model, "mimetic", seed=3, member=1, example_inputs=TOKENS)
    first = next(iter(report.generated))
    draws = stream(3, "mimetic", 1, first)
    query, key, value, out = _parts(model)
    for head in range(HEADS):
        columns = slice(head * WIDTH, (head + 1) * WIDTH)
        target = 0.7 * torch.randn(CHANNELS, CHANNELS, generator=draws) / WIDTH**0.5 + 0.7 * torch.eye(CHANNELS)
        left, values, right = np.linalg.svd(target.double().numpy())
        best = (left[:, :WIDTH] * values[:WIDTH]) @ right[:WIDTH]
        np.testing.assert_allclose(query[:, columns] @ key[:, columns].T, best, atol=1e-5)
    target = 0.4 * torch.randn(CHANNELS, CHANNELS, generator=draws) / CHANNELS**0.5 - 0.4 * torch.eye(CHANNELS)
    np.testing.assert_allclose(value @ out, target.double(), atol=1e-5)
    assert report.figures == {"mimetic": {"attentions": 1.0}} and not report.notes
    assert all(torch.equal(model.get_parameter(name), value) for name, value in biases.items())


@pytest.mark.parametrize("form", FORMS)
def test_products_by_their_moments(form: str) -> None:
    """Without knowing the draws: diagonals and spreads over four standard errors, and factors of equal size."""
    model = FORMS[form]()
    init(model, "he+mimetic", seed=7, example_inputs=TOKENS)
    query, key, value, out = _parts(model)
    product = value @ out
    off = product[~torch.eye(CHANNELS, dtype=torch.bool)]
    assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=4 * 0.4 / CHANNELS)
    assert off.std().item() == pytest.approx(0.4 / CHANNELS**0.5, rel=4 / (2 * off.numel()) ** 0.5)
    assert torch.linalg.matrix_rank(product) == CHANNELS
    assert value.norm().item() == pytest.approx(out.norm().item(), rel=1e-4)
    for one, other in zip(query.split(WIDTH, 1), key.split(WIDTH, 1), strict=True):
        head = one @ other.T
        assert torch.linalg.matrix_rank(head, rtol=1e-5) == WIDTH
        assert head.diagonal().mean() > 0.1 and one.norm().item() == pytest.approx(other.norm().item(), rel=1e-4)


def test_tokens_look_at_themselves() -> None:
    """Attention of random tokens to themselves is several times 1 / tokens, and with He weights it is not."""

    def to_itself(spec: str) -> float:
        model = _stacked(True)
        init(model, spec, seed=0, example_inputs=TOKENS)
        query, key, _, _ = _parts(model)
        x = torch.randn(50, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        scores = (x @ query[:, :WIDTH]) @ (x @ key[:, :WIDTH]).T / WIDTH**0.5
        return scores.softmax(-1).diagonal().mean().item() * 50

    assert to_itself("he+mimetic") > 5 > 2 > to_itself("he")


def test_halves_are_the_best_approximation() -> None:
    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    left, right = halves(matrix, 5)
    error = (matrix - left @ right).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[5:].norm())
    torch.testing.assert_close(left.T @ left, right @ right.T, atol=1e-5, rtol=0)  # balanced


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=2), 2),
        (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=2), 2),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3), 3),
    ],
)
def test_known_networks(make: Callable, count: int) -> None:
    model = make()
    inputs = torch.zeros(2, 5, 32) if isinstance(model, nn.TransformerEncoder) else None
    report = init(model, "mimetic", example_inputs=inputs)
    assert report.figures["mimetic"]["attentions"] == count and not report.notes
    assert len(report.generated) == 2 * count


def _interleaved() -> nn.Module:
    """Query, key and value side by side within each head, as in GPT-NeoX."""

    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = _heads(m.qkv(x)).chunk(3, -1)
        return m.out(_attend(query, key, value))

    return Forward(forward, qkv=nn.Linear(CHANNELS, 3 * CHANNELS), out=nn.Linear(CHANNELS, CHANNELS))


def _between_channels() -> nn.Module:
    """Channels that look at channels, as in XCiT; there are as many positions as a head could be wide."""

    def forward(m: Any, x: Tensor) -> Tensor:
        query, key, value = (part.transpose(-2, -1) for part in map(_heads, m.qkv(x).chunk(3, -1)))
        return m.out(F.scaled_dot_product_attention(query, key, value).transpose(-2, -1).transpose(1, 2).flatten(2))

    return Forward(forward, qkv=nn.Linear(CHANNELS, 3 * CHANNELS), out=nn.Linear(CHANNELS, CHANNELS))


def _normalised() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(_attend(m.norm(_heads(m.q(x))), _heads(m.k(x)), _heads(m.v(x))))

    layers = {name: nn.Linear(CHANNELS, CHANNELS) for name in ("q", "k", "v", "out")}
    return Forward(forward, norm=nn.LayerNorm(WIDTH), **layers)


def _shared_keys() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        key, value = (layer(x).unflatten(-1, (2, WIDTH)).transpose(-2, -3) for layer in (m.k, m.v))
        key, value = (part.repeat_interleave(2, -3) for part in (key, value))
        return m.out(_attend(_heads(m.q(x)), key, value))

    narrow = {name: nn.Linear(CHANNELS, CHANNELS // 2) for name in ("k", "v")}
    return Forward(forward, q=nn.Linear(CHANNELS, CHANNELS), out=nn.Linear(CHANNELS, CHANNELS), **narrow)


def _other_stream() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.attention(m.stem(x), x, x, need_weights=False)[0]

    attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
    return Forward(forward, stem=nn.Linear(CHANNELS, CHANNELS), attention=attention)


def _computed() -> nn.Module:
    model = _stacked(True)
    parametrizations.weight_norm(model.qkv)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_interleaved, "nothing shows that query, key and value are thirds"),
        (_between_channels, "compare channels"),
        (_normalised, "do not feed them directly"),
        (_shared_keys, "differ in width"),
        (_other_stream, "another stream"),
        (_computed, "computed"),
        (lambda: nn.Linear(CHANNELS, CHANNELS), "has no attention"),
    ],
)
def test_what_is_not_certain_is_left_alone(make: Callable[[], nn.Module], why: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    report = init(model, "mimetic", example_inputs=TOKENS)
    assert not report.generated and why in report.notes[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_output_that_cannot_be_told_leaves_values() -> None:
    """Queries and keys are set, values and what follows them are as they were."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.norm(_attend(_heads(m.q(x)), _heads(m.k(x)), _heads(m.v(x)))))

    layers = {name: nn.Linear(CHANNELS, CHANNELS) for name in ("q", "k", "v", "out")}
    report = init(Forward(forward, norm=nn.LayerNorm(CHANNELS), **layers), "mimetic", example_inputs=TOKENS)
    assert set(report.generated) == {"q.weight", "k.weight"} and "queries and keys are set" in report.notes[0]


def test_values_of_the_config_seeds_and_half_precision() -> None:
    """No noise gives the identity itself; seeds and members differ; a model in bfloat16 gets the rounded numbers."""
    model = _separate(True)
    init(model, Mimetic(query_key_noise=0.0, value_noise=0.0, value_identity=0.3), example_inputs=TOKENS)
    _, _, value, out = _parts(model)
    torch.testing.assert_close(value @ out, -0.3 * torch.eye(CHANNELS, dtype=torch.float64), atol=1e-6, rtol=0)
    made = []
    for seed, member in ((0, 0), (0, 0), (1, 0), (0, 1)):
        init(model, "mimetic", seed=seed, member=member, example_inputs=TOKENS)
        made.append(model.q.weight.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and not torch.equal(made[0], made[3])
    half = _separate(True).bfloat16()
    init(half, "mimetic", example_inputs=TOKENS.bfloat16())
    assert half.q.weight.dtype == torch.bfloat16 and torch.equal(half.q.weight.detach(), made[0].bfloat16())
