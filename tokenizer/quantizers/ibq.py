"""Index back-propagation quantization: a gradient to all codes (Shi et al. 2024, arXiv:2412.02692)."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from configs.validation import checked
from tokenizer.quantizers.base import QuantizerOutput
from tokenizer.quantizers.codebook import CodebookStart, Weight
from tokenizer.quantizers.entropy import index_backpropagation
from tokenizer.quantizers.gradients import attraction
from tokenizer.quantizers.search import largest_products
from tokenizer.quantizers.vq import VectorQuantizer


class IBQ(VectorQuantizer):
    """Passes gradients to the whole codebook by the softmax of its products with the latents.

    With p = softmax(z C^T) and h the one-hot of its largest entry, z_q = (h + p - sg(p)) C (Shi et al. 2024,
    equations 5 to 7). The N x K probabilities exist in blocks, which the backward pass computes again.

    The paper's are `distance: dot` and weights of 1 (commitment and double quantization), 0.25 (codebook) and 0.05
    (entropy), beside perceptual and adversarial terms; beside a mean squared error alone, those let the codebook
    collapse, so the defaults are smaller.

    Args:
        distance: dot is the paper's; euclidean subtracts |e|^2 / 2 from the products, so that the largest is the
            nearest; cosine normalises both sides.
        codebook_start: kmeans, normal or uniform. Codes far apart make the softmax decided enough to give gradients.
        commitment_weight: weight of |z - sg(e)|^2.
        codebook_weight: weight of |sg(z) - e|^2.
        double_quantization_weight: weight of |z - z_q|^2.
        entropy_weight: weight of E[H(p)] - H(E[p]).
        entropy_temperature: the products are divided by it for the entropies.
    """

    @checked
    def __init__(
        self,
        dim: int,
        *,
        distance: Literal["dot", "euclidean", "cosine"] = "euclidean",
        codebook_start: CodebookStart = "normal",
        commitment_weight: Weight = 0.05,
        codebook_weight: Weight = 0.01,
        double_quantization_weight: Weight = 0.05,
        entropy_weight: Weight = 0.01,
        **options: Any,
    ) -> None:
        if options.get("gradient", "straight_through") != "straight_through":
            raise ValueError("ibq has a gradient of its own; leave quantizer.gradient out")
        super().__init__(
            dim,
            distance="cosine" if distance == "cosine" else "euclidean",
            codebook_start=codebook_start,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            **options,
        )
        self.dot = distance == "dot"
        self.codebook_weight = codebook_weight
        self.double_quantization_weight = double_quantization_weight
        self.estimator = None

    def search(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        return largest_products(vectors, codebook) if self.dot else super().search(vectors, codebook)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Replace each vector by the code with the largest product."""
        B, _, *grid = latents.shape
        vectors, codebook = self.to_vectors(latents), self.active_codebook()
        codes, chosen = self.choose(vectors.detach(), codebook.detach())
        commitment, to_latents = attraction(vectors, codebook, codes, chosen)
        losses = {"commitment": self.commitment_weight * commitment, "codebook": self.codebook_weight * to_latents}
        quantized = chosen
        if self.training:
            offsets = codebook.new_zeros(len(codebook)) if self.dot else codebook.square().sum(1) / 2
            quantized, sample, batch = index_backpropagation(
                vectors, codebook, offsets, codes, self.entropy_temperature
            )
            losses["double_quantization"] = self.double_quantization_weight * F.mse_loss(quantized, vectors)
            losses["entropy"] = self.entropy_weight * (sample - batch)
        quantized = quantized.view(B, *grid, -1).movedim(-1, 1)
        return QuantizerOutput(quantized, codes.view(B, *grid), losses, {"quantization_error": commitment.detach()})
