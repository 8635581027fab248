"""What a tokenizer and its discriminator are trained on; a quantizer's own losses come out of the tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.loading import check_options
from configs.objective import ObjectiveConfig
from tokenizer.base import ImageTokenizer, TokenizerOutput
from tokenizer.collectives import mean_over_processes
from tokenizer.discriminator import (
    DISCRIMINATORS,
    LeCAM,
    build_discriminator,
    discriminator_loss,
    generator_loss,
    left_alone,
    r1_penalty,
)
from tokenizer.perceptual import LPIPS
from tokenizer.pixels import images_of, negative_log_likelihood


class Adversary(nn.Module):
    """The discriminator with all that a checkpoint keeps of it. Its forward pass is the discriminator's.

    Args:
        config: the objective, with an adversarial_weight.
        image_shape: (channels, height, width) of the images.
        first_step: the optimizer step, counted from 0, at which the discriminator begins.
    """

    first_step: Tensor

    def __init__(self, config: ObjectiveConfig, image_shape: tuple[int, int, int], first_step: int) -> None:
        super().__init__()
        self.discriminator = build_discriminator(config.discriminator, image_shape[0], image_shape[1:])
        self.lecam = LeCAM(config.lecam_decay) if config.lecam_weight else None
        # In the checkpoint: a share of the steps stays what it was when the training is continued to more of them.
        self.register_buffer("first_step", torch.tensor(first_step))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, ...)` of images `(B, C, H, W)` in [-1, 1]: how real each looks."""
        return self.discriminator(images)


class TokenizerObjective:
    """The terms of both sides, each named and weighted; their sum is what is minimised.

    Terms are means over samples, so those of micro-batches add up to those of the batch, but for the adaptive weight
    and LeCAM's means: both are over all processes, and of one micro-batch. A discriminator's batch norm is of one
    micro-batch and process, and its spectral norm iterates once in each.

    Args:
        config: which terms, and their weights.
        tokenizer: what is trained.
        total_steps: optimizer steps of the training, of which `adversarial_start` may be a share.

    Raises:
        ValueError: where weights of the perceptual term cannot be had, or the discriminator or LPIPS do not fit the
            images, or the discriminator would begin after the last step.

    Attributes:
        perceptual: LPIPS, where it has a weight.
        adversary: the discriminator, where the adversarial term has a weight.
    """

    def __init__(self, config: ObjectiveConfig, tokenizer: ImageTokenizer, total_steps: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        shape = tokenizer.image_shape
        if config.perceptual_weight and min(shape[1:]) < 16:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} pixels are too small for LPIPS: sides should be at least 16; "
                "objective.perceptual_weight=0 goes on without"
            )
        self.perceptual = LPIPS(config.perceptual_file) if config.perceptual_weight else None
        check_options("objective.discriminator", config.discriminator, DISCRIMINATORS)
        start = config.adversarial_start
        self.adversarial_start = round(start * total_steps) if start < 1 else int(start)
        if config.adversarial_weight and self.adversarial_start >= total_steps:
            raise ValueError(
                f"objective.adversarial_start={start} leaves none of {total_steps} steps to the discriminator; give a "
                "smaller one, or a share below 1"
            )
        self.adversary = Adversary(config, shape, self.adversarial_start) if config.adversarial_weight else None

    def resume(self) -> None:
        """Take over from the adversary, once a checkpoint of it is loaded, when it began."""
        if self.adversary is not None:
            self.adversarial_start = int(self.adversary.first_step)

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in an optimizer step, counted from 0."""
        return self.adversary is not None and step >= self.adversarial_start

    def tokenizer_losses(
        self, images: Tensor, output: TokenizerOutput, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tokenizer's terms without its quantizer's, and detached scalars to log.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            output: of the tokenizer on them.
            step: the optimizer step, counted from 0.
        """
        config = self.config
        if not self.is_adversarial(step):
            return self._terms(images, output.outputs, output.reconstruction), {}
        # Terms see a copy of the decoder's outputs. Their gradients at it, each computed once, give both the adaptive
        # weight and, continued from the outputs, the gradient of the whole.
        outputs = output.outputs.detach().float().requires_grad_()
        # Images of its own for each, so that the gradient of one does not use up the graph of the other.
        kind = self.tokenizer.config.decoder_output
        terms = self._terms(images, outputs, images_of(outputs, kind, differentiable=True))
        assert self.adversary is not None
        with left_alone(self.adversary):
            logits = self.adversary(images_of(outputs, kind, differentiable=True))
        adversarial = generator_loss(config.adversarial, logits.float())
        gradients = {name: _gradient(term, outputs) for name, term in terms.items()}
        gradient = _gradient(adversarial, outputs)
        metrics: dict[str, Tensor] = {}
        weight: float | Tensor = config.adversarial_weight
        if config.adaptive_weight:
            others = torch.stack(list(gradients.values())).sum(0)
            metrics["adaptive_weight"] = self._adaptive_weight(output.outputs, others, gradient)
            weight = weight * metrics["adaptive_weight"]
        terms["adversarial"], gradients["adversarial"] = weight * adversarial, weight * gradient
        return {name: _with_gradient(term, output.outputs, gradients[name]) for name, term in terms.items()}, metrics

    def _terms(self, images: Tensor, outputs: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """All terms but the adversarial one."""
        config = self.config
        kind = config.reconstruction
        if kind == "l1":
            error = F.l1_loss(reconstruction.float(), images.float())
        elif kind == "l2":
            error = F.mse_loss(reconstruction.float(), images.float())
        else:
            error = negative_log_likelihood(outputs, images, kind)
        terms = {"reconstruction": config.reconstruction_weight * error}
        if self.perceptual is not None:
            terms["perceptual"] = config.perceptual_weight * self.perceptual(images, reconstruction)
        return terms

    def _adaptive_weight(self, outputs: Tensor, others: Tensor, adversarial: Tensor) -> Tensor:
        """How much longer the other terms' gradient at the last layer is than the adversarial one's, up to a limit.

        Both are given at the decoder's outputs.
        """
        layer, size = self.tokenizer.last_layer, outputs.numel()
        lengths = []
        for gradient in (others, adversarial):
            scaled = (gradient * size).to(outputs.dtype)  # half precision could not hold the small numbers of a mean
            (found,) = torch.autograd.grad(outputs, layer, scaled, retain_graph=True)
            lengths.append(mean_over_processes(found.float() / size).norm())
        return (lengths[0] / (lengths[1] + 1e-4)).clamp(max=self.config.adaptive_weight_max)

    def discriminator_losses(
        self, discriminator: nn.Module, images: Tensor, reconstruction: Tensor, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The discriminator's terms, and detached scalars to log: its mean logits.

        Args:
            discriminator: the adversary, as the training calls it.
            images: `(B, C, H, W)` in [-1, 1].
            reconstruction: of the same shape; it gets no gradient.
            step: the optimizer step, counted from 0.
        """
        config = self.config
        adversary = self.adversary
        assert adversary is not None
        logits = discriminator(torch.cat([images, reconstruction.detach().to(images.dtype)])).float()
        real, fake = logits.split(len(images))
        losses = {"discriminator": discriminator_loss(config.adversarial, real, fake)}
        if adversary.lecam is not None:
            losses["lecam"] = config.lecam_weight * adversary.lecam(real, fake)
        if config.r1_weight and step % config.r1_every == 0:
            with torch.autocast(images.device.type, enabled=False):
                penalty = r1_penalty(adversary.discriminator, images.float())
            losses["r1"] = config.r1_weight * config.r1_every * penalty
        return losses, {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}


def _gradient(term: Tensor, outputs: Tensor) -> Tensor:
    """The gradient of a term, which is a mean over outputs, scaled on its way so that half precision can hold it."""
    size = outputs.numel()
    return torch.autograd.grad(term * size, outputs)[0] / size


def _with_gradient(term: Tensor, outputs: Tensor, gradient: Tensor) -> Tensor:
    """The value of a term, with this gradient at the outputs."""
    carrier = (outputs * gradient).sum()
    return term.detach() + (carrier - carrier.detach())
