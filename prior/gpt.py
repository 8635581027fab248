"""GPT: a decoder-only transformer over codes in raster order (Radford et al. 2019; Esser et al. 2021 for images)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs.random_streams import integer, mix, uniform
from configs.validation import Share
from prior.attention import LayerCache, StaticCache
from prior.autoregressive import AutoregressivePrior
from prior.transformer_prior import TransformerPrior, TransformerPriorConfig


class GPTConfig(TransformerPriorConfig):
    """Options of the GPT prior; see `PriorConfig` for what the training adds."""

    model_type = "tessera-gpt"

    code_corruption: Share = 0.0
    """Share of the codes seen in training that are replaced by random ones (1 - pkeep in taming-transformers): the
    prior learns to go on from its own mistakes. The codes to predict stay."""


class GPT(AutoregressivePrior, TransformerPrior):
    """log p(codes) = sum over j of log p(code j | earlier codes, class).

    Slot j of the sequence predicts code j: its input is the embedding of code j - 1 (a learned start for j = 0) plus
    those of its own position and of the class, and its rotary position is that of code j.
    """

    config_class = GPTConfig
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self._compiled_step: Callable[..., Tensor] | None = None
        self.start = nn.Parameter(nn.init.normal_(torch.empty(config.width), std=0.02))
        self.post_init()

    def logits(self, codes: Tensor, labels: Tensor | None = None, *, condition: Tensor | None = None) -> Tensor:
        flat = self.check_codes(codes)
        self.check_condition(condition, len(flat))
        labels = self.check_labels(labels, len(flat))
        offsets, rotary = self.tables()
        earlier = self.code_embedding(flat[:, :-1] + offsets[:-1])
        x = torch.cat([self.start.expand(len(flat), 1, -1), earlier], dim=1)  # (B, L, width)
        hidden = self.transformer(self.dropout(x + self.places(labels)), rotary, causal=True)
        return self.hide_foreign_codes(self.head(hidden), slice(None))

    def seen(self, codes: Tensor, seeds: Tensor | None) -> Tensor:
        rate = self.config.code_corruption
        if not self.training or rate == 0:
            return codes
        flat = codes.flatten(1)
        B, L = flat.shape
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (B,), device=codes.device)
        place = torch.arange(L, device=codes.device)
        sizes = self.vocab_sizes().to(codes.device)
        hit = uniform(mix(seeds, 1)[:, None], place) < rate
        replaced = integer(mix(seeds, 2)[:, None], place, sizes)
        return torch.where(hit, replaced, flat).view_as(codes)

    def code_by_code(self, labels: Tensor, condition: Tensor | None, compiled: bool) -> CachedSteps:
        if compiled and self._compiled_step is None:
            self._compiled_step = torch.compile(self._step, dynamic=False, fullgraph=True)
        return CachedSteps(self, labels, self._compiled_step if compiled else None)

    def _step(self, codes: Tensor, place: Tensor, places: Tensor, cache: list[LayerCache]) -> Tensor:
        """Logits `(rows, K)` of the code at `place` `(1,)` int64, given the one before it, `(rows, 1)`."""
        offsets, rotary = self.tables()
        x = self.code_embedding(codes + offsets[place - 1]) + places[:, place]
        visible = (torch.arange(places.shape[1], device=codes.device) <= place).view(1, 1, 1, -1)
        static = [StaticCache(layer, place, visible) for layer in cache]
        return self.head(self.transformer(x, rotary[place], cache=static)[:, 0]).float()


class CachedSteps:
    """Slot after slot through the transformer, whose keys and values are kept.

    Args:
        prior: what is sampled.
        labels: `(rows,)` int64.
        compiled: a compiled `GPT._step`, for all slots after those of the first call.
    """

    def __init__(self, prior: GPT, labels: Tensor, compiled: Callable[..., Tensor] | None = None) -> None:
        self.prior, self.compiled = prior, compiled
        self.offsets, self.rotary = prior.tables()
        self.places = prior.places(labels)  # (rows, L, width)
        rows, L, _ = self.places.shape
        device = labels.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else prior.dtype
        self.cache = prior.transformer.new_cache(rows, L, dtype, labels.device)
        self.done = 0

    def next(self, codes: Tensor) -> Tensor:
        first, self.done = self.done, max(self.done, 1) + codes.shape[1]
        if first and self.compiled is not None:
            place = torch.tensor([first], device=codes.device)
            return self.compiled(codes, place, self.places, self.cache)
        read = slice(max(first - 1, 0), self.done - 1)  # the codes that the new slots read
        x = self.prior.code_embedding(codes + self.offsets[read])
        if first == 0:
            x = torch.cat([self.prior.start.expand(len(self.places), 1, -1), x], dim=1)
        here = slice(first, self.done)
        hidden = self.prior.transformer(x + self.places[:, here], self.rotary[here], causal=True, cache=self.cache)
        return self.prior.head(hidden[:, -1]).float()

    def keep(self, rows: int) -> None:
        self.places = self.places[:rows]
        for layer in self.cache:
            layer.keep(rows)
