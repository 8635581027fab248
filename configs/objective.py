"""The keys of a tokenizer's objective: reconstruction, perceptual and adversarial terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from configs.validation import Count, NonNegative, Range, Schema, Share


@dataclass
class ObjectiveConfig(Schema):
    """What a tokenizer is trained on, besides its quantizer's own losses."""

    reconstruction: Literal["l1", "l2", "logit_laplace", "categorical"] = "l2"
    """Mean absolute or squared error over pixels in [-1, 1]; or nats a pixel and channel, where the decoder gives a
    logit-Laplace density, or the probabilities of 256 values."""
    reconstruction_weight: NonNegative = 1.0
    """Weight of the reconstruction."""
    perceptual_weight: NonNegative = 0.0
    """Weight of LPIPS, the distance in the features of VGG16; 0 is off."""
    perceptual_file: str | None = None
    """Weights of torchvision's VGG16, .pth or .safetensors; by default torchvision downloads them once."""
    adversarial_weight: NonNegative = 0.0
    """Weight of the adversarial term, times the adaptive one; 0 is off, without a discriminator."""
    adversarial: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """Losses of discriminator and tokenizer."""
    adversarial_start: Annotated[float, Range(0)] = 0.25
    """Optimizer steps before the discriminator and its term begin; below 1, their share of the training."""
    adaptive_weight: bool = True
    """Scale the adversarial term so that its gradient at the decoder's last layer is as long as the reconstruction's
    (Esser et al. 2021, equation 7)."""
    adaptive_weight_max: Annotated[float, Range(1e-3, 1e6)] = 1e4
    """Largest adaptive weight."""
    discriminator: dict[str, Any] = field(default_factory=lambda: {"name": "patchgan"})
    """The discriminator: name, then its options."""
    discriminator_learning_rate: Annotated[float, Range(1e-9, 1)] | None = None
    """Peak learning rate of the discriminator; by default learning_rate."""
    lecam_weight: NonNegative = 0.0
    """Weight of LeCAM, which pulls logits of real images and reconstructions together; 0 is off."""
    lecam_decay: Share = 0.999
    """Share of LeCAM's running means that a micro-batch keeps."""
    r1_weight: NonNegative = 0.0
    """Weight of R1, half the squared gradient of the discriminator at real images; 0 is off."""
    r1_every: Count = 16
    """Optimizer steps between those that have R1, so many times as strongly."""

    def validate(self) -> None:
        if not isinstance(self.discriminator.get("name"), str):
            raise ValueError(
                f"objective.discriminator needs a name, got {self.discriminator!r}; give objective.discriminator.name="
            )
        if self.adversarial_start >= 1 and self.adversarial_start != int(self.adversarial_start):
            raise ValueError(
                f"objective.adversarial_start={self.adversarial_start} should be a number of steps, or a share below 1"
            )
        for name in ("lecam_weight", "r1_weight"):
            if getattr(self, name) and not self.adversarial_weight:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} regularizes a discriminator, but there is none; give "
                    f"objective.adversarial_weight=, or objective.{name}=0"
                )
        if not self.reconstruction_weight and not self.perceptual_weight:
            raise ValueError(
                "nothing asks for a reconstruction: give objective.reconstruction_weight= or perceptual_weight="
            )
        if self.perceptual_file is not None and not self.perceptual_weight:
            raise ValueError(
                "objective.perceptual_file is not read without objective.perceptual_weight=; give that as well, or "
                "objective.perceptual_file=null"
            )

    @property
    def decoder_output(self) -> str:
        """What a decoder gives that is trained on this: a key of `tokenizer.pixels.OUTPUTS_PER_CHANNEL`."""
        return "values" if self.reconstruction in ("l1", "l2") else self.reconstruction
