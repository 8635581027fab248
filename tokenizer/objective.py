"""What a tokenizer's reconstruction is trained on; a quantizer's own losses come out of the tokenizer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from configs.schema import ObjectiveConfig


def reconstruction_losses(config: ObjectiveConfig, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
    """The weighted terms by name, float32 scalars.

    Args:
        config: which terms, and their weights.
        images: `(B, C, H, W)` in [-1, 1].
        reconstruction: of the same shape, not clamped.
    """
    error = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
    return {"reconstruction": error(reconstruction.float(), images.float())}
