"""The contract of every tokenizer in the table, and the options of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantizer_cases import STOCHASTIC, VARIANTS, tiny_block
from torch import Tensor, nn

from configs.loading import options_of
from tokenizer import TOKENIZER_CONFIGS, TOKENIZERS, ImageTokenizer, build_tokenizer
from tokenizer.quantizers import QUANTIZERS, Quantizer
from tokenizer.vqvae import VQVAEConfig

TINY = {"channels": 8, "residual_channels": 4, "latent_dim": 4, "downsampling_factor": 4}
TINY |= {"channel_multipliers": [1, 2, 2], "num_residual_blocks": 1, "z_channels": 8}
TINY_VQVAE = {k: v for k, v in TINY.items() if k in options_of(TOKENIZER_CONFIGS["vqvae"])}
SIZES = [[16, 16], [16, 24]]


def tiny(name: str, image_size: list[int] | int = 16, quantizer: str = "ema", **options: object) -> ImageTokenizer:
    """A tokenizer with a variant of quantizers, codes of 16, in eval mode, with those of the tiny options it has."""
    known = options_of(TOKENIZER_CONFIGS[name])
    model = {"name": name, **{k: v for k, v in TINY.items() if k in known}, **options}
    return build_tokenizer(model, tiny_block(VARIANTS[quantizer]), image_size=image_size).eval()


def images_for(tokenizer: ImageTokenizer, batch_size: int = 2) -> Tensor:
    return torch.rand(batch_size, *tokenizer.image_shape) * 2 - 1


def bookkeeping_of(tokenizer: ImageTokenizer) -> list[Tensor]:
    """The counters and sums of all quantizers inside."""
    quantizers = [module for module in tokenizer.modules() if isinstance(module, Quantizer)]
    found = [(quantizer, name) for quantizer in quantizers for name in sorted(quantizer.bookkeeping)]
    return [getattr(quantizer, name) for quantizer, name in found if hasattr(quantizer, name)]


def code_tensors_of(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Encoder and quantizer, without counters and sums."""
    skipped = {tensor.data_ptr() for tensor in bookkeeping_of(tokenizer)}
    tensors = {k: v for k, v in tokenizer.state_dict().items() if not k.startswith("decoder.")}
    return {k: v for k, v in tensors.items() if v.data_ptr() not in skipped}


@torch.no_grad()
def change(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.1)


@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_images_keep_their_shape_and_codes_have_that_of_the_layout(name, image_size):
    tokenizer = tiny(name, image_size)
    images = images_for(tokenizer)
    assert tokenizer.image_shape == (3, *image_size)
    output, codes = tokenizer(images), tokenizer.encode(images)
    assert output.reconstruction.shape == images.shape
    assert output.codes.shape == codes.shape == (2, *tokenizer.code_layout.shape)
    assert output.codes.dtype == codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("image_size", SIZES, ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_forward_is_decode_of_encode(name, image_size):
    tokenizer = tiny(name, image_size)
    images = images_for(tokenizer)
    output, codes = tokenizer(images), tokenizer.encode(images)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(tokenizer.decode(codes), output.reconstruction.clamp(-1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decode_clamps_and_forward_does_not(name):
    tokenizer = tiny(name)
    with torch.no_grad():
        list(tokenizer.decoder.parameters())[-1].add_(5)
    images = images_for(tokenizer)
    assert (tokenizer(images).reconstruction > 1).all()
    assert (tokenizer.decode(tokenizer.encode(images)) == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_grey_and_colour_images_have_tokenizers(name, channels):
    known = options_of(TOKENIZER_CONFIGS[name])
    model = {"name": name, **{k: v for k, v in TINY.items() if k in known}}
    tokenizer = build_tokenizer(model, {"name": "vq", "vocab_size": 16}, image_size=16, in_channels=channels)
    assert tokenizer(torch.zeros(2, channels, 16, 16)).reconstruction.shape == (2, channels, 16, 16)


@pytest.mark.parametrize("shape", [(2, 1, 16, 24), (2, 3, 24, 16), (2, 3, 16, 16), (3, 16, 24)], ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_images_of_another_shape_are_refused(name, shape):
    tokenizer = tiny(name, [16, 24])
    for verb in (tokenizer, tokenizer.encode):
        with pytest.raises(ValueError, match=r"expected images \(B, 3, 16, 24\), got \("):
            verb(torch.zeros(shape))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_integer_images_are_refused(name):
    tokenizer = tiny(name)
    for verb in (tokenizer, tokenizer.encode):
        with pytest.raises(ValueError, match=r"expected images as floating point in \[-1, 1\], got torch.uint8"):
            verb(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_image_size_that_does_not_divide_is_refused_with_one_that_does(name):
    with pytest.raises(ValueError, match=r"18x25 pixels do not divide into patches of 4x4: .* try 16x24"):
        tiny(name, [18, 25])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_codes_of_another_shape_or_out_of_range_are_refused(name):
    tokenizer = tiny(name)
    codes = tokenizer.encode(images_for(tokenizer))
    with pytest.raises(ValueError, match=r"codes of \[4x4 of 16\] have shape \(B, 4, 4\), got"):
        tokenizer.decode(codes[:, :-1])
    for wrong in (-1, tokenizer.code_layout.vocab_size):
        codes.flatten()[0] = wrong
        with pytest.raises(ValueError, match=rf"codes of \[.*\] are in \[0, 16\), got .*{wrong}"):
            tokenizer.decode(codes)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_the_vqvae_trains_with_every_norm_and_factor(norm, factor):
    tokenizer = tiny("vqvae", [32, 48], quantizer="vq", norm=norm, downsampling_factor=factor).train()
    assert str(tokenizer.code_layout) == f"{32 // factor}x{48 // factor} of 16"
    images = images_for(tokenizer)
    output = tokenizer(images)
    ((output.reconstruction - images).square().mean() + sum(output.losses.values())).backward()
    assert output.reconstruction.shape == images.shape
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeds_decide_what_a_tokenizer_draws_in_training(name):
    tokenizer = build_tokenizer({"name": "vqvae", **TINY_VQVAE}, tiny_block(VARIANTS[name]), image_size=16).train()
    images = images_for(tokenizer, 6)
    one, same, other = (tokenizer(images, torch.arange(6) + first).reconstruction for first in (0, 0, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    alone = tokenizer(images[2:3], torch.tensor([2])).reconstruction[0]
    torch.testing.assert_close(alone, one[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_vqvae_trains_and_codes_with_every_quantizer(name):
    tokenizer = build_tokenizer(
        {"name": "vqvae", **TINY_VQVAE}, tiny_block(VARIANTS[name]), image_size=[16, 24]
    ).train()
    images = images_for(tokenizer)
    output = tokenizer(images, torch.arange(2))
    ((output.reconstruction - images).square().mean() + sum(output.losses.values())).backward()
    tokenizer.quantizer.update(0)
    for part in (tokenizer.encoder, tokenizer.decoder):
        assert all(parameter.grad.isfinite().all() for parameter in part.parameters())
    assert tokenizer.encoder[0].weight.grad.abs().sum() > 0
    tokenizer.eval()
    codes = tokenizer.encode(images)
    assert codes.shape == (2, *tokenizer.code_layout.shape)
    torch.testing.assert_close(
        tokenizer.decode(codes), tokenizer(images).reconstruction.clamp(-1, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("key", "value"), [("norm", "layer"), ("downsampling_factor", 3), ("channels", 0)])
def test_options_of_the_vqvae_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} should be .*, got {value!r}"):
        VQVAEConfig(**{key: value})


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "ema-growing"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fingerprint_survives_save_load_and_casts(name, quantizer, tmp_path: Path):
    tokenizer = tiny(name, quantizer=quantizer)
    tokenizer.save_pretrained(tmp_path)
    fingerprint = tokenizer.fingerprint
    assert fingerprint == tokenizer.compute_fingerprint()
    assert len(fingerprint) == 64
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == loaded.compute_fingerprint() == fingerprint
    assert loaded.to(torch.bfloat16).fingerprint == fingerprint
    assert ImageTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16).fingerprint == fingerprint
    loaded.save_pretrained(tmp_path / "bfloat16")
    assert ImageTokenizer.from_pretrained(tmp_path / "bfloat16").fingerprint == fingerprint


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_a_saved_tokenizer_that_trains_on_is_saved_with_a_new_fingerprint(norm, tmp_path: Path):
    tiny("vqvae", norm=norm).save_pretrained(tmp_path)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path)
    before = tokenizer.fingerprint
    change(tokenizer.encoder)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.fingerprint != before
    assert ImageTokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fingerprint_does_not_see_the_decoder(name):
    tokenizer = tiny(name)
    before = tokenizer.compute_fingerprint()
    change(tokenizer.decoder)
    assert tokenizer.compute_fingerprint() == before


COUNTING = ["cvq", "cvq-random", "ema", "ema-growing", "ibq", "multiscale", "product", "residual", "simvq", "vq"]


@pytest.mark.parametrize("quantizer", COUNTING)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fingerprint_does_not_see_counters(name, quantizer):
    tokenizer = tiny(name, quantizer=quantizer)
    before = tokenizer.compute_fingerprint()
    counters = bookkeeping_of(tokenizer)
    assert counters
    for tensor in counters:
        tensor.copy_(tensor.logical_not() if tensor.dtype == torch.bool else tensor + 1)
    assert tokenizer.compute_fingerprint() == before


def test_the_fingerprint_does_not_see_the_step_counters_of_batch_norm():
    tokenizer = tiny("vqvae", norm="batch")
    before = tokenizer.compute_fingerprint()
    counters = [buffer for name, buffer in tokenizer.encoder.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    for counter in counters:
        counter.add_(1)
    assert tokenizer.compute_fingerprint() == before


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "ema-growing"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fingerprint_sees_every_tensor_of_encoder_and_codebook(name, quantizer):
    tokenizer = tiny(name, quantizer=quantizer)
    found = {tokenizer.compute_fingerprint()}
    tensors = code_tensors_of(tokenizer)
    assert any(key.startswith("encoder.") for key in tensors)
    assert any(key.startswith("quantizer.") for key in tensors)
    for tensor in tensors.values():
        with torch.no_grad():
            tensor.view(-1)[-1] += 1e-3 if tensor.is_floating_point() else 1
        found.add(tokenizer.compute_fingerprint())
    assert len(found) == len(tensors) + 1


def test_the_fingerprint_sees_the_options_that_decide_codes():
    builders: list[Callable[[], ImageTokenizer]] = [
        lambda: tiny("vqvae"),
        lambda: tiny("vqvae", quantizer="vq"),
        lambda: tiny("vqvae", [16, 24]),
        lambda: tiny("vqvae", norm="group", num_residual_blocks=0),
        lambda: tiny("vqvae", num_residual_blocks=0),
    ]
    found = set()
    for build in builders:
        torch.manual_seed(0)
        found.add(build().compute_fingerprint())
    assert len(found) == len(builders)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_frozen_codes_leave_only_the_decoder_trainable(name):
    tokenizer = tiny(name)
    tokenizer.freeze_codes()
    trainable = {key for key, parameter in tokenizer.named_parameters() if parameter.requires_grad}
    assert trainable == {f"decoder.{key}" for key, _ in tokenizer.decoder.named_parameters()}
    tokenizer.train()
    assert tokenizer.decoder.training
    assert not any(module.training for part in (tokenizer.encoder, tokenizer.quantizer) for module in part.modules())
    tokenizer.eval()
    assert not tokenizer.decoder.training


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}], ids=str)
def test_training_with_frozen_codes_changes_no_tensor_that_decides_them(options):
    tokenizer = tiny("vqvae", **options).train()
    tokenizer.freeze_codes()
    assert not tokenizer.encoder.training
    before = {key: tensor.clone() for key, tensor in tokenizer.state_dict().items()}
    images = images_for(tokenizer)
    optimizer = torch.optim.SGD([p for p in tokenizer.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        (tokenizer(images).reconstruction - images).square().mean().backward()
        optimizer.step()
        tokenizer.quantizer.update(step)
    changed = {key for key, tensor in tokenizer.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(key.startswith("decoder.") for key in changed)
