"""AdamW with weight decay where it belongs, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from configs.schema import RunConfig


def make_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained, with weight decay on the matrices of linear and convolution layers only."""
    decayed = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), fused=fused)


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """Of one step, counted from 0: a linear warm-up, then constant, or a cosine to zero at the end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warm
    past = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))
