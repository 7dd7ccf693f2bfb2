"""Shifts on real digits: what they promise about severity, seeds, range and pixels."""

from __future__ import annotations

import pytest
import torch

from generators.errors import UnknownNameError
from train_generators.compare.config import SHIFT_NAMES
from train_generators.compare.shifts import SEVERITIES, SHIFTS, shift, shifted_sets


@pytest.fixture(scope="module")
def pictures(images):
    """The test digits in [0, 1]."""
    raw = images.test.images * images.std[0] + images.mean[0]
    return raw / raw.max()


def test_config_names_every_shift():
    assert set(SHIFT_NAMES) == set(SHIFTS)


@pytest.mark.parametrize("name", SHIFTS)
def test_severity_scales_one_and_the_same_shift(name, pictures):
    """Severity 0 changes nothing; every further one moves the pictures further; values stay in [0, 1]."""
    assert torch.equal(shift(pictures, name, 0, seed=0), pictures)
    moved = [shift(pictures, name, severity, seed=0) for severity in SEVERITIES]
    change = [float((one - pictures).abs().mean()) for one in moved]
    assert change == sorted(change)
    assert len(set(change)) == len(SEVERITIES)
    assert all(one.min() >= 0 and one.max() <= 1 and one.shape == pictures.shape for one in moved)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_depend_on_their_seed_alone(name, pictures):
    before = torch.random.get_rng_state()
    first, again = shift(pictures, name, 3, seed=0), shift(pictures, name, 3, seed=0)
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    if name not in ("blur", "contrast"):  # these draw nothing
        assert not torch.equal(first, shift(pictures, name, 3, seed=1))


def test_translation_by_a_whole_pixel_moves_pixels():
    """On a 20 x 20 picture severity 4 is 3 pixels: against slices, in whatever direction was drawn."""
    picture = torch.rand(40, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    moved = shift(picture, "translation", 4, seed=0)
    inner = picture[:, :, 3:-3, 3:-3]
    candidates = [moved[:, :, 3 + dy : 17 + dy, 3 + dx : 17 + dx] for dy, dx in ((0, 3), (0, -3), (3, 0), (-3, 0))]
    fits = torch.stack([(one - inner).abs().amax(dim=(1, 2, 3)) < 1e-4 for one in candidates])
    assert fits.sum(0).eq(1).all()
    assert fits.any(1).all()


def test_contrast_and_noise_do_what_their_unit_says():
    grey = torch.full((50, 1, 16, 16), 0.5)
    assert float((shift(grey, "noise", 2, seed=0) - grey).std()) == pytest.approx(0.1, rel=0.03)
    picture = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(shift(picture, "contrast", 2, seed=0)[0].std() / picture[0].std()) == pytest.approx(0.5, rel=1e-4)


def test_unknown_shift_names_near_ones(pictures):
    with pytest.raises(UnknownNameError, match="rotation"):
        shift(pictures, "rotatoin", 1, seed=0)


def test_shifted_sets_are_normalised_like_the_training_images(images):
    """The clean set is the test set itself; a shift of a known linear form arrives in normalised units."""
    sets = {(one.shift, one.severity): one for one in shifted_sets(images, ("contrast",), most=50, seed=0)}
    assert list(sets) == [("", 0), *(("contrast", severity) for severity in range(1, 6))]
    assert sets["", 0].images is images.test.images
    part = images.test.images[:50]
    mean = part.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(sets["contrast", 2].images, mean + 0.5 * (part - mean), rtol=1e-4, atol=1e-4)
    assert torch.equal(sets["contrast", 2].labels, images.test.labels[:50])
