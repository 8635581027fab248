"""VQ-VAE: strided convolutions and residual blocks around a quantizer (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from configs.validation import Count, Range
from tokenizer.base import ImageTokenizer, ImageTokenizerConfig
from tokenizer.norms import Norm, normalization


class VQVAEConfig(ImageTokenizerConfig):
    """Options of the VQ-VAE; see `ImageTokenizerConfig` for what the training adds."""

    model_type = "tessera-vqvae"

    channels: Count = 128
    """Channels of the hidden layers; the layers at more than half the resolution have half as many."""
    residual_channels: Count = 64
    """Channels inside a residual block."""
    num_residual_blocks: Annotated[int, Range(0, 64)] = 2
    """Residual blocks at the resolution of the codes, in encoder and decoder each."""
    latent_dim: Count = 64
    """Channels of a latent vector, D."""
    downsampling_factor: Literal[2, 4, 8, 16] = 4
    """Pixels of a code's side."""
    norm: Norm = "none"
    """Normalization in the residual blocks."""


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), with a norm before each relu."""

    def __init__(self, channels: int, residual_channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = normalization(norm, channels)
        self.conv1 = nn.Conv2d(channels, residual_channels, 3, padding=1)
        self.norm2 = normalization(norm, residual_channels)
        self.conv2 = nn.Conv2d(residual_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(hidden)))


def _widths(config: VQVAEConfig) -> list[int]:
    """Channels after each halving of the resolution, fine to coarse."""
    num_halvings = int(math.log2(config.downsampling_factor))
    return [max(1, config.channels // 2)] * (num_halvings > 1) + [config.channels] * max(1, num_halvings - 1)


def _residual_stack(config: VQVAEConfig) -> list[nn.Module]:
    blocks: list[nn.Module] = [
        ResidualBlock(config.channels, config.residual_channels, config.norm) for _ in range(config.num_residual_blocks)
    ]
    return [*blocks, normalization(config.norm, config.channels), nn.ReLU()]


class Encoder(nn.Sequential):
    """Images `(B, C, H, W)` to latents `(B, D, H / factor, W / factor)`."""

    def __init__(self, config: VQVAEConfig) -> None:
        layers: list[nn.Module] = []
        channels = config.in_channels
        for width in _widths(config):
            layers += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
            channels = width
        layers += [nn.Conv2d(channels, config.channels, 3, padding=1), *_residual_stack(config)]
        super().__init__(*layers, nn.Conv2d(config.channels, config.latent_dim, 1))


class Decoder(nn.Sequential):
    """Latents `(B, D, H / factor, W / factor)` to outputs `(B, config.out_channels, H, W)`."""

    def __init__(self, config: VQVAEConfig) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_dim, config.channels, 3, padding=1),
            *_residual_stack(config),
        ]
        widths = _widths(config)
        channels = config.channels
        for width in [*reversed(widths[:-1]), None]:
            layers.append(nn.ConvTranspose2d(channels, width or config.out_channels, 4, stride=2, padding=1))
            if width is not None:
                layers.append(nn.ReLU())
                channels = width
        super().__init__(*layers)


class VQVAE(ImageTokenizer):
    """The VQ-VAE with any quantizer.

    >>> tokenizer = VQVAE(VQVAEConfig(image_size=32, quantizer={"name": "ema", "vocab_size": 512}))
    >>> str(tokenizer.code_layout)
    '8x8 of 512'
    """

    config_class = VQVAEConfig
    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.assemble(Encoder, Decoder, config.latent_dim, config.downsampling_factor)
