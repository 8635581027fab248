"""vector-quantize-pytorch on the work of our cases: its modules, told to do what ours do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from pipelines.benchmarks.quantizer_contestants import BETA, DECAY, Outcome, Work
from pipelines.devices import default_device

Kind = Literal["bsq", "ema", "fsq", "lfq", "residual", "simvq", "vq"]

_BYTES_PER_SCORE = 24


def fits(work: Work) -> bool:
    """Whether it can be tried on this machine, by its N x K tensors: 24 bytes a score at their most, measured.

    At N = 65,536 these are 12 GiB for K = 8192 and 96 GiB for K = 65,536, the first of them alone 16 GiB.
    """
    device = default_device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    return work.num_vectors * work.vocab_size * _BYTES_PER_SCORE < memory


def _module(work: Work, kind: Kind, options: dict[str, Any]) -> nn.Module:
    """Its module with the work's codes; no start from data, no revival, straight-through gradients, as in our cases."""
    import vector_quantize_pytorch as peer

    if kind == "fsq":
        return peer.FSQ(**options)
    if kind in ("lfq", "bsq"):
        return peer.LFQ(dim=work.dim, codebook_size=work.vocab_size, spherical=kind == "bsq", **options)
    if kind == "simvq":
        module = peer.SimVQ(work.dim, work.vocab_size, rotation_trick=False, input_to_quantize_commit_loss_weight=BETA)
        module.frozen_codebook.copy_(work.codebook())
        nn.init.eye_(module.code_transform.weight)
        return module
    options = options | {"kmeans_init": False, "threshold_ema_dead_code": 0, "rotation_trick": False, "decay": DECAY}
    if kind == "vq":
        options |= {"learnable_codebook": True, "ema_update": False, "commitment_weight": 1.0}
    else:
        options |= {"commitment_weight": BETA}
    make = peer.ResidualVQ if kind == "residual" else peer.VectorQuantize
    module = make(dim=work.dim, codebook_size=work.vocab_size, **options)
    for level in module.modules():
        if isinstance(level, peer.VectorQuantize):
            with torch.no_grad():
                level._codebook.embed.copy_(work.codebook())
                level._codebook.embed_avg.copy_(work.codebook())
    return module


def peer_quantizer(
    work: Work, kind: Kind, options: dict[str, Any], call: dict[str, Any] | None = None
) -> Callable[[], Outcome]:
    """Its training pass, on vectors in the order that it takes without copying: `(num_images, 1024, D)`."""
    module: Any = _module(work, kind, options).train().to(default_device())
    vectors = work.latents().detach().movedim(1, -1).flatten(1, -2).contiguous().requires_grad_()
    upstream = torch.ones_like(vectors)

    def run() -> Outcome:
        vectors.grad = None
        module.zero_grad()
        quantized, codes, *losses = module(vectors, **(call or {}))
        loss = losses[0].sum() if losses else None
        if work.backward:
            torch.autograd.backward([quantized, *losses], [upstream, *[None] * len(losses)])
        codebook = module._codebook.embed if kind in ("ema", "vq") else None
        return Outcome(codes, quantized, loss, codebook)

    return run


def peer_kmeans(work: Work) -> Callable[[], Outcome]:
    """Its k-means, which starts from random vectors; 10 iterations, as ours."""
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

    vectors = work.latents().detach().movedim(1, -1).reshape(1, -1, work.dim)

    def run() -> Outcome:
        kmeans(vectors, work.vocab_size, 10)
        return Outcome()

    return run
