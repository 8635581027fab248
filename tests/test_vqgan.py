"""The VQGAN against diffusers' VQModel with the same weights; its levels, sizes and activation checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor, nn
from vqgan_reference import copy_weights, reference_of

from tokenizer import build_tokenizer
from tokenizer.vqgan import VQGAN, Attention, Decoder, Encoder, VQGANConfig

SMALL: dict[str, Any] = {"channels": 32, "channel_multipliers": [1, 2], "num_residual_blocks": 1}
SMALL |= {"z_channels": 12, "latent_dim": 6, "attention_levels": [], "middle_attention": False}
TINY = SMALL | {"channels": 4, "z_channels": 4, "latent_dim": 4, "middle_attention": True}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "attention at the last level and in the middle": {"attention_levels": [-1], "middle_attention": True},
    "attention at the last level only": {"attention_levels": [-1]},
    "attention in the middle only": {"middle_attention": True},
    "no attention": {},
    "attention at a middle level": {"channel_multipliers": [1, 2, 2], "attention_levels": [1]},
    "attention at two levels": {"channel_multipliers": [1, 3, 2], "attention_levels": [0, -1]},
    "widths that fall": {"channel_multipliers": [1, 3, 1], "num_residual_blocks": 2},
    "one level": {"channel_multipliers": [1], "attention_levels": [0]},
    "blocks of three": {"num_residual_blocks": 3, "attention_levels": [1]},
}


def small(image_size: list[int] | int = 16, quantizer: str = "vq", **options: Any) -> VQGAN:
    model = {"name": "vqgan", **TINY, **options}
    block = {"name": quantizer, "vocab_size": 16}
    return build_tokenizer(model, block, image_size=image_size).eval()


def images_for(tokenizer: VQGAN, batch_size: int = 2) -> Tensor:
    return torch.rand(batch_size, *tokenizer.image_shape) * 2 - 1


@torch.no_grad()
def pair(architecture: dict[str, Any], image_size: list[int] | int) -> tuple[VQGAN, VQModel]:
    """Ours and diffusers' with the same weights, none of which are those that norms start with."""
    tokenizer = small(image_size, **SMALL | architecture)
    reference = reference_of(tokenizer.config)
    for norm in (module for module in reference.modules() if isinstance(module, nn.GroupNorm)):
        norm.weight.add_(0.3 * torch.randn_like(norm.weight))
        norm.bias.add_(0.3 * torch.randn_like(norm.bias))
    copy_weights(tokenizer.encoder, tokenizer.decoder, reference)
    return tokenizer, reference


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_latents_and_outputs_are_those_of_diffusers_with_the_same_weights(architecture):
    tokenizer, reference = pair(architecture, [16, 24])
    images = images_for(tokenizer)
    latents = reference.encode(images).latents
    torch.testing.assert_close(tokenizer.encode_latents(images), latents, rtol=1e-5, atol=1e-5)
    latents = torch.randn_like(latents)
    expected = reference.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(tokenizer.decode_latents(latents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_gradients_are_those_of_diffusers_with_the_same_weights(architecture):
    tokenizer, reference = pair(architecture, [16, 24])
    images, towards = images_for(tokenizer), torch.randn(2, 3, 16, 24)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    (tokenizer.decode_latents(tokenizer.encode_latents(ours)) * towards).sum().backward()
    (reference.decode(reference.encode(theirs).latents, force_not_quantize=True).sample * towards).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * theirs.grad.abs().max().item())
    expected = small([16, 24], **SMALL | architecture)
    with torch.no_grad():
        for parameter in (*reference.encoder.parameters(), *reference.decoder.parameters()):
            parameter.copy_(parameter.grad)
        for layer in (reference.quant_conv, reference.post_quant_conv):
            layer.weight.copy_(layer.weight.grad)
            layer.bias.copy_(layer.bias.grad)
    copy_weights(expected.encoder, expected.decoder, reference)
    for part in ("encoder", "decoder"):
        gradients = dict(getattr(expected, part).named_parameters())
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, parameter in getattr(tokenizer, part).named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name].detach(), rtol=1e-4, atol=1e-5 * largest)


@torch.no_grad()
def test_codes_and_reconstruction_are_those_of_diffusers_with_the_same_codebook():
    tokenizer, reference = pair(ARCHITECTURES["attention at the last level and in the middle"], [24, 16])
    codebook = torch.randn(16, SMALL["latent_dim"])
    tokenizer.quantizer.codebook.copy_(codebook)
    reference.quantize.embedding = nn.Embedding.from_pretrained(codebook)
    images = images_for(tokenizer)
    output, latents = tokenizer(images), reference.encode(images).latents
    assert torch.equal(output.codes.flatten(), reference.quantize(latents)[2][2])
    torch.testing.assert_close(output.reconstruction, reference(images).sample, rtol=1e-5, atol=1e-5)


def test_the_default_network_has_the_layers_and_parameters_of_the_published_one():
    config = VQGANConfig(image_size=256)
    with torch.device("meta"):
        encoder, decoder, reference = Encoder(config), Decoder(config), reference_of(config)
    copy_weights(encoder, decoder, reference)
    ours = sum(p.numel() for part in (encoder, decoder) for p in part.parameters())
    theirs = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("quantize."))
    assert config.downsampling_factor == 16
    assert reference.config.block_out_channels == (128, 128, 256, 256, 512)
    assert ours == theirs


def shapes_of(tokenizer: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tokenizer.state_dict().items()}


@pytest.mark.parametrize(
    ("from_the_end", "from_the_start"), [([-1], [2]), ([-3], [0]), ([-2, -1], [2, 1]), ([-1, 2], [2])]
)
def test_attention_levels_counted_from_the_end_mean_the_same_as_from_the_start(from_the_end, from_the_start):
    multipliers = [1, 2, 1]
    one = small(channel_multipliers=multipliers, attention_levels=from_the_end)
    other = small(channel_multipliers=multipliers, attention_levels=from_the_start)
    assert shapes_of(one) == shapes_of(other)
    other.load_state_dict(one.state_dict())
    images = images_for(one)
    assert torch.equal(one(images).reconstruction, other(images).reconstruction)


@pytest.mark.parametrize("level", [3, -4])
def test_a_level_that_there_is_not_is_refused_with_those_that_there_are(level):
    with pytest.raises(
        ValueError, match=rf"attention_levels should be in \[-3, 3\) with 3 channel_multipliers, got {level}$"
    ):
        small(channel_multipliers=[1, 2, 1], attention_levels=[0, level])


@pytest.mark.parametrize("option", [{"channel_multipliers": []}, {"quant_kernel": 2}, {"channels": 0}], ids=str)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} should .*, got (an empty list|2|0)$"):
        small(**option)


def test_the_first_multiplier_leaves_the_channels_of_the_first_convolution():
    tokenizer = small(channel_multipliers=[3, 1])
    assert (tokenizer.encoder[0].out_channels, tokenizer.encoder[1].conv1.out_channels) == (4, 12)
    assert tokenizer.decoder[-1].in_channels == 12


@pytest.mark.parametrize("attention_levels", [[], [0], [-1], [1]], ids=str)
def test_other_image_sizes_have_the_same_tensors(attention_levels):
    options = {"channel_multipliers": [1, 2, 1], "attention_levels": attention_levels}
    expected = shapes_of(small(8, **options))
    for size in (16, 32, [8, 64]):
        assert shapes_of(small(size, **options)) == expected


def test_attention_is_after_every_block_of_its_level_and_of_no_other():
    tokenizer = small(
        channel_multipliers=[1, 2, 3], attention_levels=[1], num_residual_blocks=2, middle_attention=False
    )
    for part, num_blocks in ((tokenizer.encoder, 2), (tokenizer.decoder, 3)):
        widths = [layer.out.out_channels for layer in part if isinstance(layer, Attention)]
        assert widths == [8] * num_blocks


@pytest.mark.parametrize("quant_kernel", [1, 3])
def test_the_quant_convolutions_see_as_many_pixels_as_their_kernel(quant_kernel):
    tokenizer = small([16, 24], quant_kernel=quant_kernel)
    for layer, channels in ((tokenizer.encoder[-1], TINY["z_channels"]), (tokenizer.decoder[0], TINY["latent_dim"])):
        seen = torch.zeros(1, channels, 5, 5, requires_grad=True)
        layer(seen)[:, :, 2, 2].sum().backward()
        assert layer(seen).shape[2:] == (5, 5)
        assert int(seen.grad.abs().sum(1).count_nonzero()) == quant_kernel**2
    assert tokenizer(images_for(tokenizer)).reconstruction.shape == (2, 3, 16, 24)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16), (16, 16)])
def test_rectangles_have_codes_of_the_factor_that_the_levels_give(num_levels, height, width):
    tokenizer = small([height, width], channel_multipliers=[1] * num_levels, middle_attention=False)
    factor = 2 ** (num_levels - 1)
    output = tokenizer(images_for(tokenizer, 1))
    assert tokenizer.downsampling_factor == factor
    assert output.codes.shape == (1, height // factor, width // factor)
    assert output.reconstruction.shape == (1, 3, height, width)


@pytest.mark.parametrize("size", [18, [16, 18], [20, 24]], ids=str)
def test_sizes_that_are_no_multiples_of_the_factor_are_refused(size):
    with pytest.raises(ValueError, match=r"do not divide into patches of 8x8: .* multiples of the downsampling factor"):
        small(size, channel_multipliers=[1, 1, 1, 1])


def loss_of(tokenizer: VQGAN, images: Tensor) -> Tensor:
    output = tokenizer(images)
    return (output.reconstruction - images).square().mean() + sum(output.losses.values())


def checkpointing_pair() -> tuple[VQGAN, VQGAN, Tensor]:
    """Two tokenizers in training with the same weights, of which the second repeats its blocks; and images."""
    plain = small([16, 24], "ema", attention_levels=[-1]).train()
    repeating = copy.deepcopy(plain)
    repeating.checkpoint_activations()
    return plain, repeating, images_for(plain)


def test_activation_checkpointing_changes_no_bit_of_loss_and_gradients():
    plain, repeating, images = checkpointing_pair()
    losses = [loss_of(tokenizer, images) for tokenizer in (plain, repeating)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert all(gradient is not None for gradient in expected.values())
    for name, parameter in repeating.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_activation_checkpointing_stores_fewer_bytes_for_the_backward_pass():
    plain, repeating, images = checkpointing_pair()

    def stored_bytes(tokenizer: VQGAN) -> int:
        sizes: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in tokenizer.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(tokenizer, images)
        assert loss.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    assert stored_bytes(repeating) < 0.5 * stored_bytes(plain)


def test_activation_checkpointing_counts_a_batch_once_in_the_quantizer():
    plain, repeating, images = checkpointing_pair()
    calls = []
    repeating.quantizer.register_forward_hook(lambda *_: calls.append(None))
    for step in range(2):
        for tokenizer in (plain, repeating):
            loss_of(tokenizer, images).backward()
            tokenizer.quantizer.update(step)
    assert len(calls) == 2
    torch.testing.assert_close(repeating.state_dict(), plain.state_dict(), rtol=0, atol=0)
