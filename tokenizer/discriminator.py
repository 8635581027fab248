"""Discriminators: images to how real they look, one number a patch or an image; their losses and regularizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as normalize_spectrum
from torch.nn.utils.parametrize import ParametrizationList

from configs.loading import check_options
from configs.validation import Count, Range, checked
from tokenizer.collectives import mean_over_processes
from tokenizer.norms import Norm, normalization

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


class PatchGAN(nn.Sequential):
    """A stack of convolutions that judges overlapping patches (Isola et al. 2017, arXiv:1611.07004).

    Images `(B, C, H, W)` to logits `(B, 1, h, w)`; with 3 layers a logit sees 70 x 70 pixels.

    Args:
        channels: of the first layer; each further one has twice as many, up to 8 times.
        num_layers: convolutions of stride 2.
        norm: after all but the first and last convolution; none does not let images of a batch see each other.
        spectral_norm: divide each convolution by its largest singular value (Miyato et al. 2018, arXiv:1802.05957).
    """

    @checked
    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        *,
        channels: Count = 64,
        num_layers: Annotated[int, Range(1, 8)] = 3,
        norm: Norm = "none",
        spectral_norm: bool = False,
    ) -> None:
        # Every convolution has a kernel of 4 and a padding of 1: a side is halved, and then shortened by 1 twice.
        if min(image_size) >> num_layers < 3:
            raise ValueError(
                f"images of {image_size[0]}x{image_size[1]} pixels are too small for num_layers={num_layers} of "
                f"patchgan: sides should be at least {3 << num_layers}"
            )
        strides = [2] * num_layers + [1]
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = []
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
            convolution = nn.Conv2d(in_channels, width, 4, stride, 1, bias=i == 0 or norm != "batch")
            layers.append(convolution)
            if i and norm != "none":
                layers.append(normalization(norm, width))
            layers.append(nn.LeakyReLU(0.2))
            in_channels = width
        super().__init__(*layers, nn.Conv2d(in_channels, 1, 4, 1, 1))
        _start_weights(self, spectral_norm, lambda weight: nn.init.normal_(weight, 0, 0.02))


class StyleGANDiscriminator(nn.Module):
    """Residual blocks that halve the image until a linear layer sees all of it (Karras et al. 2020, arXiv:1912.04958).

    Images `(B, C, H, W)` to logits `(B, 1)`. Without the equalized learning rates and the minibatch deviation of the
    paper: images of a batch do not see each other.

    Args:
        channels: of the finest level; each further one has twice as many, up to max_channels.
        max_channels: of the coarser levels.
        spectral_norm: divide each convolution and linear layer by its largest singular value.
    """

    @checked
    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        *,
        channels: Count = 64,
        max_channels: Count = 512,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width) < 8:
            raise ValueError(
                f"images of {height}x{width} pixels are too small for stylegan: sides should be at least 8"
            )
        num_blocks = max(1, int(math.log2(min(height, width))) - 2)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(num_blocks):
            wider = min(2 * channels, max_channels)
            layers.append(_HalvingBlock(channels, wider))
            channels, height, width = wider, (height + 1) // 2, (width + 1) // 2
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten()]
        layers += [nn.Linear(channels * height * width, channels), nn.LeakyReLU(0.2), nn.Linear(channels, 1)]
        self.layers = nn.Sequential(*layers)
        _start_weights(self, spectral_norm, lambda weight: nn.init.kaiming_normal_(weight, a=0.2))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class _HalvingBlock(nn.Module):
    """(conv(conv(x)) + conv1x1(x)) / sqrt(2), both branches blurred before every second pixel is taken."""

    kernel: Tensor

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (taps[:, None] * taps).view(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return (self._halve(hidden) + self.shortcut(self._halve(x))) / math.sqrt(2)

    def _halve(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def _start_weights(network: nn.Module, spectral_norm: bool, draw: Callable[[Tensor], object]) -> None:
    """Draw the weights of all layers; under a spectral norm they keep torch's, whose scale it divides out."""
    for layer in [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]:
        if spectral_norm:
            normalize_spectrum(layer)
        else:
            draw(layer.weight)


DISCRIMINATORS: dict[str, type[nn.Module]] = {"patchgan": PatchGAN, "stylegan": StyleGANDiscriminator}


def build_discriminator(options: Mapping[str, Any], in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """The discriminator that a YAML block `{name: ..., option: value}` describes, for images of this size.

    Raises:
        ValueError: for an unknown name or option, a value out of range, or images that are too small.
    """
    check_options("objective.discriminator", options, DISCRIMINATORS)
    arguments = {key: value for key, value in options.items() if key != "name"}
    return DISCRIMINATORS[options["name"]](in_channels, image_size, **arguments)


@contextmanager
def statistics_kept(discriminator: nn.Module) -> Iterator[None]:
    """A forward pass inside moves no running statistic: batch norms take the batch's, spectral norms do not iterate."""
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    spectral = [m for m in discriminator.modules() if isinstance(m, ParametrizationList) and m.training]
    try:
        for norm in norms:
            norm.track_running_stats = False
        for parametrization in spectral:
            parametrization.eval()
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for parametrization in spectral:
            parametrization.train()


@contextmanager
def left_alone(discriminator: nn.Module) -> Iterator[None]:
    """A forward pass inside gives gradients to the images only, and moves no running statistic."""
    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with statistics_kept(discriminator):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, given its logits of real images and of reconstructions.

    hinge is mean(relu(1 - real)) / 2 + mean(relu(1 + fake)) / 2 (Lim & Ye 2017, arXiv:1705.02894); the others are the
    cross entropy mean(softplus(-real)) / 2 + mean(softplus(fake)) / 2 (Goodfellow et al. 2014, arXiv:1406.2661).
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    """What the tokenizer minimises, given the discriminator's logits of reconstructions.

    hinge is -mean(fake), vanilla is mean(log(1 - sigmoid(fake))), non_saturating is -mean(log(sigmoid(fake))).
    """
    if kind == "hinge":
        return -fake.mean()
    return -F.softplus(fake).mean() if kind == "vanilla" else F.softplus(-fake).mean()


class LeCAM(nn.Module):
    """Pulls logits towards the running mean of the other kind's (Tseng et al. 2021, arXiv:2104.03310, equation 4).

    mean(relu(real - mean_fake)^2) + mean(relu(mean_real - fake)^2), with moving averages of the means over all
    processes that are updated first.

    Args:
        decay: share of the running means that a micro-batch keeps.
    """

    means: Tensor
    started: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        means = mean_over_processes(torch.stack([real.detach().float().mean(), fake.detach().float().mean()]))
        self.means.copy_(torch.where(self.started, torch.lerp(means, self.means, self.decay), means))
        self.started.fill_(True)
        mean_real, mean_fake = self.means.clone().unbind()
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """|d logits / d image|^2 / 2, a mean over real images (Mescheder et al. 2018, arXiv:1801.04406, equation 9)."""
    images = images.detach().requires_grad_()
    with statistics_kept(discriminator):
        logits = discriminator(images)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean() / 2
