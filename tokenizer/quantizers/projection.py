"""The start of the linear layers around a quantizer that works in fewer or more channels than the latents have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokenizer.collectives import from_first_process

NUM_START_VECTORS = 1 << 14
"""Latents from which the principal components are measured."""


@torch.no_grad()
def start_projection(project_in: nn.Linear, project_out: nn.Linear, vectors: Tensor) -> None:
    """Let a projection start as the latents' principal components, each scaled to variance 1, and back.

    So the sign of every channel is even and by itself from the first step on. It is for signs only, which have no
    scale: bounded channels would leave their range after a few steps, so much do small components grow.

    Args:
        project_in: from D to code_dim channels.
        project_out: and back.
        vectors: latents `(N, D)` float32.
    """
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, components = torch.linalg.eigh(centred.t() @ centred / len(vectors))  # rising
    code_dim, count = project_in.out_features, min(project_in.out_features, len(variances))
    scale = variances[-count:].flip(0).clamp(min=1e-6 * float(variances[-1]) + 1e-12).sqrt()
    components = components[:, -count:].flip(1)  # (D, count)
    spread = torch.eye(count, device=vectors.device)
    if code_dim > count:  # every channel mixes all components, and has variance 1 as well
        spread = nn.init.orthogonal_(vectors.new_empty(code_dim, count), gain=math.sqrt(code_dim / count))
    project_in.weight.copy_(spread @ (components / scale).t())
    project_in.bias.copy_(-project_in.weight @ mean)
    project_out.weight.copy_((components * scale) @ spread.t() * (count / code_dim))
    project_out.bias.copy_(mean)
    for parameter in (*project_in.parameters(), *project_out.parameters()):
        from_first_process(parameter)
