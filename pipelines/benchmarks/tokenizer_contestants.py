"""Who is measured on training tokenizers: the published recipes in plain PyTorch, and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks.harness import Run
from pipelines.benchmarks.quantizer_contestants import BETA, DECAY, EPSILON
from pipelines.devices import default_device
from pipelines.tokenizer_training import make_tokenizer
from tokenizer.discriminator import build_discriminator
from tokenizer.norm_swish import NormSwish
from tokenizer.vqgan import Attention, VQGANConfig


class MovingAverages(nn.Module):
    """The codebook of VQ-VAE by moving averages, with all N x K distances and one-hot codes, as commonly published."""

    codebook: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(dim, vocab_size))
        self.register_buffer("sizes", torch.zeros(vocab_size))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized latents `(B, D, H, W)` and the loss."""
        z = latents.permute(0, 2, 3, 1)
        flat = z.reshape(-1, z.shape[-1])
        codes = _distances(flat, self.codebook.t()).argmin(1)
        quantized = F.embedding(codes.view(z.shape[:-1]), self.codebook.t())
        with torch.no_grad():
            one_hot = F.one_hot(codes, self.codebook.shape[1]).type(flat.dtype)
            self.sizes.mul_(DECAY).add_(one_hot.sum(0), alpha=1 - DECAY)
            self.sums.mul_(DECAY).add_(flat.t() @ one_hot, alpha=1 - DECAY)
            total = self.sizes.sum()
            smoothed = (self.sizes + EPSILON) / (total + len(self.sizes) * EPSILON) * total
            self.codebook.copy_(self.sums / smoothed)
        loss = BETA * (quantized.detach() - z).square().mean()
        return (z + (quantized - z).detach()).permute(0, 3, 1, 2), loss


class NearestCodes(nn.Module):
    """A codebook that learns by gradient, with all N x K distances, as commonly published."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized latents `(B, D, H, W)` and the loss."""
        z = latents.permute(0, 2, 3, 1).contiguous()
        codes = _distances(z.view(-1, z.shape[-1]), self.embedding.weight).argmin(1)
        quantized = self.embedding(codes).view(z.shape)
        loss = BETA * (quantized.detach() - z).square().mean() + (quantized - z.detach()).square().mean()
        return (z + (quantized - z).detach()).permute(0, 3, 1, 2).contiguous(), loss


def _distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    products = torch.einsum("nd,kd->nk", vectors, codebook)
    return vectors.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * products


class PublishedAttention(Attention):
    """The same function by two batched products and a softmax, with all weights in memory."""

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        query, key, value = self.query_key_value(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (torch.bmm(query.transpose(1, 2), key) * C**-0.5).softmax(2)
        return x + self.out(torch.bmm(value, weights.transpose(1, 2)).view(B, C, H, W))


class PublishedNormSwish(NormSwish):
    """The same function by x sigmoid(x) of torch's norm."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normed * torch.sigmoid(normed)


def published(config: TokenizerTrainingConfig) -> Run:
    """The recipe of the papers' repositories: float32, contiguous, plain Adam, all distances at once.

    With a discriminator it goes through the tokenizer once for each of the two optimizers, and through the
    discriminator once each for real images and reconstructions, as taming-transformers does.
    """
    device = default_device()
    network = make_tokenizer(config)
    dim, vocab_size = network.quantizer.dim, network.quantizer.vocab_size
    make = MovingAverages if config.quantizer["name"] == "ema" else NearestCodes
    network.quantizer = nn.Identity()  # type: ignore[assignment]
    for module in network.modules():
        if isinstance(module, Attention):
            module.__class__ = PublishedAttention
        elif isinstance(module, NormSwish):
            module.__class__ = PublishedNormSwish
    quantizer = make(dim, vocab_size).to(device)
    nn.Module.to(network, device)
    parameters = [*network.parameters(), *quantizer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    images = (torch.rand(config.batch_size, *network.image_shape) * 2 - 1).to(device)

    def forward() -> tuple[Tensor, Tensor]:
        quantized, loss = quantizer(network.encode_latents(images))
        return network.decode_latents(quantized), loss

    if not config.objective.adversarial_weight:
        return _descend(images, forward, optimizer)

    discriminator = build_discriminator(
        config.objective.discriminator, network.image_shape[0], network.image_shape[1:]
    ).to(device)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=config.learning_rate)

    def run() -> Tensor:
        discriminator.requires_grad_(False)
        reconstruction, loss = forward()
        error = F.mse_loss(reconstruction, images)
        adversarial = -discriminator(reconstruction).mean()
        lengths = [
            torch.autograd.grad(term, network.last_layer, retain_graph=True)[0].norm() for term in (error, adversarial)
        ]
        weight = (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach() * config.objective.adversarial_weight
        total = error + loss + weight * adversarial
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        discriminator.requires_grad_(True)
        with torch.no_grad():
            reconstruction, _ = forward()
        real, fake = discriminator(images), discriminator(reconstruction)
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        of_discriminator.zero_grad()
        hinge.backward()
        of_discriminator.step()
        return total.detach()

    return run


def diffusers_network(options: VQGANConfig, vocab_size: int) -> Any:
    """diffusers' VQModel of the same shape; its up blocks are listed coarse to fine."""
    from diffusers import VQModel

    attends = [level in options.attention_levels for level in range(len(options.widths))]
    return VQModel(
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(options.widths),
        layers_per_block=options.num_residual_blocks,
        latent_channels=options.z_channels,
        vq_embed_dim=options.latent_dim,
        num_vq_embeddings=vocab_size,
        mid_block_add_attention=options.middle_attention,
    )


def diffusers_model(config: TokenizerTrainingConfig) -> Run:
    """diffusers' VQModel of the same size: float32, and Adam on its squared error and commitment."""
    network = make_tokenizer(config)
    assert isinstance(network.config, VQGANConfig)
    model = diffusers_network(network.config, network.quantizer.vocab_size)
    model = model.to(default_device()).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    images = (torch.rand(config.batch_size, *network.image_shape) * 2 - 1).to(default_device())

    def forward() -> tuple[Tensor, Tensor]:
        output = model(images)
        return output.sample, output.commit_loss.mean()

    return _descend(images, forward, optimizer)


def _descend(images: Tensor, forward: Callable[[], tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> Run:
    """A step on the squared error and what the quantizer adds."""

    def run() -> Tensor:
        reconstruction, loss = forward()
        total = F.mse_loss(reconstruction, images) + loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.detach()

    return run
