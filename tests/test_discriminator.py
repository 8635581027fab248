"""Discriminators against a transcript and by their gradients, their sizes and options, and how they are left alone."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantizer_cases import assert_same_state, state_of
from torch import Tensor, nn

from tokenizer.discriminator import build_discriminator, generator_loss, left_alone
from tokenizer.norms import BatchNorm

VARIANTS: dict[str, dict[str, Any]] = {
    "patchgan": {"name": "patchgan", "channels": 4},
    "patchgan-group": {"name": "patchgan", "channels": 4, "norm": "group"},
    "patchgan-batch": {"name": "patchgan", "channels": 4, "norm": "batch"},
    "patchgan-spectral": {"name": "patchgan", "channels": 4, "spectral_norm": True},
    "patchgan-batch-spectral": {"name": "patchgan", "channels": 4, "norm": "batch", "spectral_norm": True},
    "stylegan": {"name": "stylegan", "channels": 4, "max_channels": 8},
    "stylegan-spectral": {"name": "stylegan", "channels": 4, "max_channels": 8, "spectral_norm": True},
}
SPECTRAL = [name for name, options in VARIANTS.items() if options.get("spectral_norm")]

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str, in_channels: int = 3, image_size: tuple[int, int] = (32, 32), **options: Any) -> nn.Module:
    return build_discriminator({**VARIANTS[variant], **options}, in_channels, image_size)


def published_patchgan(input_nc: int, ndf: int, n_layers: int) -> nn.Sequential:
    """NLayerDiscriminator of junyanz/pytorch-CycleGAN-and-pix2pix with norm_layer=BatchNorm2d."""
    kw, padw = 4, 1
    sequence = [nn.Conv2d(input_nc, ndf, kernel_size=kw, stride=2, padding=padw), nn.LeakyReLU(0.2, True)]
    nf_mult = 1
    for n in range(1, n_layers):
        nf_mult_prev, nf_mult = nf_mult, min(2**n, 8)
        convolution = nn.Conv2d(ndf * nf_mult_prev, ndf * nf_mult, kw, stride=2, padding=padw, bias=False)
        sequence += [convolution, nn.BatchNorm2d(ndf * nf_mult), nn.LeakyReLU(0.2, True)]
    nf_mult_prev, nf_mult = nf_mult, min(2**n_layers, 8)
    convolution = nn.Conv2d(ndf * nf_mult_prev, ndf * nf_mult, kw, stride=1, padding=padw, bias=False)
    sequence += [convolution, nn.BatchNorm2d(ndf * nf_mult), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*sequence, nn.Conv2d(ndf * nf_mult, 1, kernel_size=kw, stride=1, padding=padw))


@pytest.mark.parametrize(("num_layers", "in_channels"), [(1, 3), (3, 1), (3, 3), (5, 3)])
def test_patchgan_with_batch_norm_is_that_of_pix2pix(num_layers, in_channels):
    published = published_patchgan(in_channels, 4, num_layers)
    ours = tiny("patchgan-batch", in_channels, (96, 104), num_layers=num_layers)
    ours.load_state_dict(published.state_dict())
    images = torch.randn(2, in_channels, 96, 104)
    torch.testing.assert_close(ours(images), published(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(published.named_buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "layer"), [("none", []), ("group", [nn.GroupNorm]), ("batch", [BatchNorm])])
def test_patchgan_has_its_norm_after_all_but_the_first_and_last_convolution(norm, layer):
    kinds = [type(each) for each in tiny("patchgan", num_layers=2, norm=norm)]
    normed = [nn.Conv2d, *layer, nn.LeakyReLU]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *normed, *normed, nn.Conv2d]


def plain_stylegan(weights: dict[str, Tensor], image: Tensor, num_blocks: int) -> Tensor:
    """The logit of one image: blocks of StyleGAN2's resnet discriminator with [1, 2, 1] blurs, then linear layers."""

    def convolved(name: str, x: Tensor) -> Tensor:
        weight = weights[f"layers.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"layers.{name}.bias"), padding=weight.shape[-1] // 2)

    def activated(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    def halved(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = (x[:, :, :height] + 2 * x[:, :, 1 : height + 1] + x[:, :, 2:]) / 4
        x = (x[..., :width] + 2 * x[..., 1 : width + 1] + x[..., 2:]) / 4
        return x[:, :, ::2, ::2]

    x = activated(convolved("0", image))
    for i in range(2, 2 + num_blocks):
        hidden = activated(convolved(f"{i}.conv2", activated(convolved(f"{i}.conv1", x))))
        x = (halved(hidden) + convolved(f"{i}.shortcut", halved(x))) / 2**0.5
    x = activated(convolved(str(2 + num_blocks), x)).flatten(1)
    first, last = (f"layers.{i + num_blocks}" for i in (5, 7))
    x = activated(F.linear(x, weights[f"{first}.weight"], weights[f"{first}.bias"]))
    return F.linear(x, weights[f"{last}.weight"], weights[f"{last}.bias"])


@pytest.mark.parametrize(("image_size", "num_blocks"), [((8, 9), 1), ((17, 24), 2), ((32, 32), 3)], ids=str)
@torch.no_grad()
def test_stylegan_gives_the_logits_of_plain_residual_blocks_one_image_at_a_time(image_size, num_blocks):
    discriminator = tiny("stylegan", 3, image_size)
    images = torch.randn(2, 3, *image_size)
    expected = torch.cat([plain_stylegan(discriminator.state_dict(), image[None], num_blocks) for image in images])
    torch.testing.assert_close(discriminator(images), expected, rtol=1e-4, atol=1e-5)


def test_the_weights_of_patchgan_start_with_a_deviation_of_two_hundredths():
    weights = [p.flatten() for p in tiny("patchgan", channels=32).parameters() if p.ndim > 1]
    for weight in weights:
        assert weight.mean().abs() < 5e-3
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_patchgan_halves_a_side_for_each_layer_and_then_takes_two_off(num_layers, norm):
    for height, width in ((32, 48), (24, 24), (25, 39)):
        discriminator = tiny("patchgan", 3, (height, width), num_layers=num_layers, norm=norm)
        logits = discriminator(torch.zeros(2, 3, height, width))
        assert logits.shape == (2, 1, (height >> num_layers) - 2, (width >> num_layers) - 2)


@pytest.mark.parametrize("variant", ["stylegan", "stylegan-spectral"])
@pytest.mark.parametrize("image_size", [(8, 8), (9, 8), (8, 40), (33, 17), (31, 45), (64, 32)], ids=str)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_stylegan_gives_one_logit_an_image_for_rectangles_and_odd_sizes(in_channels, image_size, variant):
    discriminator = tiny(variant, in_channels, image_size)
    images = torch.randn(2, in_channels, *image_size, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (2, 1)
    logits.sum().backward()
    assert (images.grad != 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())


def test_the_channels_of_stylegan_double_up_to_the_most():
    discriminator = tiny("stylegan", 3, (64, 64), channels=4, max_channels=12)
    widths = [m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert widths == [8, 12, 12, 12]


@pytest.mark.parametrize(("num_layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_of_patchgan_sees_a_square_of_the_published_size(num_layers, pixels):
    size = 128
    images = torch.zeros(1, 1, size, size, requires_grad=True)
    logits = tiny("patchgan", 1, (size, size), num_layers=num_layers)(images)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = images.grad[0, 0].double() != 0
    for axis in (0, 1):
        (positions,) = seen.any(axis).nonzero(as_tuple=True)
        assert len(positions) == positions[-1] - positions[0] + 1 == pixels
        assert 0 < positions[0] < positions[-1] < size - 1


@every_variant
def test_only_with_batch_norm_do_images_of_a_batch_see_each_other(variant):
    discriminator = tiny(variant)
    for _ in range(30):
        discriminator(torch.randn(2, 3, 32, 32))  # the spectral norm's vectors settle
    discriminator.double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with left_alone(discriminator), torch.no_grad():
        together = discriminator(images)
        alone = torch.cat([discriminator(image[None]) for image in images])
    differences = (together - alone).abs() / together.std(0)
    if "batch" in variant:
        assert differences.max() > 1e-2
    else:
        assert differences.max() < 1e-6


@pytest.mark.parametrize("variant", SPECTRAL)
def test_the_spectral_norm_makes_the_largest_singular_value_of_every_layer_one(variant):
    discriminator = tiny(variant)
    for _ in range(150):
        discriminator(torch.randn(1, 3, 32, 32))
    layers = [module for module in discriminator.eval().modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) >= 5
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("size", "num_layers"), [((23, 64), 3), ((64, 23), 3), ((5, 5), 1), ((95, 200), 5)])
def test_images_too_small_for_patchgan_are_refused_with_the_least_size(size, num_layers):
    least = 3 * 2**num_layers
    expected = (
        rf"images of {size[0]}x{size[1]} pixels are too small for num_layers={num_layers} of patchgan: "
        rf"sides should be at least {least}$"
    )
    with pytest.raises(ValueError, match=expected):
        tiny("patchgan", 3, size, num_layers=num_layers)
    smallest = tiny("patchgan", 3, (least, least), num_layers=num_layers)
    assert smallest(torch.zeros(1, 3, least, least)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(7, 8), (64, 4)], ids=str)
def test_images_too_small_for_stylegan_are_refused_with_the_least_size(size):
    with pytest.raises(ValueError, match=rf"images of {size[0]}x{size[1]} pixels .* stylegan: .* at least 8$"):
        tiny("stylegan", 3, size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "patchgun"}, "unknown objective.discriminator 'patchgun'; did you mean 'patchgan'"),
        ({"name": "stylegan", "norm": "batch"}, "unknown option of stylegan 'objective.discriminator.norm'; "),
        ({"name": "patchgan", "layers": 2}, "unknown option of patchgan 'objective.discriminator.layers'; "),
        ({"name": "patchgan", "norm": "layer"}, "norm should be none | group | batch, got 'layer'"),
        ({"name": "patchgan", "num_layers": 9}, "num_layers should be integer from 1 to 8, got 9"),
        ({"name": "patchgan", "channels": 0}, "channels should be integer at least 1, got 0"),
        ({"name": "stylegan", "max_channels": "many"}, "max_channels should be integer, got 'many'"),
    ],
    ids=str,
)
def test_unknown_names_and_options_and_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_discriminator(options, 3, (32, 32))


# Leaving the discriminator alone


@every_variant
def test_left_alone_only_the_images_get_a_gradient_and_no_state_moves(variant):
    discriminator = tiny(variant)
    discriminator(torch.randn(4, 3, 32, 32))
    before = state_of(discriminator)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    with left_alone(discriminator):
        loss = generator_loss("hinge", discriminator(images))
    loss.backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert_same_state(discriminator, before)


@pytest.mark.parametrize("failing", [False, True])
@every_variant
def test_after_it_was_left_alone_everything_is_as_before(variant, failing):
    discriminator = tiny(variant)
    frozen = next(discriminator.parameters()).requires_grad_(False)
    other = copy.deepcopy(discriminator)
    images = torch.randn(4, 3, 32, 32)
    try:
        with left_alone(discriminator):
            discriminator(images)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    for module in (discriminator, other):
        module(images).square().mean().backward()
        assert all(part.training for part in module.modules())
    assert not frozen.requires_grad
    assert_same_state(discriminator, state_of(other))
    for parameter, expected in zip(discriminator.parameters(), other.parameters(), strict=True):
        assert parameter.requires_grad == expected.requires_grad
        assert (parameter.grad is None) == (expected.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad)


@every_variant
def test_left_alone_gives_the_logits_of_training_without_another_power_iteration(variant):
    discriminator = tiny(variant)
    discriminator(torch.randn(4, 3, 32, 32))
    images = 3 + 2 * torch.randn(4, 3, 32, 32)
    other = copy.deepcopy(discriminator).eval()
    for module in other.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    with left_alone(discriminator):
        logits = discriminator(images)
    assert torch.equal(logits, other(images))
    if "batch" in variant:
        assert not torch.allclose(logits, other.eval()(images), rtol=0.1, atol=0.1)


def test_what_is_left_alone_in_evaluation_stays_in_evaluation():
    discriminator = tiny("patchgan-batch-spectral").eval()
    images = torch.randn(4, 3, 32, 32)
    expected = discriminator(images)
    with left_alone(discriminator):
        assert torch.equal(discriminator(images), expected)
    assert not any(module.training for module in discriminator.modules())
