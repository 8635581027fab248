"""GPT: a decoder-only transformer over codes in raster order (Radford et al. 2019; Esser et al. 2021 for images)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.random_streams import uniform
from configs.validation import Count, Range
from prior.base import Prior, PriorConfig, PriorOutput
from prior.sampling import draw, filter_logits, guide
from prior.transformer import Transformer, code_positions, rotary_tables


class GPTConfig(PriorConfig):
    """Options of the GPT prior; see `PriorConfig` for what the training adds."""

    model_type = "tessera-gpt"

    width: Count = 384
    """Channels of the transformer."""
    num_layers: Count = 6
    """Transformer blocks."""
    num_heads: Count = 6
    """Attention heads; width / num_heads must be a multiple of 4."""
    dropout: Annotated[float, Range(0, 0.9)] = 0.1
    """Dropout of embeddings and residual branches in training; not of attention weights, which fused kernels lack."""


class GPT(Prior):
    """log p(codes) = sum over j of log p(code j | earlier codes, class), coarse to fine, in raster order within a grid.

    Slot j of the sequence predicts code j: its input is the embedding of code j - 1 (a learned start for j = 0) plus
    those of its own position and of the class, and its rotary position is that of code j.
    """

    config_class = GPTConfig
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        layout = config.code_layout
        num_codes, K = layout.num_codes, layout.vocab_size
        self.transformer = Transformer(config.width, config.num_layers, config.num_heads, config.dropout)
        # Codes at different grids and depths mean different things: each has rows of its own in the embedding.
        self.num_tables = sum(grid.depth for grid in layout.grids)
        self.code_embedding = nn.Embedding(self.num_tables * K, config.width)
        self.position_embedding = nn.Embedding(num_codes, config.width)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, K, bias=False)
        for parameter in (self.code_embedding.weight, self.position_embedding.weight, self.class_embedding.weight):
            nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        self.post_init()

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each code, `(num_codes,)`: the first row of its embedding table, and its grid's K."""
        offsets, sizes, table = [], [], 0
        K = self.code_layout.vocab_size
        for grid in self.code_layout.grids:
            offsets.append((torch.arange(grid.depth) + table).repeat(math.prod(grid.shape)) * K)
            sizes.append(torch.full((grid.num_codes,), grid.vocab_size))
            table += grid.depth
        return torch.cat(offsets).to(device), torch.cat(sizes).to(device)

    def _hide_foreign_codes(self, logits: Tensor, sizes: Tensor) -> Tensor:
        """Logits `(B, L, K)` float32 with -inf at codes at or above their own grid's K."""
        logits = logits.float()
        if all(grid.vocab_size == logits.shape[-1] for grid in self.code_layout.grids):
            return logits
        foreign = torch.arange(logits.shape[-1], device=logits.device) >= sizes[:, None]
        return logits.masked_fill(foreign, float("-inf"))

    def logits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(B, num_codes, K)` float32 of every code given the earlier ones.

        Args:
            codes: `(B, *code_layout.shape)` int64.
            labels: `(B,)` int64 in [0, num_classes]; None is "no class".
        """
        flat = self.check_codes(codes)
        B = len(flat)
        offsets, sizes = self._tables(flat.device)
        earlier = self.code_embedding(flat[:, :-1] + offsets[:-1])
        x = torch.cat([self.start.expand(B, 1, -1), earlier], dim=1)  # (B, L, width)
        x = x + self.position_embedding.weight + self.class_embedding(self.check_labels(labels, B))[:, None]
        cos, sin = rotary_tables(code_positions(self.code_layout).to(flat.device), self.transformer.head_dim)
        hidden = self.transformer(self.dropout(x), cos, sin, causal=True)
        return self._hide_foreign_codes(self.head(hidden), sizes)

    def forward(self, codes: Tensor, labels: Tensor | None = None, *, seeds: Tensor | None = None) -> PriorOutput:
        if self.training and labels is not None and self.config.label_dropout > 0:
            drawn = torch.rand(len(labels), device=labels.device) if seeds is None else uniform(seeds, 0)
            labels = labels.masked_fill(drawn < self.config.label_dropout, self.config.num_classes)
        logits = self.logits(codes, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        return PriorOutput(loss, {"bits_per_code": loss.detach() / math.log(2)})

    def log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.logits(codes, labels)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
        return -losses.view(len(codes), -1).sum(1)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        *,
        seeds: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        self.check_sampling(labels, temperature, top_k, top_p, guidance_scale)
        if seeds is not None and seeds.shape != (batch_size,):
            raise ValueError(f"expected one seed an image, ({batch_size},), got {tuple(seeds.shape)}")
        was_training = self.training
        self.eval()
        L, device = self.code_layout.num_codes, self.device
        classes = self.check_labels(labels, batch_size)
        guided = guidance_scale != 1
        if guided:
            # One batch of twice the size: images with their class, then the same images without.
            classes = torch.cat([classes, torch.full_like(classes, self.config.num_classes)])
        if seeds is None:
            uniforms = torch.rand(batch_size, L, device=device)
        else:
            uniforms = uniform(seeds.to(device)[:, None], torch.arange(L, device=device))
        offsets, sizes = self._tables(device)
        cos, sin = rotary_tables(code_positions(self.code_layout).to(device), self.transformer.head_dim)
        where = self.position_embedding.weight + self.class_embedding(classes)[:, None]  # (B, L, width)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
        cache = self.transformer.new_cache(len(classes), L, dtype, device)
        codes = torch.empty(batch_size, L, dtype=torch.int64, device=device)
        x = self.start.expand(len(classes), -1)
        for j in range(L):
            here = slice(j, j + 1)
            hidden = self.transformer((x + where[:, j])[:, None], cos[here], sin[here], causal=True, cache=cache)
            logits = self.head(hidden).float()  # (B, 1, K)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = guide(conditional, unconditional, guidance_scale)
            # After guidance, which would take -inf from -inf.
            logits = self._hide_foreign_codes(logits, sizes[here])[:, 0]
            logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            codes[:, j] = draw(logits, uniforms[:, j])
            x = self.code_embedding(codes[:, j] + offsets[j])
            x = torch.cat([x, x]) if guided else x
        self.train(was_training)
        return codes.view(batch_size, *self.code_layout.shape)
