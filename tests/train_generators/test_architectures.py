"""Which architectures a GHN is trained on: draws, mixtures and the hash that holds some out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from collect.architectures import build, parse
from generators.errors import ConfigError, UnknownNameError
from train_generators.architectures import Pool, held_by_hash, resolve
from train_generators.ghn_config import GHNTrainingConfig

POOL = Pool(families=("resnet", "vgg"), depths=(3, 14), widths=(4, 9), count=12)
ZOO = SimpleNamespace(runs=[{"architecture": name} for name in ("mlp-1-w8", "mlp-2-w8", "mlp-1-w8")])


def test_a_pool_draws_what_can_be_built(images):
    """Different names within the bounds, of both families, each of which takes the digits; a seed gives them again."""
    drawn = POOL.draw(images, seed=3)
    assert len(set(drawn)) == 12 and drawn == POOL.draw(images, seed=3) != POOL.draw(images, seed=4)
    for name in drawn:
        build(name, shape=images.shape, classes=10)
        architecture = parse(name)
        assert 3 <= architecture.depth <= 14 and 4 <= architecture.width <= 9
    assert {parse(name).family for name in drawn} == {"resnet", "vgg"}


def test_a_pool_that_has_fewer_gives_all(images):
    """Two depths that a resnet can have, 8 and 14, by three widths."""
    drawn = Pool(families=("resnet",), depths=(3, 19), widths=(4, 6), count=99).draw(images, seed=0)
    assert drawn == tuple(sorted(f"resnet-{depth}-w{width}" for depth in (8, 14) for width in (4, 5, 6)))


def test_hold_out_is_a_share_that_nothing_moves():
    """About the share of many names; whoever is held out at a share is so at every larger one."""
    names = [f"resnet-{depth}-w{width}" for depth in range(8, 80, 6) for width in range(1, 100)]
    shares = {share: {name for name in names if held_by_hash(name, share)} for share in (0.0, 0.1, 0.3)}
    assert not shares[0.0] and shares[0.1] < shares[0.3]
    assert all(abs(len(held) / len(names) - share) < 0.03 for share, held in shares.items())


def test_which_names_are_held_out_never_changes():
    """What one training held out must be held out of the next, also by later versions."""
    families = ("resnet-8", "resnet-20", "vgg-4", "mlp-2")
    names = [f"{family}-w{width}" for family in families for width in (4, 8, 12, 16, 20)]
    assert [name for name in names if held_by_hash(name, 0.1)] == ["vgg-4-w20"]
    half = ["resnet-20-w20", "vgg-4-w20", "mlp-2-w4", "mlp-2-w8", "mlp-2-w12"]
    assert [name for name in names if held_by_hash(name, 0.5)] == half


def test_sources_and_their_mixture(images):
    """Named ones alone, those of the zoo alone, and all three together."""

    def trained(zoo=None, **changes):
        return set(resolve(GHNTrainingConfig(**changes), zoo, images).architectures)

    drawn, named, of_zoo = set(POOL.draw(images, seed=0)), {"vit-1-w16"}, {"mlp-1-w8", "mlp-2-w8"}
    assert trained(ZOO) == of_zoo
    assert trained(ZOO, architectures=("vit-1-w16",)) == named
    assert trained(ZOO, pool=POOL) == drawn
    assert trained(ZOO, pool=POOL, architectures=("vit-1-w16",)) == drawn | named
    assert trained(ZOO, pool=POOL, architectures=("vit-1-w16",), mix_zoo=True) == drawn | named | of_zoo


def test_sides_by_name_go_before_the_hash(images):
    """A hash that holds half out moves no named architecture, and both sides together are all that was found."""
    config = GHNTrainingConfig(pool=POOL, architectures=("vit-1-w16",), held_out=("mlp-1-w8",), hold_out=0.5)
    found = resolve(config, ZOO, images)
    drawn = set(POOL.draw(images, seed=0))
    assert {*found.architectures, *found.held_out} == drawn | {"vit-1-w16", "mlp-1-w8"}
    assert set(found.held_out) - {"mlp-1-w8"} == {name for name in drawn if held_by_hash(name, 0.5)}
    assert 0 < len(set(found.held_out) & drawn) < len(drawn) and not set(found.architectures) & set(found.held_out)
    assert resolve(found, ZOO, images) == found, "a resolved configuration is its own"


@pytest.mark.parametrize("source", ["drawn", "of a zoo", "mixed"])
def test_a_share_needs_something_to_take_it_of(images, source):
    """Named ones are on the side where they are named, so a share of them alone means nothing."""
    named = GHNTrainingConfig(architectures=("vit-1-w16",), hold_out=0.5)
    for zoo in (None, ZOO):
        with pytest.raises(ConfigError, match="hold_out is a share.*--mix-zoo"):
            resolve(named, zoo, images)
    changes = {"drawn": {"pool": POOL}, "of a zoo": {"architectures": ()}, "mixed": {"mix_zoo": True}}[source]
    assert resolve(replace(named, hold_out=0.1, **changes), ZOO, images).architectures


def test_a_mixture_needs_a_zoo(images):
    with pytest.raises(ConfigError, match="mix_zoo .* --zoo"):
        resolve(GHNTrainingConfig(architectures=("vit-1-w16",), mix_zoo=True), None, images)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"no architectures to train on; .*--pool\.families"),
        ({"pool": Pool(families=("resnet",), depths=(9, 13))}, "no resnet has depth 9 to 13"),
        ({"pool": Pool(families=("mlp",), depths=(1, 2), widths=(8, 8)), "hold_out": 1 - 1e-9}, "lower --hold-out"),
        ({"architectures": ("resnet-9-w4",)}, "6n \\+ 2"),
    ],
)
def test_nothing_to_train_on(images, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(GHNTrainingConfig(**changes), None, images)


def test_wrong_pools():
    with pytest.raises(UnknownNameError, match="resnet"):
        Pool(families=("resnt",))
    for wrong in ({"depths": (5, 3)}, {"widths": (0, 3)}, {"count": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Pool(**wrong)
    with pytest.raises(ConfigError, match="hold_out"):
        replace(GHNTrainingConfig(), hold_out=1.0)
