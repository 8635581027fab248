"""AdamW with weight decay where it belongs, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from configs.schema import RunConfig
from tokenizer.quantizers import Quantizer


def make_optimizer(config: RunConfig, model: nn.Module, rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW over what is trained, with weight decay on the matrices of linear and convolution layers only.

    Each group has a `scale`: how many times the run's learning rate it learns with, `rate` but for codebooks.
    """
    # Of a layer under a spectral norm, weight is computed; what is trained stands behind it.
    decayed = {
        id(module.get_parameter("parametrizations.weight.original" if is_parametrized(module, "weight") else "weight"))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }
    scales = {
        id(parameter): scale
        for quantizer in model.modules()
        if isinstance(quantizer, Quantizer)
        for parameter, scale in quantizer.learning_rate_scales()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in trained:
        kind = config.weight_decay if id(parameter) in decayed else 0.0, rate * scales.get(id(parameter), 1.0)
        groups.setdefault(kind, []).append(parameter)
    fused = trained[0].device.type in ("cpu", "cuda")
    named = [{"params": group, "weight_decay": decay, "scale": scale} for (decay, scale), group in groups.items()]
    return torch.optim.AdamW(named, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), fused=fused)


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """Of one step, counted from 0: a linear warm-up, then constant, or a cosine to zero at the end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warm
    past = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


def step_optimizers(
    accelerator: Accelerator, models: list[nn.Module], optimizers: dict[str, Optimizer], max_grad_norm: float
) -> None:
    """Clip the gradients of each model to a norm, where it is above 0; step; clear the gradients.

    In float16 all losses have one scale, which changes after the last optimizer has stepped.
    """
    scaler = accelerator.scaler
    moving = list(optimizers.values())
    if scaler is not None:
        moving = [each for each in moving if any(p.grad is not None for g in each.param_groups for p in g["params"])]
        for optimizer in moving:
            scaler.unscale_(optimizer)
    if max_grad_norm:
        for module in models:
            nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    for optimizer in moving:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    for optimizer in optimizers.values():
        optimizer.zero_grad()
