"""What a decoder's outputs say of pixels, against numerical integration, torch's distributions and one-hot logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from pipelines.preprocessing import to_uint8, to_unit_range
from tokenizer import TOKENIZERS, ImageTokenizer, build_tokenizer
from tokenizer.pixels import OUTPUTS_PER_CHANNEL, images_of, negative_log_likelihood

DISTRIBUTIONS = ["logit_laplace", "categorical"]
LOCATION_AND_SCALE = [(0.0, 0.15), (0.4, 0.1), (-0.7, 0.05), (0.3, 0.7), (-2.5, 2.0)]

TINY: dict[str, dict[str, Any]] = {
    "vqgan": {"channels": 4, "channel_multipliers": [1, 1], "num_residual_blocks": 1, "z_channels": 4},
    "vqvae": {"channels": 4, "residual_channels": 4, "num_residual_blocks": 1, "downsampling_factor": 2},
}


def tiny(name: str, decoder_output: str, in_channels: int = 3) -> ImageTokenizer:
    """A tokenizer of 8x12 pixels, the same for every output but for its decoder, in eval mode."""
    torch.manual_seed(0)
    model, block = {"name": name, "latent_dim": 4, **TINY[name]}, {"name": "vq", "vocab_size": 16}
    written = {"image_size": [8, 12], "decoder_output": decoder_output, "in_channels": in_channels}
    return build_tokenizer(model, block, **written).eval()


def images_for(tokenizer: ImageTokenizer) -> Tensor:
    return torch.rand(2, *tokenizer.image_shape) * 2 - 1


def laplace_outputs(location: Tensor, scale: Tensor) -> Tensor:
    """Of a decoder, `(B, 2 C, H, W)`: for each channel its mu, then its log b."""
    return torch.stack([location, scale.log()], 2).flatten(1, 2)


def logit_laplace(location: Tensor, scale: Tensor) -> TransformedDistribution:
    """A pixel in (0, 1) whose logit has a Laplace density."""
    return TransformedDistribution(Laplace(location, scale), [SigmoidTransform()])


def one_hot_logits(pixels: Tensor, certainty: float = 60.0) -> Tensor:
    """Logits `(B, C * 256, H, W)` of pixels `(B, C, H, W)` in [0, 255]."""
    return certainty * F.one_hot(pixels.long(), 256).float().movedim(-1, 2).flatten(1, 2)


@pytest.mark.parametrize(("location", "scale"), LOCATION_AND_SCALE)
def test_the_logit_laplace_density_integrates_to_the_mass_between_the_ends_of_the_moved_pixels(location, scale):
    outputs = torch.tensor([location, scale]).view(1, 2, 1, 1).clone()
    outputs[:, 1].log_()
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float32)
    nats = torch.vmap(lambda pixel: negative_log_likelihood(outputs, pixel.view(1, 1, 1, 1), "logit_laplace"))(grid)
    mass = torch.trapezoid((-nats.double()).exp(), 0.1 + 0.4 * (grid.double() + 1))
    ends = logit_laplace(torch.tensor(location), torch.tensor(scale)).cdf(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(mass, ends.diff().squeeze().double(), rtol=1e-3, atol=1e-4)
    if scale < 0.2:
        assert mass == pytest.approx(1, abs=1e-3)


def test_logit_laplace_is_a_laplace_density_through_a_sigmoid():
    location, scale = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5, 4) + 0.1
    images = torch.rand(2, 3, 5, 4) * 2 - 1
    expected = -logit_laplace(location, scale).log_prob(0.1 + 0.8 * (images + 1) / 2).mean()
    found = negative_log_likelihood(laplace_outputs(location, scale), images, "logit_laplace")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_categorical_is_minus_the_log_softmax_at_the_pixels_value():
    logits, pixels = torch.randn(2, 3, 256, 5, 4), torch.randint(256, (2, 3, 5, 4))
    expected = -logits.log_softmax(2).gather(2, pixels.unsqueeze(2)).mean()
    found = negative_log_likelihood(logits.flatten(1, 2), to_unit_range(pixels), "categorical")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_pixels_at_and_beyond_the_ends_have_the_finite_nats_of_the_ends(kind):
    outputs = torch.randn(1, OUTPUTS_PER_CHANNEL[kind], 2, 2)
    for end in (-1.0, 1.0):
        at, beyond = (negative_log_likelihood(outputs, torch.full((1, 1, 2, 2), end * f), kind) for f in (1, 1.2))
        assert at.isfinite()
        assert torch.equal(at, beyond)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_nats_are_float32_and_those_of_bfloat16_outputs_are_near(kind):
    outputs, images = torch.randn(2, 3 * OUTPUTS_PER_CHANNEL[kind], 4, 4), torch.rand(2, 3, 4, 4) * 2 - 1
    expected = negative_log_likelihood(outputs.bfloat16().float(), images, kind)
    found = negative_log_likelihood(outputs.bfloat16(), images, kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_following_the_gradient_of_the_nats_makes_images_likelier_and_nearer(kind):
    images = torch.rand(1, 3, 4, 4) * 1.6 - 0.8
    outputs = torch.zeros(1, 3 * OUTPUTS_PER_CHANNEL[kind], 4, 4, requires_grad=True)
    before = negative_log_likelihood(outputs, images, kind)
    before.backward()
    after = outputs.detach() - 0.1 * outputs.grad.sign()
    assert negative_log_likelihood(after, images, kind) < before
    errors = [(images_of(o.detach(), kind, differentiable=True) - images).abs().mean() for o in (outputs, after)]
    assert errors[1] < errors[0]


def test_images_of_values_are_the_values_themselves():
    outputs = torch.randn(2, 3, 4, 4)
    assert images_of(outputs, "values") is outputs


def test_images_of_logit_laplace_are_medians():
    location, scale = torch.randn(2, 3, 5, 4), torch.rand(2, 3, 5, 4) + 0.1
    images = images_of(laplace_outputs(location, scale), "logit_laplace")
    below = logit_laplace(location, scale).cdf(0.1 + 0.8 * (images + 1) / 2)
    torch.testing.assert_close(below, torch.full_like(below, 0.5), rtol=0, atol=1e-4)


def test_images_of_logit_laplace_reach_both_ends_of_the_range():
    ends = torch.tensor([0.1, 0.9]).logit().view(1, 1, 1, 2)
    images = images_of(laplace_outputs(ends, torch.ones(1, 1, 1, 2)), "logit_laplace")
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)


def test_images_of_categorical_are_the_likeliest_values_or_differentiable_means():
    logits = 3 * torch.randn(2, 3, 256, 5, 4)
    values = to_unit_range(torch.arange(256))
    outputs = logits.flatten(1, 2).requires_grad_()
    likeliest = images_of(outputs, "categorical")
    torch.testing.assert_close(likeliest, values[logits.argmax(2)], rtol=0, atol=1e-6)
    assert not likeliest.requires_grad
    means = images_of(outputs, "categorical", differentiable=True)
    torch.testing.assert_close(means, (logits.softmax(2) * values.view(256, 1, 1)).sum(2), rtol=1e-5, atol=1e-5)
    means.sum().backward()
    assert (outputs.grad.unflatten(1, (3, 256)).abs().sum(2) > 0).all()


@pytest.mark.parametrize("differentiable", [False, True])
def test_an_image_of_all_256_values_comes_back_exactly_from_one_hot_logits(differentiable):
    pixels = torch.stack([torch.randperm(256).view(16, 16) for _ in range(3)])[None].to(torch.uint8)
    logits = one_hot_logits(pixels)
    assert torch.equal(to_uint8(images_of(logits, "categorical", differentiable=differentiable)), pixels)
    assert negative_log_likelihood(logits, to_unit_range(pixels), "categorical") < 1e-6
    wrong = to_unit_range(pixels.int() ^ 1)
    torch.testing.assert_close(
        negative_log_likelihood(logits, wrong, "categorical"), torch.tensor(60.0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("kind", OUTPUTS_PER_CHANNEL)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizers_decoder_has_the_outputs_of_its_kind_and_decode_gives_images(name, kind, in_channels):
    tokenizer = tiny(name, kind, in_channels)
    images = images_for(tokenizer)
    output = tokenizer(images)
    assert output.outputs.shape == (2, in_channels * OUTPUTS_PER_CHANNEL[kind], 8, 12)
    assert output.reconstruction.shape == images.shape
    with torch.no_grad():
        tokenizer.last_layer.mul_(300)
    decoded = tokenizer.decode(output.codes)
    assert decoded.shape == images.shape
    assert len(decoded.unique()) > 2
    assert decoded.abs().max() <= 1
    assert (tokenizer(images).reconstruction.abs().max() > 1) == (kind != "categorical")
    torch.testing.assert_close(decoded, tokenizer(images).reconstruction.clamp(-1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OUTPUTS_PER_CHANNEL)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_in_training_reconstructs_with_a_gradient_and_in_evaluation_as_it_decodes(name, kind):
    tokenizer = tiny(name, kind)
    images = images_for(tokenizer)
    for training in (False, True):
        output = tokenizer.train(training)(images)
        assert torch.equal(output.reconstruction, images_of(output.outputs, kind, differentiable=training))
    output.reconstruction.square().sum().backward()
    assert tokenizer.last_layer.grad.abs().sum() > 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fingerprint_does_not_depend_on_what_the_decoder_gives(name):
    tokenizers = [tiny(name, kind) for kind in OUTPUTS_PER_CHANNEL]
    assert len({tokenizer.config.decoder_output for tokenizer in tokenizers}) == len(OUTPUTS_PER_CHANNEL)
    assert len({tokenizer.compute_fingerprint() for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_saved_tokenizer_keeps_what_its_decoder_gives(name, tmp_path):
    tokenizer = tiny(name, "logit_laplace")
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path).eval()
    assert loaded.config.decoder_output == "logit_laplace"
    codes = tokenizer.encode(images_for(tokenizer))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_unknown_decoder_output_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown decoder_output 'value'; did you mean 'values'") as error:
        tiny(name, "value")
    assert all(kind in str(error.value) for kind in OUTPUTS_PER_CHANNEL)
