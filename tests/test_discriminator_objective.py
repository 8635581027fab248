"""The terms of a discriminator's objective by name, value and gradient; neither side's steps touch the other."""

from __future__ import annotations

import pytest
import torch
from objective_cases import (
    ADVERSARIAL,
    PLAIN,
    FourthPowers,
    MeanPixel,
    assert_mean_of_halves,
    gradients_of,
    images_for,
    losses_of,
    make,
)
from quantizer_cases import assert_same_state, state_of
from torch import Tensor

from tokenizer import ImageTokenizer
from tokenizer.objective import TokenizerObjective

KINDS = ["hinge", "vanilla", "non_saturating"]


@pytest.fixture(autouse=True)
def _perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.objective.LPIPS", FourthPowers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_term_by_hand_from_one_forward_of_images_and_reconstructions(kind):
    discriminator = MeanPixel(3.0)
    objective, tokenizer = make(stand_in=discriminator, adversarial=kind, **PLAIN | {"adversarial_weight": 0.7})
    images = images_for(tokenizer)
    reconstruction = tokenizer(images).reconstruction
    losses, metrics = objective.discriminator_losses(objective.adversary, images, reconstruction, 0)
    torch.testing.assert_close(discriminator.batches, [torch.cat([images, reconstruction.detach()])])
    real, fake = 3 * images.mean((1, 2, 3)), 3 * reconstruction.mean((1, 2, 3))
    if kind == "hinge":
        expected = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    else:
        expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean()) / 2
    assert list(losses) == ["discriminator"]
    torch.testing.assert_close(losses["discriminator"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, {"logits_real": real.mean(), "logits_fake": fake.mean().detach()})
    assert not any(value.requires_grad for value in metrics.values())


def test_half_precision_changes_the_adaptive_weight_by_little():
    objective, tokenizer = make(**ADVERSARIAL)
    images = images_for(tokenizer)
    weights = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = tokenizer(images)
            assert output.outputs.dtype == (torch.bfloat16 if enabled else torch.float32)
            weights.append(objective.tokenizer_losses(images, output, 0)[1]["adaptive_weight"])
    torch.testing.assert_close(weights[1], weights[0], rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adversarial_start": 1.7},
            "adversarial_start=1.7 should be a number of steps, or a share below 1",
        ),
        ({"adversarial_start": 100}, "adversarial_start=100.0 leaves none of 100 steps"),
        (
            {"adversarial_weight": 0.0, "discriminator": {"name": "patchgun"}},
            "unknown objective.discriminator",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_training_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**ADVERSARIAL | options)


@pytest.mark.parametrize("kind", KINDS)
def test_following_its_gradient_the_discriminator_tells_images_from_reconstructions(kind):
    objective, tokenizer = make(adversarial=kind, **PLAIN)
    images = images_for(tokenizer)
    reconstruction = tokenizer(images).reconstruction

    def step() -> tuple[Tensor, Tensor]:
        losses, metrics = objective.discriminator_losses(objective.adversary, images, reconstruction, 0)
        return losses["discriminator"], metrics["logits_real"] - metrics["logits_fake"]

    before, gap = step()
    gradients = gradients_of(before, objective.adversary)
    with torch.no_grad():
        for name, parameter in objective.adversary.named_parameters():
            parameter -= 0.1 * gradients[name]
    after, wider = step()
    assert after < before
    assert wider > gap


def test_r1_comes_every_so_many_steps_so_many_times_as_strongly():
    objective, tokenizer = make(stand_in=MeanPixel(3.0), r1_weight=0.2, r1_every=3, **PLAIN)
    images = images_for(tokenizer)
    for step in range(7):
        losses, _ = objective.discriminator_losses(objective.adversary, images, torch.zeros_like(images), step)
        assert ("r1" in losses) == (step in (0, 3, 6))
        if "r1" in losses:
            # Each of 3 x 16 x 16 pixels moves the logit by 3 / (3 x 16 x 16).
            torch.testing.assert_close(losses["r1"], torch.tensor(0.2 * 3 * 3**2 / (3 * 16 * 16) / 2))


def test_r1_is_computed_in_float32_under_autocast():
    objective, tokenizer = make(r1_weight=1.0, **PLAIN)
    images = images_for(tokenizer)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(objective.discriminator_losses(objective.adversary, images, torch.zeros_like(images), 0)[0])
    assert not torch.equal(found[1]["discriminator"], found[0]["discriminator"])
    torch.testing.assert_close(found[1]["r1"], found[0]["r1"], rtol=1e-6, atol=0)


def test_lecam_is_there_weighted_and_its_means_are_in_the_checkpoint():
    options = PLAIN | {"lecam_weight": 0.4, "lecam_decay": 0.9}
    objective, tokenizer = make(stand_in=MeanPixel(3.0), **options)
    means = None
    for step in range(3):
        images, reconstruction = images_for(tokenizer), images_for(tokenizer)
        losses, _ = objective.discriminator_losses(objective.adversary, images, reconstruction, step)
        real, fake = 3 * images.mean((1, 2, 3)), 3 * reconstruction.mean((1, 2, 3))
        batch = torch.stack([real.mean(), fake.mean()])
        means = batch if means is None else 0.9 * means + 0.1 * batch
        expected = (real - means[1]).clamp(min=0).square().mean() + (means[0] - fake).clamp(min=0).square().mean()
        torch.testing.assert_close(losses["lecam"], 0.4 * expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(objective.adversary.state_dict()["lecam.means"], means)
    assert "lecam.means" not in make(**PLAIN)[0].adversary.state_dict()


# Each side leaves the other untouched


def full_objective() -> tuple[TokenizerObjective, ImageTokenizer]:
    """Everything at once, with a discriminator that has statistics and singular vectors of its own."""
    discriminator = {"name": "patchgan", "channels": 4, "num_layers": 1, "norm": "batch", "spectral_norm": True}
    options = {"perceptual_weight": 0.5, "lecam_weight": 0.1, "r1_weight": 0.1, **ADVERSARIAL}
    return make(**options | {"discriminator": discriminator})


def test_the_tokenizers_backward_pass_leaves_the_discriminator_untouched():
    objective, tokenizer = full_objective()
    before = state_of(objective.adversary)
    torch.stack(list(losses_of(objective, images_for(tokenizer)).values())).sum().backward()
    assert all(parameter.grad is None for parameter in objective.adversary.parameters())
    assert all(parameter.requires_grad for parameter in objective.adversary.parameters())
    assert_same_state(objective.adversary, before)
    assert all(parameter.grad is not None for parameter in tokenizer.decoder.parameters())


def test_the_discriminators_backward_pass_leaves_the_tokenizer_untouched():
    objective, tokenizer = full_objective()
    images = images_for(tokenizer)
    output = tokenizer(images)
    before = state_of(tokenizer)
    losses, _ = objective.discriminator_losses(objective.adversary, images, output.reconstruction, 0)
    assert list(losses) == ["discriminator", "lecam", "r1"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in tokenizer.parameters())
    assert images.grad is None
    assert_same_state(tokenizer, before)
    assert all(parameter.grad is not None for parameter in objective.adversary.parameters())


@pytest.mark.parametrize("term", ["discriminator", "r1"])
def test_the_discriminators_gradient_of_a_batch_is_the_mean_of_those_of_its_micro_batches(term):
    objective, tokenizer = make(r1_weight=100.0, **PLAIN)
    images = images_for(tokenizer, 8)
    reconstruction = tokenizer(images).reconstruction
    found = []
    for chosen in (slice(8), slice(4), slice(4, 8)):
        losses, _ = objective.discriminator_losses(objective.adversary, images[chosen], reconstruction[chosen], 0)
        found.append(gradients_of(losses[term], objective.adversary))
    assert_mean_of_halves(found[0], found[1:])
