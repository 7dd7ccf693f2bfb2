"""Models of slices: the loss against its formula, drawing in chunks against all at once, exact calibration."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from generators.local.config import LocalOptions
from generators.local.fidelity import covariance, match
from generators.local.slice_model import CHUNK, Layer
from generators.local.vae import ConvVAE
from generators.seeds import stream

BOUNDS = (1e-3, 0.25)


def make(shape=(3, 3), latent=64) -> ConvVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvVAE(shape, LocalOptions(latent=latent, channels=4, hidden=8, noise_bounds=BOUNDS))


def smooth(count: int, shape=(3, 3)) -> torch.Tensor:
    """Correlated, skewed slices with a mean."""
    draws = torch.randn(count, *shape, generator=stream(1, "smooth"))
    return draws.cumsum(1).cumsum(2).exp().clamp(max=20.0) / 4 + 0.3


@pytest.mark.parametrize("shape", [(1, 8), (2, 2), (3, 3), (5, 7), (1, 1)])
def test_shapes_and_number_of_latents(shape):
    vae, size = make(shape, latent=20), shape[0] * shape[1]
    assert vae.latent == min(size, 20)
    means, log_variances = vae.encode(torch.zeros(6, size))
    assert means.shape == log_variances.shape == (6, vae.latent)
    assert vae.draw(Layer(5), stream(0, "draw")).shape == (5, *shape)
    assert vae.draw(Layer(0), stream(0, "draw")).shape == (0, *shape)


def test_the_loss_is_its_formula():
    vae = make()
    slices = smooth(64)
    vae.standardise(slices)
    data, draws = vae.standardised(slices), torch.randn(64, vae.latent, generator=stream(0, "draws"))
    loss, parts = vae.loss(data, stream(0, "draws"), beta=0.7)
    means, log_variances = vae.encode(data)
    posterior = Normal(means, (0.5 * log_variances).exp())
    decoded = vae.decoder(means + posterior.stddev * draws)
    noise = (data - decoded).square().mean(0).clamp(*BOUNDS)
    constant = 9 * 0.5 * torch.log(torch.tensor(2 * torch.pi))
    misfit = -Normal(decoded, noise.sqrt()).log_prob(data).sum(1).mean() - constant
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    assert parts["noise"].requires_grad is False and torch.allclose(parts["noise"], noise)
    assert torch.allclose(parts["misfit"], misfit) and torch.allclose(parts["rate"], divergence)
    assert torch.allclose(loss, misfit + 0.7 * divergence)


def test_standardised_slices_have_mean_0_and_covariance_1():
    vae, slices = make(), smooth(5000)
    vae.standardise(slices)
    standardised = vae.standardised(slices)
    assert torch.allclose(standardised.mean(0), torch.zeros(9), atol=1e-4)
    assert torch.allclose(covariance(standardised).float(), torch.eye(9), atol=1e-3)


def test_constant_elements_do_no_harm():
    vae, slices = make(), smooth(1000)
    slices[:, 0, 0] = 0.5
    vae.standardise(slices)
    vae.calibrate(slices, [Layer(1 << 15)], stream(0, "calibrate"))
    drawn = vae.draw(Layer(1000), stream(0, "draw"))
    assert drawn.isfinite().all() and (drawn[:, 0, 0] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_drawing_in_chunks_equals_decoding_all_at_once(count):
    vae = make()
    draws = torch.randn(count + -count % CHUNK, vae.latent + 9, generator=stream(3, "draw"))[:count]
    vae.standardise(smooth(1000))
    whole = vae.decoder(draws[:, : vae.latent]) + vae.noise.sqrt() * draws[:, vae.latent :]
    whole = (vae.shift + whole @ vae.colour.T).reshape(-1, 3, 3)
    assert torch.allclose(vae.draw(Layer(count), stream(3, "draw")), whole, atol=1e-6)


def test_a_draw_has_the_same_bits_every_time_and_no_grad():
    vae = make()
    first, second = vae.draw(Layer(700), stream(0, "a")), vae.draw(Layer(700), stream(0, "a"))
    assert torch.equal(first, second) and not first.requires_grad
    assert not torch.equal(first, vae.draw(Layer(700), stream(0, "b")))


def test_calibration_gives_the_moments_of_the_data_even_to_an_unfitted_network():
    vae, slices = make(), smooth(20_000)
    vae.standardise(slices)
    vae.noise.fill_(0.1)
    before = match(vae.draw(Layer(20_000), stream(0, "draw")), slices)
    vae.calibrate(slices, [Layer(1 << 15)], stream(0, "calibrate"))
    drawn = vae.draw(Layer(20_000), stream(0, "draw"))
    after = match(drawn, slices)
    assert before["covariance_error"] > 0.1, "an unfitted network is off, else this shows nothing"
    assert after["second_moment_ratio"] == pytest.approx(1, abs=0.03) and after["covariance_error"] < 0.03
    assert torch.allclose(drawn.mean(0), slices.mean(0), atol=0.05)
    assert drawn.std().item() == pytest.approx(vae.unit_std.item(), rel=0.02)
