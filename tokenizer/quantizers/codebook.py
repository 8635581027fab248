"""What quantizers with a codebook share: nearest-neighbour search, the start of the codebook, what keeps it alive."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.random_streams import mix
from configs.validation import Count, CountOrZero, Range, Share, checked
from tokenizer.collectives import (
    from_first_process,
    mean_over_processes,
    num_processes,
    sum_over_processes,
    take_rows,
)
from tokenizer.quantizers.base import Quantizer, QuantizerOutput, float32_only, recomputing
from tokenizer.quantizers.entropy import assignment_entropies
from tokenizer.quantizers.gradients import GRADIENTS, Gradient, attraction
from tokenizer.quantizers.kmeans import count, distinct, kmeans, start_vectors
from tokenizer.quantizers.search import nearest_codes

_LEAST_MEAN_COUNT = 4
"""Vectors a code, on average, before disuse means anything: by chance, 2 % of codes are then not chosen."""

_REVIVE_UNTIL = 0.995

CodebookStart = Literal["kmeans", "normal", "uniform"]
Weight = Annotated[float, Range(0, 100)]
LearningRateScale = Annotated[float, Range(1e-3, 1e3)]


class CodebookQuantizer(Quantizer):
    """Replaces each latent vector by its nearest codebook vector (van den Oord et al. 2017, equations 1 and 2).

    A subclass holds `codebook`, `(K, code_dim)`, as a parameter or a buffer, and says how it learns. What a training
    pass saw waits for `update`: counts and sums add up over accumulation steps, while vectors that codes are moved
    onto come from the last micro-batch.

    Args:
        vocab_size: K, codes in the codebook.
        code_dim: channels in which codes are looked up, by a linear projection each way; by default those of the
            latents.
        distance: euclidean, or cosine between latents and codes normalised to length 1.
        gradient: straight_through, or the rotation trick (Fifty et al. 2024).
        commitment_weight: beta, how strongly latents are pulled to their code.
        final_commitment_weight: beta at the end of training, approached in a straight line; by default it stays.
        entropy_weight: weight of E[H(p)] - H(E[p]), which asks for sure choices and even use; p is a softmax over
            codes. It costs a few searches a step; 0 is off.
        entropy_temperature: of that softmax, in units of the batch's mean squared distance to the chosen code.
        codebook_start: kmeans on the first batches' latents, normal, or uniform in [-1/K, 1/K].
        revive_after: steps after which little-used codes move onto random latents, and counting starts anew; more where
            these steps hold fewer than 4 vectors a code. None move in the last 200th of training; 0 is never.
        revive_below: what is little: this share of the mean use, or less, at the end of training. The share rises to it
            from 0, which is codes that were not chosen at all.
        initial_vocab_size: codes at the start of a codebook that grows, a random latent for each new code; 0 starts
            with all.
        grow_until: share of the training by which a growing codebook has all codes.
    """

    learns_by_gradient: ClassVar[bool] = True
    codebook: Tensor
    recent_counts: Tensor
    num_active: Tensor
    bookkeeping: ClassVar[frozenset[str]] = frozenset({"recent_counts"})

    @checked
    def __init__(
        self,
        dim: int,
        *,
        vocab_size: Annotated[int, Range(2)] = 512,
        code_dim: Count | None = None,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        gradient: Gradient = "straight_through",
        commitment_weight: Weight = 0.25,
        final_commitment_weight: Weight | None = None,
        entropy_weight: Weight = 0.0,
        entropy_temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0,
        codebook_start: CodebookStart = "kmeans",
        revive_after: CountOrZero = 50,
        revive_below: Share = 0.5,
        initial_vocab_size: CountOrZero = 0,
        grow_until: Annotated[float, Range(0.01, 1)] = 0.5,
    ) -> None:
        super().__init__(dim, vocab_size, code_dim)
        if initial_vocab_size > vocab_size:
            raise ValueError(f"initial_vocab_size={initial_vocab_size} should be at most vocab_size={vocab_size}")
        self.distance = distance
        self.gradient = gradient
        if distance == "euclidean" and self.code_dim == dim:
            self.estimator = GRADIENTS[gradient]
        self.commitment_weight = self.first_commitment_weight = commitment_weight
        self.final_commitment_weight = final_commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook_start = codebook_start
        self.revive_after = revive_after
        self.revive_below = revive_below
        self.initial_vocab_size = initial_vocab_size
        self.grow_until = grow_until
        if codebook_start == "kmeans":
            self.num_start_vectors = start_vectors(initial_vocab_size or vocab_size)
        self.register_buffer("recent_counts", torch.zeros(vocab_size, dtype=torch.float32))
        if initial_vocab_size:
            self.register_buffer("num_active", torch.tensor(initial_vocab_size))
        self._revive_share: float | None = 0.0
        self._target_size = initial_vocab_size
        self._vectors: list[Tensor] = []  # of each forward pass since the last update, (N, D)
        self._counts: Tensor | None = None

    def draw_codebook(self) -> Tensor:
        """A random codebook `(K, code_dim)`, for before `initialize`."""
        codebook = torch.empty(self.vocab_size, self.code_dim, dtype=torch.float32)
        if self.codebook_start == "uniform":
            return torch.nn.init.uniform_(codebook, -1 / self.vocab_size, 1 / self.vocab_size)
        return torch.nn.init.normal_(codebook)

    @abstractmethod
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        """Put codebook rows `index` `(M,)` onto `vectors` `(M, code_dim)`, on every process the same."""

    def learn(self, counts: Tensor, key: int) -> None:
        """Move the codebook, given how many vectors chose each code over all processes, `(K,)` float32.

        Args:
            counts: `(K,)`.
            key: of what is random about this step.
        """

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors `(..., code_dim)` of codes `(...)`."""
        return self._normalised(F.embedding(codes, self.codebook))

    def active_codebook(self) -> Tensor:
        """The vectors that can be chosen, `(K or fewer, code_dim)`."""
        # A slice of everything would cost a second gradient of its size.
        return self._normalised(self.codebook[: self.active_size] if self.initial_vocab_size else self.codebook)

    @property
    def active_size(self) -> int:
        return int(self.num_active) if self.initial_vocab_size else self.vocab_size

    def _normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.distance == "cosine" else vectors

    def to_vectors(self, latents: Tensor) -> Tensor:
        """Latents `(B, D, *grid)` as the rows `(N, D)` that are compared with codes."""
        return self._normalised(latents.movedim(1, -1).flatten(0, -2))

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Replace each latent vector by its nearest codebook vector."""
        B, _, *grid = latents.shape
        vectors = self.to_vectors(latents)  # (N, D)
        codebook = self.active_codebook()  # (K, D)
        codes, chosen = self.choose(vectors.detach(), codebook.detach())
        commitment, to_latents = attraction(vectors, codebook, codes, chosen)
        # beta * |z - sg(e)|^2 and |sg(z) - e|^2 as means over elements (equation 3).
        losses = {"commitment": self.commitment_weight * commitment}
        if self.learns_by_gradient:
            losses["codebook"] = to_latents
        error = commitment.detach()
        if self.entropy_weight and self.training:
            losses["entropy"] = self.entropy_weight * self._entropy_loss(vectors, codebook, error)
        quantized = GRADIENTS[self.gradient](vectors, chosen).view(B, *grid, -1).movedim(-1, 1)
        return QuantizerOutput(quantized, codes.view(B, *grid), losses, {"quantization_error": error})

    def choose(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """The codes `(N,)` of vectors `(N, D)`, remembered in training, and the codes' vectors `(N, D)`."""
        codes = self.search(vectors, codebook)
        if self.training and not recomputing():
            self.observe(vectors, codes)
        return codes, F.embedding(codes, codebook)

    def search(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """The code `(N,)` of each of vectors `(N, D)` in a codebook `(K, D)`."""
        return nearest_codes(vectors, codebook)

    def _entropy_loss(self, vectors: Tensor, codebook: Tensor, error: Tensor) -> Tensor:
        temperature = self.entropy_temperature * self.code_dim * mean_over_processes(error)
        sample, batch = assignment_entropies(vectors, codebook, temperature.clamp(min=1e-12))
        return sample - batch

    def embed(self, codes: Tensor) -> Tensor:
        return self.lookup(codes).movedim(-1, 1)

    def observe(self, vectors: Tensor, codes: Tensor) -> None:
        """Remember what a training forward pass quantized, for `update`."""
        counts = count(codes, self.vocab_size)
        self._counts = counts if self._counts is None else self._counts.add_(counts)
        self._vectors.append(vectors)

    def start(self, latents: Tensor) -> None:
        """Cluster the latents with k-means where `codebook_start` asks for it."""
        if self.codebook_start == "kmeans":
            size = self.active_size
            centres = from_first_process(kmeans(self.to_vectors(latents), size))
            self.set_codes(torch.arange(size, device=latents.device), centres)

    def anneal(self, progress: float) -> None:
        """Set beta, what counts as little use, and the size of a codebook that grows: geometric from first to last."""
        # Not to the end: the decoder has to get to know the codes that moved. But nearly: without revival, perplexity
        # falls by 4 % in the last tenth of 10,000 steps.
        self._revive_share = self.revive_below * progress if progress < _REVIVE_UNTIL else None
        if self.final_commitment_weight is not None:
            first, last = self.first_commitment_weight, self.final_commitment_weight
            self.commitment_weight = first + (last - first) * progress
        if self.initial_vocab_size:
            share = min(1.0, progress / self.grow_until)
            growth = (self.vocab_size / self.initial_vocab_size) ** share
            self._target_size = min(self.vocab_size, round(self.initial_vocab_size * growth))

    @torch.no_grad()
    def update(self, step: int, seed: int = 0) -> None:
        if self._counts is None:
            return
        key = mix(seed, step)
        with float32_only(self._counts.device.type):
            counts = sum_over_processes(self._counts)
            self.learn(counts, key)
            self.recent_counts.add_(counts)
            # The check reads numbers back from the device: once in revive_after steps, not in every one.
            num_moved = 0
            if self.revive_after and (step + 1) % self.revive_after == 0 and self._revive_share is not None:
                num_moved = self._revive(self._revive_share, key)
            if self.initial_vocab_size and self._target_size > self.active_size:
                self._grow(key, num_moved)
        self._vectors, self._counts = [], None

    def _revive(self, share: float, key: int) -> int:
        """Move little-used codes onto latents; returns how many."""
        recent = self.recent_counts[: self.active_size]
        mean = recent.mean()
        if mean < _LEAST_MEAN_COUNT:
            return 0
        little_used = (recent <= share * mean).nonzero().squeeze(1)
        self.set_codes(little_used, distinct(self._random_latents(len(little_used), key)))
        self.recent_counts.zero_()
        return len(little_used)

    def _grow(self, key: int, num_taken: int) -> None:
        new = torch.arange(self.active_size, self._target_size, device=self.codebook.device)
        self.set_codes(new, distinct(self._random_latents(num_taken + len(new), key))[num_taken:])
        self.recent_counts[new] = self.recent_counts[: self.active_size].mean()  # they have a window to be chosen in
        self.num_active.fill_(self._target_size)

    def _num_latents(self) -> int:
        return sum(map(len, self._vectors)) * num_processes()

    def _random_latents(self, count: int, key: int) -> Tensor:
        """Latents `(count, D)` of the global batch, at different positions as far as it goes.

        Decided by the key and the index in the global batch, so that any number of processes and micro-batches takes
        the same.
        """
        total = self._num_latents()
        order = mix(torch.arange(total, device=self._vectors[0].device), key).argsort()
        return take_rows(self._vectors, order[torch.arange(count, device=order.device) % total])

    def collapse_advice(self) -> str:
        """What to try where only few codes are in use: the first flag that is off."""
        if self.codebook_start != "kmeans":
            return "quantizer.codebook_start=kmeans"
        if not self.revive_after:
            return "quantizer.revive_after=50"
        if not self.entropy_weight:
            return "quantizer.entropy_weight=0.1"
        return "a larger quantizer.entropy_weight=, or a smaller quantizer.vocab_size="
