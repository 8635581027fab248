"""diffusers' VQModel of the same shape as a VQGAN, and its weights mapped onto ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from diffusers import VQModel
from torch import nn

from pipelines.benchmarks.tokenizer_contestants import diffusers_network
from tokenizer.vqgan import Attention, Decoder, Encoder, ResidualBlock, VQGANConfig


def reference_of(config: VQGANConfig) -> VQModel:
    """diffusers' network of the same shape, to evaluate."""
    return diffusers_network(config, vocab_size=256).eval()


def layers_of(block: nn.Module) -> Iterator[nn.Module]:
    """The layers of one of diffusers' blocks, in the order in which they are called."""
    residuals, attentions = iter(block.resnets), getattr(block, "attentions", [None] * len(block.resnets))
    yield next(residuals)
    for attention in attentions:
        if attention is not None:
            yield attention
        yield from itertools.islice(residuals, 1)
    for sampler in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []:
        yield sampler.conv


def encoder_layers(reference: VQModel) -> list[nn.Module]:
    net = reference.encoder
    blocks = [layer for block in (*net.down_blocks, net.mid_block) for layer in layers_of(block)]
    return [net.conv_in, *blocks, net.conv_norm_out, net.conv_out, reference.quant_conv]


def decoder_layers(reference: VQModel) -> list[nn.Module]:
    net = reference.decoder
    blocks = [layer for block in (net.mid_block, *net.up_blocks) for layer in layers_of(block)]
    return [reference.post_quant_conv, net.conv_in, *blocks, net.conv_norm_out, net.conv_out]


@torch.no_grad()
def copy_layer(target: nn.Module, source: nn.Module) -> None:
    if isinstance(target, ResidualBlock):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            getattr(target, name).load_state_dict(getattr(source, name).state_dict())
        if source.conv_shortcut is not None:
            target.shortcut.load_state_dict(source.conv_shortcut.state_dict())
        else:
            assert isinstance(target.shortcut, nn.Identity)
    elif isinstance(target, Attention):
        target.norm.load_state_dict(source.group_norm.state_dict())
        linear = [source.to_q, source.to_k, source.to_v]
        target.query_key_value.weight.copy_(torch.cat([layer.weight for layer in linear])[:, :, None, None])
        target.query_key_value.bias.copy_(torch.cat([layer.bias for layer in linear]))
        target.out.weight.copy_(source.to_out[0].weight[:, :, None, None])
        target.out.bias.copy_(source.to_out[0].bias)
    else:
        target.load_state_dict(source.state_dict())


def copy_weights(encoder: Encoder, decoder: Decoder, reference: VQModel) -> None:
    """Every layer of diffusers' onto the one in the same place of ours; both have as many, of the same shapes."""
    for part, sources in ((encoder, encoder_layers(reference)), (decoder, decoder_layers(reference))):
        for target, source in zip(part, sources, strict=True):
            copy_layer(target, source)
