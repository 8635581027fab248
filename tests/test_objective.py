"""The terms of a tokenizer's objective by name, value and gradient, when they start, and options that are refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from objective_cases import (
    ADVERSARIAL,
    MODELS,
    PLAIN,
    FourthPowers,
    MeanPixel,
    assert_mean_of_halves,
    gradients_of,
    images_for,
    losses_of,
    make,
)
from torch import nn

from configs.objective import ObjectiveConfig
from tokenizer.pixels import negative_log_likelihood

RECONSTRUCTIONS = ["l1", "l2", "logit_laplace", "categorical"]
KINDS = ["hinge", "vanilla", "non_saturating"]


@pytest.fixture(autouse=True)
def _perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.objective.LPIPS", FourthPowers)


# The tokenizer's terms


def test_each_term_is_there_by_name_exactly_when_its_weight_asks_for_it():
    terms = {"perceptual": {"perceptual_weight": 0.1}, "adversarial": PLAIN}
    for wanted in ([], ["perceptual"], ["adversarial"], ["perceptual", "adversarial"]):
        options = {key: value for term in wanted for key, value in terms[term].items()}
        objective, tokenizer = make(**options)
        assert list(losses_of(objective, images_for(tokenizer))) == ["reconstruction", *wanted]
        assert (objective.perceptual is None) == ("perceptual" not in wanted)
        assert (objective.adversary is None) == ("adversarial" not in wanted)


def test_the_perceptual_file_is_the_one_that_is_read():
    objective, _ = make(perceptual_weight=1.0, perceptual_file="vgg16.pth")
    assert objective.perceptual.file == "vgg16.pth"


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_the_reconstruction_term_by_hand(kind):
    objective, tokenizer = make(reconstruction=kind, reconstruction_weight=0.3)
    images = images_for(tokenizer)
    output = tokenizer(images)
    losses, metrics = objective.tokenizer_losses(images, output, 0)
    difference = output.reconstruction - images
    if kind == "logit_laplace":
        location, log_scale = output.outputs[:, 0::2], output.outputs[:, 1::2]
        x = 0.1 + 0.4 * (images + 1)
        density = (-(x.logit() - location).abs() / log_scale.exp()).exp() / (2 * log_scale.exp() * x * (1 - x))
        expected = -density.log().mean()
    elif kind == "categorical":
        logits = output.outputs.view(4, 3, 256, 16, 16)
        values = ((images + 1) * 127.5).round().long().unsqueeze(2)
        expected = -logits.log_softmax(2).gather(2, values).mean()
    else:
        expected = difference.abs().mean() if kind == "l1" else difference.pow(2).mean()
    torch.testing.assert_close(losses["reconstruction"], 0.3 * expected, rtol=1e-5, atol=1e-6)
    assert metrics == {}


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_following_its_gradient_makes_the_reconstruction_term_smaller(kind):
    objective, tokenizer = make(reconstruction=kind)
    images = images_for(tokenizer)
    before = losses_of(objective, images)["reconstruction"]
    gradients = gradients_of(before, tokenizer.decoder)
    length = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    with torch.no_grad():
        for name, parameter in tokenizer.decoder.named_parameters():
            parameter -= 1e-2 * gradients[name] / length
    assert losses_of(objective, images)["reconstruction"] < before


def test_the_perceptual_term_by_hand():
    objective, tokenizer = make(perceptual_weight=0.7)
    images = images_for(tokenizer)
    output = tokenizer(images)
    expected = 0.7 * (images - output.reconstruction).pow(4).mean()
    torch.testing.assert_close(objective.tokenizer_losses(images, output, 0)[0]["perceptual"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adversarial_term_by_hand(kind):
    discriminator = MeanPixel(3.0)
    objective, tokenizer = make(stand_in=discriminator, adversarial=kind, **PLAIN | {"adversarial_weight": 0.7})
    images = images_for(tokenizer)
    output = tokenizer(images)
    found = objective.tokenizer_losses(images, output, 0)[0]["adversarial"]
    logits = 3 * output.reconstruction.mean((1, 2, 3))
    expected = {"hinge": -logits, "vanilla": (1 - logits.sigmoid()).log(), "non_saturating": -logits.sigmoid().log()}
    torch.testing.assert_close(found, 0.7 * expected[kind].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(discriminator.batches, [output.reconstruction.detach()])


def test_the_adversarial_term_makes_reconstructions_look_more_real():
    objective, tokenizer = make(**PLAIN)
    images = images_for(tokenizer)
    output = tokenizer(images)
    loss = objective.tokenizer_losses(images, output, 0)[0]["adversarial"]
    (gradient,) = torch.autograd.grad(loss, output.reconstruction)
    moved = output.reconstruction.detach() - 0.05 * gradient.sign()
    assert objective.adversary(moved).mean() > objective.adversary(output.reconstruction).mean()


# The adaptive weight


@pytest.mark.parametrize("perceptual_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(name, perceptual_weight):
    options = ADVERSARIAL | {"adversarial_weight": 0.7, "perceptual_weight": perceptual_weight}
    objective, tokenizer = make(name, stand_in=MeanPixel(0.01), **options)
    images = images_for(tokenizer)
    output = tokenizer(images)
    others = (output.reconstruction - images).pow(2).mean()
    others = others + perceptual_weight * (output.reconstruction - images).pow(4).mean()
    adversarial = -0.01 * output.reconstruction.mean()
    last = [module for module in tokenizer.decoder.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))][-1]
    lengths = [torch.autograd.grad(t, last.weight, retain_graph=True)[0].norm() for t in (others, adversarial)]
    losses, metrics = objective.tokenizer_losses(images, output, 0)
    expected = lengths[0] / (lengths[1] + 1e-4)
    torch.testing.assert_close(metrics["adaptive_weight"], expected, rtol=1e-4, atol=0)
    assert not metrics["adaptive_weight"].requires_grad
    torch.testing.assert_close(losses["adversarial"], 0.7 * expected * adversarial, rtol=1e-4, atol=0)


def test_the_adaptive_weight_has_a_most_and_is_off_when_asked():
    options = ADVERSARIAL | {"adversarial_weight": 0.7}
    for extra, factor in (({"adaptive_weight_max": 0.25}, 0.25), ({"adaptive_weight": False}, 1.0)):
        objective, tokenizer = make(stand_in=MeanPixel(1e-3), **options, **extra)
        images = images_for(tokenizer)
        output = tokenizer(images)
        losses, metrics = objective.tokenizer_losses(images, output, 0)
        torch.testing.assert_close(losses["adversarial"], -0.7 * factor * 1e-3 * output.reconstruction.mean())
        assert metrics == ({"adaptive_weight": torch.tensor(0.25)} if factor < 1 else {})


# When


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.25, 10), (0.9, 36), (1.0, 1), (7, 7), (39, 39)])
def test_the_discriminator_starts_at_a_step_or_after_a_share_of_the_training(start, first):
    objective, tokenizer = make(total_steps=40, **PLAIN | {"adversarial_start": start})
    images = images_for(tokenizer, 1)
    for step in range(41):
        assert objective.is_adversarial(step) == (step >= first)
    for step in (max(0, first - 1), first):
        assert ("adversarial" in losses_of(objective, images, step)) == (step >= first)


def test_without_an_adversarial_weight_no_step_is_adversarial():
    objective, _ = make(adversarial_start=0.0)
    assert not any(objective.is_adversarial(step) for step in range(100))


# Gradients


@pytest.mark.parametrize("adaptive_weight", [False, True])
@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_the_gradient_of_every_term_is_that_of_its_value(kind, adaptive_weight):
    options = ADVERSARIAL | {"adversarial_weight": 0.7, "adaptive_weight": adaptive_weight, "perceptual_weight": 0.5}
    objective, tokenizer = make(reconstruction=kind, adversarial="non_saturating", **options)
    images = images_for(tokenizer)
    output = tokenizer(images)
    losses, metrics = objective.tokenizer_losses(images, output, 0)
    if kind in ("l1", "l2"):
        reconstruction = (output.reconstruction - images).abs().pow(int(kind[1])).mean()
    else:
        reconstruction = negative_log_likelihood(output.outputs, images, kind)
    expected = {
        "reconstruction": reconstruction,
        "perceptual": 0.5 * (output.reconstruction - images).pow(4).mean(),
        "adversarial": 0.7
        * metrics.get("adaptive_weight", 1)
        * F.softplus(-objective.adversary(output.reconstruction)).mean(),
    }
    assert list(losses) == list(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
        found, wanted = gradients_of(loss, tokenizer), gradients_of(expected[name], tokenizer)
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        assert largest > 1e-6
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("term", ["reconstruction", "perceptual", "adversarial"])
@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_micro_batches(kind, term):
    objective, tokenizer = make(reconstruction=kind, perceptual_weight=1.0, **PLAIN | {"adversarial_weight": 100.0})
    images = images_for(tokenizer, 8)
    found = [gradients_of(losses_of(objective, part)[term], tokenizer) for part in (images, *images.split(4))]
    assert_mean_of_halves(found[0], found[1:])


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lecam_weight": 0.1}, "objective.lecam_weight=0.1 regularizes a discriminator, but there is none; give "),
        ({"r1_weight": 2.0}, "objective.r1_weight=2.0 regularizes a discriminator, but there is none; give "),
        (
            {"perceptual_file": "vgg.pth"},
            "perceptual_file is not read without objective.perceptual_weight=; give that",
        ),
        (
            {"reconstruction_weight": 0.0},
            "asks for a reconstruction: give objective.reconstruction_weight= or perceptual",
        ),
        ({"discriminator": {}}, "objective.discriminator needs a name, got {}; give objective.discriminator.name="),
        ({"discriminator": {"name": 3}}, "objective.discriminator needs a name, got {'name': 3}; give "),
        ({"reconstruction": "l3"}, "reconstruction should be l1 | l2 | logit_laplace | categorical, got 'l3'"),
        ({"adversarial": "wgan"}, "adversarial should be hinge | vanilla | non_saturating, got 'wgan'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight should be number at least 0, got -1.0"),
        ({"adaptive_weight_max": 0.0}, "adaptive_weight_max should be number from 0.001 to 1000000, got 0.0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_or_are_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ObjectiveConfig(**options)


def test_a_discriminator_that_does_not_fit_the_images_is_refused_before_training():
    with pytest.raises(ValueError, match=r"images of 16x16 pixels are too small .* at least 24"):
        make(**ADVERSARIAL | {"discriminator": {"name": "patchgan"}})
