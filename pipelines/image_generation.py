"""The pipeline object: a prior samples codes, a tokenizer decodes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from configs.random_streams import mix
from pipelines.image_editing import ImageEditing
from pipelines.larger_grids import check_grid, sample_larger
from pipelines.pipeline_base import GenerationOutput, Labels

Classifier = Callable[[Tensor], Tensor]


class ImageGenerationPipeline(ImageEditing):
    """Samples new images, and draws parts of given ones anew.

    >>> pipeline = ImageGenerationPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> pipeline(num_images=4, labels=7, seed=0).images[0].save("seven.png")

    Args:
        tokenizer: decodes the codes.
        prior: samples them.

    Raises:
        ValueError: where the prior was trained on another layout, or on codes of another tokenizer.
    """

    @torch.no_grad()
    def __call__(
        self,
        num_images: int = 1,
        labels: Labels = None,
        *,
        batch_size: int = 64,
        seed: int | None = None,
        output_type: Literal["pil", "tensor"] = "pil",
        grid: Sequence[int] | None = None,
        best_of: int = 1,
        classifier: Classifier | None = None,
        **sampling: Any,
    ) -> GenerationOutput:
        """Sample new images.

        Args:
            num_images: how many.
            labels: one class for all images, or one for each, by number or name; None samples without a class.
            batch_size: images sampled at once; the images do not depend on it.
            seed: image i depends on (seed, i) only. None draws a seed, which the output tells.
            output_type: pictures or a tensor.
            grid: rows and columns of codes, where images are to be larger than the prior was trained on.
            best_of: draw so many of each image, and keep the one that `classifier` finds likeliest to be of its class
                (rejection sampling, Razavi et al. 2019).
            classifier: takes images `(B, C, H, W)` in [-1, 1] and returns logits `(B, num_classes)`.
            **sampling: options of the prior's `sample`: temperature, top_k, top_p, guidance_scale and so on.

        Raises:
            ValueError: for unknown classes and options out of range.
            TypeError: for options that the prior does not have.
        """
        if num_images < 1 or batch_size < 1 or best_of < 1:
            raise ValueError(
                f"num_images, batch_size and best_of should be at least 1, got {num_images}, {batch_size} and {best_of}"
            )
        numbers = self.label_numbers(labels, num_images)
        if (best_of > 1) != (classifier is not None) or (best_of > 1 and numbers is None):
            raise ValueError(
                f"best_of={best_of} chooses by what a classifier thinks of the class: give best_of=, classifier= and "
                "labels together"
            )
        larger = None if grid is None else check_grid(self.prior, grid)

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            classes = None if numbers is None else numbers[index].to(self.device)
            if larger is None:
                codes = self.prior.sample(len(index), classes, seeds=seeds, **sampling)
            else:
                codes = sample_larger(self.prior, larger, len(index), classes, seeds=seeds, **sampling)
            decode = self.tokenizer.decode if larger is None else self.tokenizer.decode_larger
            return codes.cpu(), decode(codes.to(self.tokenizer.device)).float().cpu()

        def draw_best(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            codes, images = draw(index, seeds)
            if classifier is None:
                return codes, images
            assert numbers is not None
            wanted = numbers[index][:, None]
            best = classifier(images).softmax(-1).cpu().gather(1, wanted)
            for candidate in range(1, best_of):
                others = draw(index, mix(seeds, candidate))
                score = classifier(others[1]).softmax(-1).cpu().gather(1, wanted)
                better = (score > best)[:, 0]
                codes[better], images[better] = others[0][better], others[1][better]
                best = torch.maximum(best, score)
            return codes, images

        return self.in_batches(num_images, numbers, batch_size, seed, output_type, draw_best)
