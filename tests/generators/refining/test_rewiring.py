"""Rewiring against its slow definition: what it keeps, in which law it draws, and how far strengths come together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from generators.filling import init
from generators.initialiser import Request
from generators.inventory import inventory
from generators.refining import rewiring
from generators.refining.rewiring import Rewiring, rewire_rows

SHAPES = {  # He weights as matrices, with the ratios of strength variances (inputs, outputs) of the research notes
    "linear 256x256": ((256, 256), (0.052, 0.045)),
    "linear 512x784": ((512, 784), (0.032, 0.027)),
    "conv 64x64x3x3": ((64, 576), (0.244, 0.027)),
    "conv 256x128x3x3": ((256, 1152), (0.083, 0.017)),
}


def he(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * math.sqrt(2 / shape[1])


def order(sums: np.ndarray, race: np.ndarray | None) -> np.ndarray:
    return rewiring.order(torch.from_numpy(sums), None if race is None else torch.from_numpy(race)).numpy()


def rewired(matrix: np.ndarray, draws: np.random.Generator | None) -> np.ndarray:
    """Of one matrix."""
    return rewiring.rewired(torch.from_numpy(matrix)[None], [draws])[0].numpy()


def slow_pass(matrix: np.ndarray, draws: np.random.Generator | None) -> np.ndarray:
    """The paper's loop: numpy's choice without replacement, or the largest sum first; one number at a time."""
    result = matrix.copy()
    for row in range(1, len(result)):
        sums = result[:row].sum(axis=0)
        if draws is None:
            columns = sorted(range(len(sums)), key=lambda column: -sums[column])
        else:
            odds = sums + abs(sums.min()) + 1
            columns = draws.choice(len(sums), size=len(sums), replace=False, p=odds / odds.sum())
        for column, weight in zip(columns, sorted(result[row]), strict=True):
            result[row, column] = weight
    return result


def slow(matrix: np.ndarray, draws: np.random.Generator | None) -> np.ndarray:
    return slow_pass(slow_pass(matrix, draws).T, draws).T


def ratios(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Variance of input strengths and of output strengths, after against before."""
    return tuple(after.sum(axis).var() / before.sum(axis).var() for axis in (0, 1))


def test_greedy_is_the_slow_greedy() -> None:
    """Exactly: nothing is drawn."""
    for shape in ((1, 7), (7, 1), (20, 30), (65, 40)):
        matrix = he(shape, seed=sum(shape))
        np.testing.assert_array_equal(rewired(matrix, None), slow(matrix, None))


def test_first_column_drawn_follows_the_odds() -> None:
    """10,000 rows drawn for five sums: how often each column comes first is p (chi-square, at 1 in 1,000)."""
    sums = np.array([0.3, -1.2, 2.0, 0.0, 5.0])
    odds = sums + abs(sums.min()) + 1
    draws = np.random.default_rng(5)
    firsts = [order(sums, draws.standard_exponential(5))[0] for _ in range(10_000)]
    assert chisquare(np.bincount(firsts, minlength=5), 10_000 * odds / odds.sum()).pvalue > 1e-3


def test_whole_orders_follow_the_law_of_numpy() -> None:
    """All 24 orders of four columns come as often as the product of successive shares says, as numpy's do."""
    sums = np.array([0.5, -0.5, 1.5, 3.0])
    odds = sums + abs(sums.min()) + 1
    draws = np.random.default_rng(6)
    expected: dict[tuple[int, ...], float] = {}
    for columns in itertools.permutations(range(4)):
        shares = odds[list(columns)]
        expected[columns] = float(np.prod(shares / shares[::-1].cumsum()[::-1]))
    fast = [tuple(order(sums, draws.standard_exponential(4))) for _ in range(10_000)]
    numpys = [tuple(draws.choice(4, 4, replace=False, p=odds / odds.sum())) for _ in range(10_000)]
    for found in (fast, numpys):
        counts = [found.count(columns) for columns in expected]
        assert chisquare(counts, [10_000 * share for share in expected.values()]).pvalue > 1e-3


def test_the_race_is_the_gumbel_trick() -> None:
    sums, race = he((1, 500))[0], np.random.default_rng(1).standard_exponential(500)
    odds = sums + abs(sums.min()) + 1
    keys = np.log(odds / odds.sum()) - np.log(race)
    np.testing.assert_array_equal(order(sums, race), np.argsort(-keys))


@pytest.mark.parametrize("draws", [np.random.default_rng(0), None])
def test_one_pass_permutes_within_rows(draws) -> None:
    """Of rows and of their sums nothing changes, of the first row not even the order; columns draw together."""
    before = he((256, 256))
    after = before.copy()
    rewire_rows(torch.from_numpy(after)[None], [draws])
    np.testing.assert_array_equal(np.sort(after, axis=1), np.sort(before, axis=1))
    np.testing.assert_array_equal(after[0], before[0])
    columns, rows = ratios(before, after)
    assert columns < 0.1 and rows == pytest.approx(1.0, abs=1e-12)
    transposed = np.ascontiguousarray(after.T)
    rewire_rows(torch.from_numpy(transposed)[None], [draws])
    np.testing.assert_array_equal(np.sort(transposed, axis=1), np.sort(after.T, axis=1))


@pytest.mark.parametrize("greedy", [False, True])
def test_matrices_side_by_side_are_what_each_is_alone(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with races drawn a few rows at a time."""
    weights = torch.stack([torch.from_numpy(he((20, 30), seed)) for seed in range(3)])
    draws = [None if greedy else np.random.default_rng(seed) for seed in range(3)]
    alone = [rewiring.rewired(matrix[None], [draw])[0] for matrix, draw in zip(weights, draws, strict=True)]
    again = [None if greedy else np.random.default_rng(seed) for seed in range(3)]
    monkeypatch.setattr(rewiring, "DRAWN_TOGETHER", 100)
    assert torch.equal(rewiring.rewired(weights, again), torch.stack(alone))


def test_a_model_a_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many matrices of one shape go together does not show; the layers of a TransformerEncoder are alike."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)
    init(model, "he+rewire", seed=1)
    together = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(rewiring, "REWIRED_TOGETHER", 1)
    init(model, "he+rewire", seed=1)
    assert all(torch.equal(value, together[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("greedy", [False, True])
def test_sorting_of_other_devices_gives_the_same(greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is given, torch's own sorts, permutes weights of the CPU like numpy's."""
    weights = torch.from_numpy(he((40, 50)))[None]
    expected = rewiring.rewired(weights, [None if greedy else np.random.default_rng(1)])
    monkeypatch.setattr(rewiring, "sort", lambda values: values.sort(dim=-1).values)
    monkeypatch.setattr(
        rewiring, "argsort",
        lambda values, falling=False: values.argsort(dim=-1, descending=falling, stable=True),
    )  # fmt: skip
    assert torch.equal(rewiring.rewired(weights, [None if greedy else np.random.default_rng(1)]), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["rewire", "rewire-greedy", "he-stabilised"])
def test_a_gpu_gives_the_same(name: str) -> None:
    chain = name if name == "he-stabilised" else f"he+{name}"
    here, there = (nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).to(device) for device in ("cpu", "cuda"))
    init(here, chain, seed=1)
    init(there, chain, seed=1)
    assert all(torch.equal(one, two.cpu()) for one, two in zip(here.parameters(), there.parameters(), strict=True))


def many_ratios(shape: tuple[int, int], rewire: Callable, seeds: int) -> np.ndarray:
    """`[seeds, 2]`: ratios of He weights, each with draws of its own."""
    starts = (he(shape, seed) for seed in range(seeds))
    return np.array([ratios(start, rewire(start, np.random.default_rng(seed))) for seed, start in enumerate(starts)])


@pytest.mark.parametrize("name", SHAPES)
def test_strengths_draw_together_as_measured(name: str) -> None:
    """Mean ratios of 16 seeds are within 30 % of those of the research notes."""
    shape, expected = SHAPES[name]
    found = many_ratios(shape, rewired, 16)
    assert found.mean(axis=0) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("shape", [(256, 256), (64, 576)])
def test_strengths_draw_together_as_in_the_slow_form(shape: tuple[int, int]) -> None:
    """Mean ratios over 16 seeds agree within 4 standard errors."""
    fast = many_ratios(shape, rewired, 16)
    reference = many_ratios(shape, slow, 16)
    error = np.sqrt((fast.var(axis=0, ddof=1) + reference.var(axis=0, ddof=1)) / 16)
    assert (abs(fast.mean(axis=0) - reference.mean(axis=0)) < 4 * error).all()


def test_bounds_of_the_notes() -> None:
    """He 256x256, 5 seeds: both ratios < 0.12. He conv 64x64x3x3: outputs < 0.08, inputs < 0.4. Greedy: < 0.003."""
    for seed in range(5):
        square, conv = he((256, 256), seed), he((64, 576), seed)
        assert max(ratios(square, rewired(square, np.random.default_rng(seed)))) < 0.12
        inputs, outputs = ratios(conv, rewired(conv, np.random.default_rng(seed)))
        assert inputs < 0.4 and outputs < 0.08
        assert max(ratios(square, rewired(square, None))) < 0.003


def _model() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 12, 3),
            "grouped": nn.Conv2d(8, 12, 3, groups=4),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "transposed": nn.ConvTranspose2d(8, 12, 3, groups=2),
            "norm": nn.BatchNorm2d(8),
            "linear": nn.Linear(20, 30),
            "attention": nn.MultiheadAttention(16, 2),
            "lstm": nn.LSTM(8, 12),
            "embedding": nn.Embedding(5, 4),
        }
    )


@pytest.mark.parametrize("name", ["rewire", "rewire-greedy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_numbers(name: str, dtype: torch.dtype) -> None:
    """Every matrix keeps its values, shape and type, blocks keep theirs; vectors and embeddings are not touched."""
    model = _model().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = init(model, name, seed=3)
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and value.shape == before[key].shape
        assert torch.equal(value.flatten().sort()[0], before[key].flatten().sort()[0]), key
        changed = key in report.generated
        assert changed == (value.ndim > 1 and key != "embedding.weight")
        assert torch.equal(value, before[key]) != changed, key
        if changed:
            assert set(report.statistics[key]) >= {"input_strength_ratio", "output_strength_ratio"}
    for key, blocks in (("attention.in_proj_weight", 3), ("lstm.weight_hh_l0", 4)):
        pairs = zip(model.get_parameter(key).chunk(blocks), before[key].chunk(blocks), strict=True)
        assert all(torch.equal(new.flatten().sort()[0], old.flatten().sort()[0]) for new, old in pairs)


def test_one_seed_one_result() -> None:
    def weight(seed: int, member: int = 0) -> Tensor:
        model = nn.Linear(20, 30)
        init(model, "he+rewire", seed=seed, member=member)
        return model.weight.detach()

    assert torch.equal(weight(1), weight(1))
    start = nn.Linear(20, 30)
    init(start, "he", seed=1)
    requests = [Request(inventory(start), seed=seed, member=member) for seed, member in ((1, 0), (2, 0), (1, 1))]
    values = [Rewiring().propose(start, request).values["weight"] for request in requests]
    assert torch.equal(values[0], weight(1))
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_what_has_no_matrix_and_what_is_zero() -> None:
    norm, zero = nn.BatchNorm1d(4), nn.Linear(4, 4)
    assert "no matrix to rewire" in init(norm, "rewire").notes[0]
    with torch.no_grad():
        zero.weight.zero_()
    init(zero, "rewire")
    assert zero.weight.eq(0).all()


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"one": nn.Linear(6, 6), "two": nn.Linear(6, 6)})
    model["two"].weight = model["one"].weight
    report = init(model, "rewire")
    assert model["two"].weight is model["one"].weight
    assert "one.weight" in report.generated and "two.weight" in report.kept
