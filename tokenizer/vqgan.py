"""VQGAN: a convolutional autoencoder with attention around a quantizer (Esser et al. 2021, arXiv:2012.09841)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.validation import Count, Range
from tokenizer.base import ImageTokenizer, ImageTokenizerConfig
from tokenizer.norm_swish import NormSwish
from tokenizer.norms import num_groups


class VQGANConfig(ImageTokenizerConfig):
    """Options of the VQGAN; the defaults are those of the published network of factor 16.

    Levels are counted from the finest, 0, as `channel_multipliers` lists them; each but the last halves the resolution.
    """

    model_type = "tessera-vqgan"

    channels: Count = 128
    """Channels that the multipliers multiply."""
    channel_multipliers: list[Count] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of each level, fine to coarse, as multiples of channels. n levels have codes of 2^(n-1) pixels."""
    num_residual_blocks: Annotated[int, Range(1, 64)] = 2
    """Residual blocks of each level of the encoder; the decoder's levels have one more."""
    attention_levels: list[int] = field(default_factory=lambda: [-1])
    """Levels whose residual blocks are followed by attention; -1 is the coarsest."""
    middle_attention: bool = True
    """Attention between the two blocks in the middle, at the resolution of the codes."""
    z_channels: Count = 256
    """Channels between encoder or decoder and the quant convolutions."""
    latent_dim: Count = 256
    """Channels of a latent vector, D."""
    quant_kernel: Literal[1, 3] = 1
    """Pixels of the quant convolutions' kernels."""

    def validate(self) -> None:
        super().validate()
        num_levels = len(self.channel_multipliers)
        if not num_levels:
            raise ValueError("channel_multipliers should have a number for each level, got an empty list")
        for level in self.attention_levels:
            if not -num_levels <= level < num_levels:
                raise ValueError(
                    f"attention_levels should be in [{-num_levels}, {num_levels}) with {num_levels} "
                    f"channel_multipliers, got {level}"
                )
        self.attention_levels = sorted({level % num_levels for level in self.attention_levels})

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


def _norm_swish(channels: int) -> NormSwish:
    return NormSwish(num_groups(channels), channels, eps=1e-6)


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with x through a 1x1 convolution where the channels change."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm1 = _norm_swish(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = _norm_swish(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Attention(GradientCheckpointingLayer):
    """x + attention of one head over all positions of norm(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        positions = self.query_key_value(self.norm(x)).movedim(1, -1).reshape(B, 1, H * W, 3 * C)
        mixed = F.scaled_dot_product_attention(*positions.chunk(3, dim=-1))  # (B, 1, H * W, C)
        return x + self.out(mixed.view(B, H, W, C).movedim(-1, 1))


class Downsample(nn.Conv2d):
    """A stride of 2 over an image that is padded to the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Nearest pixels doubled, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _quant_convolution(config: VQGANConfig, in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, config.quant_kernel, padding=config.quant_kernel // 2)


def _level(config: VQGANConfig, level: int, in_channels: int, num_blocks: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(num_blocks):
        layers.append(ResidualBlock(in_channels, config.widths[level]))
        in_channels = config.widths[level]
        if level in config.attention_levels:
            layers.append(Attention(in_channels))
    return layers


def _middle(config: VQGANConfig) -> list[nn.Module]:
    channels = config.widths[-1]
    attention: list[nn.Module] = [Attention(channels)] if config.middle_attention else []
    return [ResidualBlock(channels, channels), *attention, ResidualBlock(channels, channels)]


class Encoder(nn.Sequential):
    """Images `(B, C, H, W)` to latents `(B, D, H / factor, W / factor)`; the last layer is the quant convolution."""

    def __init__(self, config: VQGANConfig) -> None:
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, config.channels, 3, padding=1)]
        channels = config.channels
        for level, width in enumerate(config.widths):
            layers += _level(config, level, channels, config.num_residual_blocks)
            channels = width
            if level + 1 < len(config.widths):
                layers.append(Downsample(channels))
        layers += [*_middle(config), _norm_swish(channels), nn.Conv2d(channels, config.z_channels, 3, padding=1)]
        super().__init__(*layers, _quant_convolution(config, config.z_channels, config.latent_dim))


class Decoder(nn.Sequential):
    """Latents `(B, D, H / factor, W / factor)` to outputs `(B, config.out_channels, H, W)`; the first layer is the
    post-quant convolution."""

    def __init__(self, config: VQGANConfig) -> None:
        channels = config.widths[-1]
        layers: list[nn.Module] = [
            _quant_convolution(config, config.latent_dim, config.z_channels),
            nn.Conv2d(config.z_channels, channels, 3, padding=1),
            *_middle(config),
        ]
        for level in reversed(range(len(config.widths))):
            layers += _level(config, level, channels, config.num_residual_blocks + 1)
            channels = config.widths[level]
            if level:
                layers.append(Upsample(channels))
        super().__init__(*layers, _norm_swish(channels), nn.Conv2d(channels, config.out_channels, 3, padding=1))


class VQGAN(ImageTokenizer):
    """The network of taming-transformers with any quantizer.

    >>> tokenizer = VQGAN(VQGANConfig(image_size=64, channels=32, z_channels=64, latent_dim=64))
    >>> str(tokenizer.code_layout)
    '4x4 of 512'
    """

    config_class = VQGANConfig
    config: VQGANConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.assemble(Encoder, Decoder, config.latent_dim, config.downsampling_factor)
