"""Who takes part in the training cases of priors: ours, nanoGPT's network and transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import PriorTrainingConfig
from pipelines.benchmarks.harness import Run
from pipelines.benchmarks.prior_contestants import NUM_HEADS, NUM_LAYERS, VOCAB_SIZE, WIDTH, Work, llama
from pipelines.devices import default_device
from pipelines.optimization import make_optimizer


def train(work: Work) -> Run:
    """Ours: forward, backward and AdamW on one batch."""
    prior = work.prior().train()
    codes = torch.randint(0, VOCAB_SIZE, (work.batch_size, work.side, work.side), device=prior.device)
    return _descend(prior, lambda: prior(codes, work.labels()).loss, work)


class PlainBlock(nn.Module):
    """nanoGPT's block: LayerNorm, fused attention, a GELU layer of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (part.view(B, L, NUM_HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(WIDTH, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, L, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """nanoGPT's network at this size."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.codes, self.places = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Embedding(num_codes, WIDTH)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(NUM_LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCAB_SIZE, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.codes(codes) + self.places.weight)))


def train_plainly(work: Work) -> Run:
    """nanoGPT's network and step."""
    model = PlainGPT(work.num_codes).to(default_device()).train()
    codes = torch.randint(0, VOCAB_SIZE, (work.batch_size, work.num_codes + 1), device=default_device())
    return _descend(
        model, lambda: F.cross_entropy(model(codes[:, :-1]).flatten(0, 1).float(), codes[:, 1:].flatten()), work
    )


def train_llama(work: Work) -> Run:
    """transformers' Llama and its own loss."""
    model = llama(work.num_codes).train()
    codes = torch.randint(0, VOCAB_SIZE, (work.batch_size, work.num_codes), device=default_device())
    return _descend(model, lambda: model(codes, labels=codes).loss, work)


def _descend(model: nn.Module, loss: Callable[[], Tensor], work: Work) -> Run:
    optimizer = make_optimizer(PriorTrainingConfig(), model)

    def run() -> Tensor:
        with torch.autocast(default_device().type, torch.bfloat16, enabled=work.dtype == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run
