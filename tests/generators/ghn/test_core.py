"""The core decoder against slow obvious twins: loops for the Tucker form, decompositions for the spectrum."""

from __future__ import annotations

import math

import pytest
import torch

from generators.ghn.core import OWN, SHARED, CoreDecoder, interpolation, kernel_basis, kernel_root, read_table
from generators.ghn.decoder import DecoderSettings
from generators.ghn.plan import Group
from generators.ghn.spectrum import equalise, largest_singular_value

KERNELS = [(), (1, 1), (3, 3), (5, 5), (3,), (7, 7), (2, 2), (1, 3)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs, inputs, kernel=(), *, blocks=(0,), nodes=(0,), output=False) -> Group:
    return Group(
        names=tuple(f"w{index}" for index in range(len(blocks))), blocks=blocks, nodes=torch.tensor(nodes),
        outputs=outputs, inputs=inputs, kernel=kernel, fan_in=inputs * math.prod(kernel), output=output,
    )  # fmt: skip


def decoder(*, rank=6, cells=8, steps=0, gain_bound=1.0, classes=5, double=True) -> CoreDecoder:
    settings = DecoderSettings(
        node_width=7, classes=classes, width=9, rank=rank, cells=cells, spectrum_steps=steps, gain_bound=gain_bound
    )
    made = CoreDecoder(settings, generator=rng(1))
    return made.double() if double else made


def vectors(members=2, nodes=3, width=7) -> torch.Tensor:
    return torch.randn(members, nodes, width, generator=rng(2), dtype=torch.float64)


# ---- slow twins --------------------------------------------------------------------------------------------------


def slow_read(cells: list[float], place: float) -> float:
    """The piecewise linear curve through (k + 1/2, cells[k]), level beyond the first and the last, at `place`."""
    at = min(max(place, 0.5), len(cells) - 0.5) - 0.5
    low = min(int(at), len(cells) - 1)
    high = min(low + 1, len(cells) - 1)
    return cells[low] + (at - low) * (cells[high] - cells[low])


def slow_axis(size: int, position: int) -> list[float]:
    """How much of each of the three places of the grid `position` of `size` takes."""
    if size == 1:
        return [0.0, 1.0, 0.0]
    return [slow_read([float(k == cell) for k in range(3)], (position + 0.5) / size * 3) for cell in range(3)]


def slow_basis(kernel: tuple[int, ...]) -> list[list[float]]:
    height, width = (1, 1, *kernel)[-2:]
    rows = []
    for y in range(height):
        for x in range(width):
            rows.append([a * b for a in slow_axis(height, y) for b in slow_axis(width, x)])
    return rows


def slow_decode(net: CoreDecoder, target: Group, nodes: torch.Tensor) -> torch.Tensor:
    """`CoreDecoder.forward` number by number, without equalisation."""
    rank, basis = net.settings.rank, slow_basis(target.kernel)
    found = torch.zeros(len(nodes), len(target.names), target.outputs, target.inputs, len(basis), dtype=torch.float64)
    for m in range(len(nodes)):
        for g, (block, index) in enumerate(zip(target.blocks, target.nodes.tolist(), strict=True)):
            node = nodes[m, index] + net.block_codes[block]
            core = net.head(torch.nn.functional.gelu(net.hidden(node))).reshape(rank, rank, 9)
            for o in range(target.outputs):
                for i in range(target.inputs):
                    column = [
                        slow_read(net.columns[:, q].tolist(), (i + 0.5) / target.inputs * len(net.columns))
                        for q in range(rank)
                    ]
                    if target.output:
                        row = net.class_codes[o].tolist()
                    else:
                        row = [
                            slow_read(net.rows[:, r].tolist(), (o + 0.5) / target.outputs * len(net.rows))
                            for r in range(rank)
                        ]
                    outer = torch.tensor(row).double()[:, None] * torch.tensor(column).double()
                    for s, taken in enumerate(basis):
                        found[m, g, o, i, s] = (outer[..., None] * core * torch.tensor(taken).double()).sum()
            rms = found[m, g].square().mean().sqrt()
            found[m, g] *= net.settings.gain_bound ** torch.tanh(net.gain(node)) / rms
    return found.reshape(*found.shape[:4], *target.kernel)


# ---- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_basis(kernel):
    found = kernel_basis(kernel)
    torch.testing.assert_close(found, torch.tensor(slow_basis(kernel)))
    torch.testing.assert_close(found.sum(1), torch.ones(math.prod(kernel)), msg="every position takes one whole")


def test_kernel_basis_of_the_common_kernels():
    """3 x 3 takes the grid as it is, a linear layer and 1 x 1 its centre, 1-D its middle row."""
    assert torch.equal(kernel_basis((3, 3)), torch.eye(9))
    assert torch.equal(kernel_basis(()), torch.eye(9)[4:5])
    assert torch.equal(kernel_basis((1, 1)), torch.eye(9)[4:5])
    assert torch.equal(kernel_basis((3,)), torch.eye(9)[3:6])


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_root(kernel):
    """The same products between positions of the grid as the basis, with no more rows than that has columns."""
    basis, root = kernel_basis(kernel), kernel_root(kernel)
    assert len(root) == min(len(basis), 9)
    torch.testing.assert_close(root.T @ root, basis.T @ basis)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("cells", [1, 3, 8])
def test_interpolation(count, cells):
    """Shares of two neighbours that add up to one, and the curve that they read against the slow one."""
    shares = interpolation(count, cells)
    assert shares.shape == (count, cells) and shares.min() >= 0 and (shares > 0).sum(1).max() <= 2
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    table = torch.randn(cells, 4, generator=rng(), dtype=torch.float64)
    wanted = [[slow_read(table[:, r].tolist(), (k + 0.5) / count * cells) for r in range(4)] for k in range(count)]
    torch.testing.assert_close(read_table(table, count), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6)
    if count == cells:
        torch.testing.assert_close(read_table(table, count), table)


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (5, 5), (3,), (2, 2)])
@pytest.mark.parametrize("outputs, inputs", [(4, 3), (10, 2)])
def test_decode_against_loops(outputs, inputs, kernel):
    """Fewer and more outputs than the rank (6), every kind of kernel, three targets on two nodes, a gain that is on."""
    net, nodes = decoder(gain_bound=3.0), vectors()
    with torch.no_grad():
        net.gain.weight.normal_(generator=rng(3))
        target = group(outputs, inputs, kernel, blocks=(0, 1, 0), nodes=(0, 0, 2))
        found = net(target, nodes)
        wanted = slow_decode(net, target, nodes)
    assert found.shape == (2, 3, outputs, inputs, *kernel)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [4, 9])
def test_rows_of_classifiers_are_class_codes(classes):
    """Against the loops; and exchanging the codes of two classes exchanges their rows."""
    net, nodes = decoder(classes=classes), vectors()
    target = group(classes, 3, output=True)
    with torch.no_grad():
        found = net(target, nodes)
        torch.testing.assert_close(found, slow_decode(net, target, nodes), rtol=1e-5, atol=1e-6)
        order = torch.tensor([1, 0, *range(2, classes)])
        net.class_codes.copy_(net.class_codes[order])
        torch.testing.assert_close(net(target, nodes), found[:, :, order])


@pytest.mark.parametrize("outputs", [2, 6, 7, 40])
@pytest.mark.parametrize("inputs, kernel", [(5, (3, 3)), (1, (3, 3)), (2, ())])
def test_equalising_between_the_factors_is_equalising_the_whole(outputs, inputs, kernel):
    """The decoder equalises between its factors: same as the whole matrix at once."""
    plain, net = decoder(steps=0), decoder(steps=3)
    target, nodes = group(outputs, inputs, kernel), vectors()
    with torch.no_grad():
        whole = plain(target, nodes)[:, 0].flatten(2)
        found = net(target, nodes)[:, 0].flatten(2)
    for member in range(2):
        wanted = equalise(whole[member], 3) * math.sqrt(whole[member].numel())
        torch.testing.assert_close(found[member], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "outputs, inputs, kernel, output",
    [
        (16, 16, (3, 3), False),
        (32, 1, (3, 3), False),  # depthwise
        (8, 24, (2, 2), False),  # transposed
        (5, 32, (), True),  # classifier
        (1, 1, (), False),
        (1, 30, (), False),
        (200, 3, (7, 7), False),
        (64, 64, (3,), False),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_spread_is_one_times_the_gain(outputs, inputs, kernel, output, steps):
    """Root mean square of every target: exactly 1 without gain, within [1 / bound, bound] and as given with it."""
    target, nodes = group(outputs, inputs, kernel, output=output), vectors().float()
    net = decoder(steps=steps, double=False)
    rms = net(target, nodes).flatten(2).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-4, atol=0)
    net = decoder(steps=steps, gain_bound=1.5, double=False)
    with torch.no_grad():
        net.gain.weight.normal_(0, 3, generator=rng(5))
    rms = net(target, nodes).flatten(2).square().mean(-1).sqrt()[:, 0]
    gain = 1.5 ** torch.tanh(net.gain(nodes[:, 0] + net.block_codes[0]))[:, 0]
    torch.testing.assert_close(rms, gain, rtol=1e-4, atol=0)
    assert gain.std() > 0 and (gain <= 1.5).all() and (gain >= 1 / 1.5).all()


def test_blocks_of_one_node_differ():
    """Query, key and value come from one node and are different matrices."""
    found = decoder(steps=3)(group(16, 16, blocks=(0, 1, 2), nodes=(1, 1, 1)), vectors())
    flat = torch.nn.functional.normalize(found.detach().flatten(2), dim=-1)
    cosines = flat @ flat.mT
    assert cosines[:, [0, 0, 1], [1, 2, 2]].abs().max() < 0.98, "nodes and blocks share most of a core at the start"


def test_groups_together_are_groups_one_by_one():
    """Sizes that groups share and do not share, in any order, and the largest singular values of the whole matrices."""
    net, nodes = decoder(steps=3), vectors()
    groups = [
        group(20, 12, (3, 3), blocks=(0, 1), nodes=(0, 2)), group(5, 30, output=True), group(20, 2, (5, 5)),
        group(3, 12, blocks=(2, 0, 1), nodes=(1, 1, 0)),
    ]  # fmt: skip
    with torch.no_grad():
        parts = list(net.parts(groups, nodes, largest=True))
        for each, part in zip(groups, parts, strict=True):
            made = part.matrices(part.norm)
            torch.testing.assert_close(made, net(each, nodes).flatten(-1 - len(each.kernel)))
            torch.testing.assert_close(part.largest * part.norm, largest_singular_value(made))


def test_wider_is_a_finer_sampling():
    """A layer three times as wide holds the narrow one in every third row, up to the common scale."""
    net, nodes = decoder(cells=8), vectors()
    narrow, wide = net(group(9, 4), nodes)[0, 0], net(group(27, 4), nodes)[0, 0, 1::3]
    torch.testing.assert_close(wide / wide.norm(), narrow / narrow.norm(), rtol=1e-6, atol=1e-8)


def test_everything_is_trained():
    """A target of each sort together gives a finite gradient to every parameter, also beyond the rank."""
    net, nodes = decoder(steps=3, gain_bound=2.0), vectors()
    targets = [group(20, 12, (3, 3)), group(5, 30, output=True), group(3, 2, (5, 5), blocks=(3,))]
    sum((net(target, nodes) ** 3).sum() for target in targets).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_against_differences():
    """Through tables, equalisation and gain, in double precision."""
    net = decoder(rank=2, cells=3, steps=2, gain_bound=2.0)
    target, nodes = group(5, 3, (2, 2)), vectors(1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(target, x), (nodes,), atol=1e-5)


def test_start_is_that_of_the_generator():
    """Same bits from the same stream, and the core at the start has the spread it should."""
    one, two = decoder().state_dict(), decoder().state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    wide = CoreDecoder(DecoderSettings(node_width=64, classes=10, spectrum_steps=0), generator=rng(7))
    core = wide.head(torch.nn.functional.gelu(wide.hidden(torch.randn(256, 64, generator=rng(8)))))
    own = (core - wide.head.bias).detach().std()
    assert abs(own / OWN - 1) < 0.1, "hyperfan: the part of a node has the spread OWN"
    assert abs(wide.head.bias.std() / SHARED - 1) < 0.1
    assert torch.equal(wide.gain(torch.randn(3, 64, generator=rng(9))), torch.zeros(3, 1)), "gains are 1"
