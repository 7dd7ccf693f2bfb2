"""`torch` against the real thing: modules that have just been made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from generators.filling import init
from generators.seeds import isolated
from small_models import Forward

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(120, 90),
    "bilinear": lambda: nn.Bilinear(20, 30, 40),
    "conv": lambda: nn.Conv2d(16, 60, 3),
    "grouped": lambda: nn.Conv1d(32, 64, 5, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(60, 16, 3),
    "embedding": lambda: nn.Embedding(200, 30),
    "bag": lambda: nn.EmbeddingBag(200, 30),
    "lstm": lambda: nn.LSTM(20, 48, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(20, 48, proj_size=12),
    "gru": lambda: nn.GRU(20, 48),
    "cell": lambda: nn.RNNCell(40, 50),
    "attention": lambda: nn.MultiheadAttention(48, 4),
    "attention of three": lambda: nn.MultiheadAttention(48, 4, kdim=30, vdim=20, add_bias_kv=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(32, 4, 64),
    "transformer": lambda: nn.Transformer(32, 2, 1, 1, 64, batch_first=True),
    "batch norm": lambda: nn.BatchNorm2d(50),
    "layer norm": lambda: nn.LayerNorm(50),
    "group norm": lambda: nn.GroupNorm(5, 50),
    "rms norm": lambda: nn.RMSNorm(50),
    "prelu": lambda: nn.PReLU(7),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(120, 90)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(60, 90)),
}


def filled(model: nn.Module, **settings: int) -> nn.Module:
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(9.0)
    init(model, "torch", **settings)
    return model


def distance(one: Tensor, two: Tensor) -> float:
    """Largest distance between two empirical distribution functions."""
    values = torch.cat([one, two]).sort().values
    shares = [torch.searchsorted(sample.sort().values, values, right=True) / len(sample) for sample in (one, two)]
    return (shares[0] - shares[1]).abs().max().item()


@pytest.mark.parametrize("name", MODULES)
def test_every_tensor_has_the_distribution_of_a_new_module(name: str) -> None:
    """Twenty new ones and twenty of ours: Kolmogorov and Smirnov see no difference (p = 0.001)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        new = [MODULES[name]() for _ in range(20)]
    ours = [filled(MODULES[name](), seed=5, member=member) for member in range(20)]
    for key, first in new[0].named_parameters():
        samples = [torch.cat([m.get_parameter(key).detach().flatten() for m in group]) for group in (new, ours)]
        if all(torch.equal(module.get_parameter(key), first) for module in new):
            assert samples[1].equal(samples[0]), f"{key} is constant"
            continue
        assert distance(*samples) < 1.95 * math.sqrt(2 / len(samples[0])), key


def test_the_distance_tells_zero_biases_from_those_of_torch() -> None:
    """What it is about: a spread that is 10 % off, or biases of zero, are seen in as many values."""
    new = torch.rand(1800, generator=torch.Generator().manual_seed(0)) - 0.5
    limit = 1.95 * math.sqrt(2 / 1800)
    assert distance(new, torch.zeros(1800)) > limit and distance(new, 1.2 * new.flip(0)) > limit


def test_bounds() -> None:
    """1 / sqrt(fan-in) for weights and biases of linear layers and convolutions, 1 / sqrt(hidden) for an LSTM; Xavier's
    sqrt(6 / (fan-in + fan-out)) for an attention, with the three matrices as one.
    """
    layers = [nn.Linear(64, 500), nn.Conv2d(4, 500, 4), nn.ConvTranspose2d(500, 4, 4), nn.LSTM(10, 64)]
    for name, value in filled(nn.ModuleList(layers)).named_parameters():
        if value.numel() > 4:
            assert 0.98 * 0.125 < value.abs().max() <= 0.125, name
    attention = filled(nn.MultiheadAttention(64, 4))
    bound = math.sqrt(6 / (64 + 192))
    assert 0.99 * bound < attention.in_proj_weight.abs().max() <= bound
    assert attention.in_proj_bias.eq(0).all() and attention.out_proj.bias.eq(0).all()


def test_the_same_numbers_as_by_hand() -> None:
    """`reset_parameters` under the random state of seed, member and path; the caller's is as it was."""
    model, by_hand = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)), nn.Linear(5, 6)
    state = torch.get_rng_state()
    init(model, "torch", seed=3, member=2)
    assert torch.get_rng_state().equal(state)
    with isolated(3, "torch", 2, "1"):
        by_hand.reset_parameters()
    assert model[1].weight.equal(by_hand.weight) and model[1].bias.equal(by_hand.bias)
    longer = nn.Sequential(nn.Conv2d(7, 3, 3), nn.Linear(5, 6), nn.Linear(6, 2))
    init(longer, "torch", seed=3, member=2)
    assert longer[1].weight.equal(by_hand.weight), "whatever else the model holds"


def test_precision_does_not_matter() -> None:
    plain, half, double = (filled(nn.LSTM(5, 6).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    for name, value in plain.named_parameters():
        assert half.get_parameter(name).equal(value.bfloat16()) and double.get_parameter(name).equal(value.double())


class Scaled(nn.Linear):
    """A third party's layer that resets itself, but not all of it."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.gain = nn.Parameter(torch.full((3,), 2.5))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)
        self.bias.data.uniform_(2.0, 3.0)


def test_modules_of_third_parties() -> None:
    """Their methods are called; what none sets is made by `he`, which leaves what it has no rule for."""
    model = Forward(lambda m, x: m.layer(x) @ m.free, layer=Scaled(), free=nn.Parameter(torch.zeros(5, 4)))
    report = init(model, "torch", example_inputs=torch.zeros(2, 6))
    assert model.layer.weight.eq(0.25).all() and model.layer.bias.min() >= 2.0
    assert report.generated == {"layer.weight": "torch", "layer.bias": "torch"}
    assert report.fallbacks == {"free": "he (torch: no reset_parameters() sets it)"} and model.free.std() > 0
    assert "no reset_parameters() sets it" in report.kept["layer.gain"] and model.layer.gain.eq(2.5).all()


def test_a_reset_that_fails_is_noted() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].reset_parameters = lambda scale: None  # type: ignore[assignment,misc]
    report = init(model, "torch")
    assert "he (torch: no reset_parameters() sets it)" in report.fallbacks["0.weight"]
    assert report.generated.keys() == {"1.weight", "1.bias"}
    assert "torch: 0 cannot be reset: TypeError" in report.notes[0]


def test_running_statistics_of_the_model_are_its_own_until_written() -> None:
    """A failing check leaves them; frozen layers keep them; others are reset."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    before = copy.deepcopy(model)
    model[1].requires_grad_(False)
    report = init(model, "torch")
    assert model[1].running_var.equal(before[1].running_var) and "frozen" in report.kept["1.running_var"]
    assert model[2].running_var.eq(1).all() and model[2].running_mean.eq(0).all()


def test_tied_weights_are_drawn_by_the_owner_of_the_first_name() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(300, 40), "head": nn.Linear(40, 300, bias=False)})
    model["head"].weight = model["words"].weight
    report = init(model, "torch")
    assert model["words"].weight.std().item() == pytest.approx(1.0, rel=0.03)
    assert report.kept["head.weight"] == "tied to words.weight"


def test_computed_weights() -> None:
    """Orthogonal ones keep theirs in a buffer; pruned ones are not reached and go to `he`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (parametrizations.orthogonal(nn.Linear(8, 8)) for _ in range(2))
    report = init(first, "torch", seed=1)
    init(second, "torch", seed=1)
    assert first.weight.equal(second.weight) and "follows" in report.generated["parametrizations.weight.0.base"]
    torch.testing.assert_close(first.weight @ first.weight.T, torch.eye(8))
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    mask = pruned.weight_mask.clone()
    report = init(pruned, "torch")
    assert report.fallbacks.keys() == {"weight_orig"} and pruned.weight_mask.equal(mask)


class Doubled(nn.Module):
    """A parametrisation that cannot be turned round."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrisation_without_inverse_goes_to_the_fallback() -> None:
    model = nn.Linear(6, 5)
    parametrize.register_parametrization(model, "weight", Doubled())
    report = init(model, "torch")
    assert report.fallbacks.keys() == {"parametrizations.weight.original"} and report.generated == {"bias": "torch"}
    assert "Doubled does not implement right_inverse" in report.notes[0]


def test_statistics_of_a_frozen_layer_in_two_places_stay():
    """The second name of a shared buffer is a buffer too."""
    norm = nn.BatchNorm1d(4)
    norm.running_var.fill_(0.3)
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)
    init(model, "torch")
    assert torch.equal(norm.running_var, torch.full((4,), 0.3))


class OwnGenerator(nn.Module):
    """Draws from a generator that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def reset_parameters(self) -> None:
        self.weight.normal_(generator=self.generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_generator_of_the_module_does_not_advance():
    """Its numbers come from the seed, twice the same."""
    model = OwnGenerator()
    before = model.generator.get_state()
    init(model, "torch", seed=5)
    first = model.weight.clone()
    init(model, "torch", seed=5)
    assert torch.equal(model.weight, first) and first.std() > 0.1
    assert torch.equal(model.generator.get_state(), before)
