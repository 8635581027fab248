"""What lookup-free quantizers share: codes of one bit a channel, and their entropies without the 2^n codebook."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.validation import Range, checked
from tokenizer.quantizers.base import Quantizer
from tokenizer.quantizers.entropy import joint_entropy
from tokenizer.quantizers.projection import NUM_START_VECTORS

Weight = Annotated[float, Range(0, 100)]
Temperature = Annotated[float, Range(1e-3, 1e3)]


def bit_entropies(logits: Tensor, group_bits: int) -> tuple[Tensor, Tensor]:
    """E[H(p)] and H(E[p]) in nats for independent bits with these logits.

    The first is exact: the bits of one vector are independent. The second is exact inside each group of bits and the
    sum over groups, an upper bound of the joint entropy that is reached where groups are independent over the data.
    It is over all vectors of all processes in this micro-batch.

    Args:
        logits: `(N, n)` float32, log odds of each bit.
        group_bits: bits of a group; a group's 2^group_bits probabilities are one matrix product of halves.
    """
    ones = logits.sigmoid()
    per_bit = F.softplus(logits) - logits * ones
    num_groups = -(-logits.shape[1] // group_bits)
    groups = [
        joint_entropy([torch.stack([1 - one, one]) for one in group.unbind(1)])
        for group in ones.tensor_split(num_groups, dim=1)
    ]
    return per_bit.sum(1).mean(), torch.stack(groups).sum()


class BitQuantizer(Quantizer):
    """A code is one sign a channel; the first channel is the highest bit.

    Args:
        num_bits: n, channels of a code; the vocabulary is 2^n.
        commitment_weight: weight of |z - sg(code)|^2, a mean over elements.
        entropy_weight: weight of E[H(p)] - diversity_weight * H(E[p]), where p is a softmax over codes of
            -|z - code|^2 / entropy_temperature: sure choices, and even use of all codes.
        entropy_temperature: of that softmax.
        diversity_weight: gamma, weight of the even use.
        entropy_group_bits: bits whose joint use is measured exactly; groups are taken as independent, which bounds the
            entropy of the whole from above. 1 measures each bit for itself.
    """

    bit_values: Tensor

    @checked
    def __init__(
        self,
        dim: int,
        *,
        num_bits: Annotated[int, Range(1, 24)] = 10,
        commitment_weight: Weight = 0.01,
        entropy_weight: Weight = 0.01,
        entropy_temperature: Temperature = 1.0,
        diversity_weight: Weight = 1.0,
        entropy_group_bits: Annotated[int, Range(1, 16)] = 14,
    ) -> None:
        super().__init__(dim, 2**num_bits, num_bits)
        self.num_bits = num_bits
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.diversity_weight = diversity_weight
        self.entropy_group_bits = entropy_group_bits
        self.level_scale = 0.5
        self.signs_only = True
        self.num_start_vectors = NUM_START_VECTORS if self.code_dim != dim else 0
        self.register_buffer("bit_values", torch.tensor([1 << i for i in reversed(range(num_bits))]))

    def pack(self, signs: Tensor) -> Tensor:
        """Codes `(...)` int64 of the channels `(..., n)` that are positive."""
        return ((signs > 0) * self.bit_values).sum(-1)

    def unpack(self, codes: Tensor) -> Tensor:
        """Signs `(..., n)`, -1 or 1 float32, of codes `(...)`."""
        return ((codes.unsqueeze(-1) & self.bit_values) > 0).float() * 2 - 1

    def bit_losses(self, vectors: Tensor, chosen: Tensor, magnitude: float) -> dict[str, Tensor]:
        """Commitment and entropy terms of vectors `(N, n)` with codes at `chosen`, each channel +-magnitude."""
        losses = {"commitment": self.commitment_weight * F.mse_loss(vectors, chosen.detach())}
        if self.entropy_weight and self.training:
            # |z + m|^2 - |z - m|^2 = 4 m z: the log odds of a bit.
            logits = vectors * (4 * magnitude / self.entropy_temperature)
            sample, batch = bit_entropies(logits, self.entropy_group_bits)
            losses["entropy"] = self.entropy_weight * (sample - self.diversity_weight * batch)
        return losses

    def collapse_advice(self) -> str:
        return f"a larger quantizer.entropy_weight= (it is {self.entropy_weight}) or quantizer.diversity_weight="
