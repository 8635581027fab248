"""How codes are drawn from a prior's logits: options that every prior has, and their values at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from configs.validation import Count, NonNegative, Range, Schema, Share


@dataclass
class SamplingOptions(Schema):
    """Logits are guided, divided by the temperature, filtered by top-k and top-p, and drawn from, in this order."""

    temperature: NonNegative | list[NonNegative] = 1.0
    """Logits are divided by it; 0 takes the likeliest code. A list runs over the steps: [1.2, 0.8] falls evenly."""
    top_k: Count | None = None
    """Keep the k likeliest codes."""
    top_p: Annotated[float, Range(1e-6, 1)] | None = None
    """Keep the fewest likeliest codes that together have this probability."""
    guidance_scale: Annotated[float, Range(0, 1000)] = 1.0
    """Classifier-free guidance; 1 is off, and costs nothing."""
    guidance_schedule: Literal["constant", "linear", "cosine", "power_cosine"] = "constant"
    """How guidance goes from 1 at the first step to its scale at the last; constant has its scale from the start."""
    guidance_power: Annotated[float, Range(0.01, 100)] = 4.0
    """Exponent of the progress in power_cosine: larger ones guide later (Gao et al. 2023)."""
    guidance_interval: list[Share] = field(default_factory=lambda: [0.0, 1.0])
    """Guide only from this share of the steps to that one; after it, sampling costs half (Kynkäänniemi et al. 2024)."""

    def validate(self) -> None:
        if isinstance(self.temperature, list) and not self.temperature:
            raise ValueError("temperature should be a number or a list of numbers, got an empty list")
        if len(self.guidance_interval) != 2 or self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval should be [first, last], got {self.guidance_interval}")

    def temperature_at(self, step: int, num_steps: int) -> float:
        """The temperature of step `step` of `num_steps`, counted from 0."""
        if not isinstance(self.temperature, list):
            return self.temperature
        place = _progress(step, num_steps) * (len(self.temperature) - 1)
        below = min(int(place), max(len(self.temperature) - 2, 0))
        above = min(below + 1, len(self.temperature) - 1)
        return self.temperature[below] + (place - below) * (self.temperature[above] - self.temperature[below])

    def guidance_at(self, step: int, num_steps: int) -> float:
        """The guidance scale of step `step` of `num_steps`; 1 outside of the interval."""
        progress = _progress(step, num_steps)
        if not self.guidance_interval[0] <= progress <= self.guidance_interval[1]:
            return 1.0
        share = {
            "constant": 1.0,
            "linear": progress,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
            "power_cosine": (1 - math.cos(math.pi * progress**self.guidance_power)) / 2,
        }[self.guidance_schedule]
        return 1 + (self.guidance_scale - 1) * share

    def guided_steps(self, num_steps: int) -> int:
        """Steps up to the last guided one: as long as this, the unconditional half is computed too."""
        guided = [step for step in range(num_steps) if self.guidance_at(step, num_steps) != 1]
        return guided[-1] + 1 if guided else 0


def _progress(step: int, num_steps: int) -> float:
    """0 at the first step, 1 at the last; an only step is the last."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0
