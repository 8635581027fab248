"""The adversarial losses by hand, LeCAM against a transcript and R1 against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from quantizer_cases import assert_same_state, state_of
from torch import Tensor, nn

from tokenizer.discriminator import LeCAM, build_discriminator, discriminator_loss, generator_loss, r1_penalty

KINDS = ["hinge", "vanilla", "non_saturating"]
REAL, FAKE = [2.0, 0.5, -1.0], [-3.0, 0.25, 1.0]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_hinge_losses_by_hand():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    expected = ((0 + 0.5 + 2) / 3 + (0 + 1.25 + 2) / 3) / 2
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(expected, rel=1e-6)
    assert generator_loss("hinge", fake).item() == pytest.approx(-(-3 + 0.25 + 1) / 3, rel=1e-6)


@pytest.mark.parametrize("kind", ["vanilla", "non_saturating"])
def test_the_cross_entropy_losses_by_hand(kind):
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    logs = mean_of([math.log(sigmoid(r)) for r in REAL]) + mean_of([math.log(1 - sigmoid(f)) for f in FAKE])
    assert discriminator_loss(kind, real, fake).item() == pytest.approx(-logs / 2, rel=1e-6)
    term = {"vanilla": lambda f: math.log(1 - sigmoid(f)), "non_saturating": lambda f: -math.log(sigmoid(f))}[kind]
    assert generator_loss(kind, fake).item() == pytest.approx(mean_of([term(f) for f in FAKE]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminator_raises_real_logits_and_lowers_others_and_the_generator_raises_them(kind):
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake.grad = None
    generator_loss(kind, fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_from_zero_have_finite_losses_and_gradients(kind):
    real, fake = torch.tensor([-300.0, 300.0]), torch.tensor([-300.0, 300.0], requires_grad=True)
    loss = discriminator_loss(kind, real, fake) + generator_loss(kind, fake)
    loss.backward()
    assert loss.isfinite()
    assert fake.grad.isfinite().all()


def test_lecam_is_that_of_the_published_code():
    decay, lecam = 0.7, LeCAM(0.7)
    mean_real = mean_fake = None
    for step in range(5):
        real, fake = torch.randn(6, 1, 2, 2) + 0.1 * step, torch.randn(6, 1, 2, 2) - 0.1 * step
        mean_real = real.mean() if mean_real is None else decay * mean_real + (1 - decay) * real.mean()
        mean_fake = fake.mean() if mean_fake is None else decay * mean_fake + (1 - decay) * fake.mean()
        expected = torch.mean(torch.relu(real - mean_fake).pow(2)) + torch.mean(torch.relu(mean_real - fake).pow(2))
        torch.testing.assert_close(lecam(real, fake), expected, rtol=1e-5, atol=1e-6)


def test_lecam_pulls_logits_together_and_its_means_have_no_gradient():
    real, fake = torch.full((4,), 2.0, requires_grad=True), torch.full((4,), -1.0, requires_grad=True)
    lecam = LeCAM(0.9)
    loss = lecam(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 3**2)
    for logits, sign in ((real, 1), (fake, -1)):
        torch.testing.assert_close(logits.grad, torch.full((4,), sign * 2 * 3 / 4), rtol=1e-6, atol=0)
    assert not lecam.means.requires_grad
    lecam(real.detach(), fake.detach())


def test_lecam_goes_on_from_its_state_dict_as_if_it_had_not_stopped():
    going, resumed = LeCAM(0.9), LeCAM(0.9)
    logits = torch.randn(4, 2, 8)
    for real, fake in logits[:2]:
        going(real, fake)
    resumed.load_state_dict(going.state_dict())
    for real, fake in logits[2:]:
        assert torch.equal(resumed(real, fake), going(real, fake))
    assert_same_state(resumed, state_of(going))


def test_r1_of_a_linear_discriminator_is_half_its_squared_weights_and_has_their_gradient():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    images = torch.randn(5, 3, 4, 4)
    penalty = r1_penalty(linear, images)
    weight = linear[1].weight
    torch.testing.assert_close(penalty, weight.square().sum() / 2, rtol=1e-5, atol=0)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach(), rtol=1e-5, atol=1e-7)
    assert images.grad is None
    assert not images.requires_grad


def test_r1_is_a_mean_over_images_of_the_gradient_of_the_sum_of_logits():
    class Squares(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.square()

    images = torch.randn(5, 3, 4, 4)
    expected = (2 * images).square().sum((1, 2, 3)).mean() / 2
    torch.testing.assert_close(r1_penalty(Squares(), images), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", ["patchgan", "stylegan"])
def test_r1_of_every_discriminator_has_a_gradient(name, spectral_norm):
    discriminator = build_discriminator({"name": name, "channels": 4, "spectral_norm": spectral_norm}, 3, (32, 32))
    r1_penalty(discriminator, torch.randn(4, 3, 32, 32)).backward()
    weights = [parameter for parameter in discriminator.parameters() if parameter.ndim > 1]
    assert all(weight.grad.isfinite().all() and weight.grad.abs().max() > 0 for weight in weights)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"spectral_norm": True}], ids=["batch norm", "spectral norm"])
def test_r1_moves_no_running_statistic(options):
    discriminator = build_discriminator({"name": "patchgan", "channels": 4, "num_layers": 2, **options}, 3, (16, 16))
    before = state_of(discriminator)
    r1_penalty(discriminator, torch.randn(4, 3, 16, 16)).backward()
    assert_same_state(discriminator, before)
    discriminator(torch.randn(4, 3, 16, 16))
    assert any(not torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
