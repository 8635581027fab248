"""The pipeline object: a prior samples codes, a tokenizer decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from configs.random_streams import mix
from pipelines.image_editing import ImageEditing
from pipelines.larger_grids import check_grid, sample_larger
from pipelines.pipeline_base import DrawnBatch, GenerationOutput, Labels, check_counts, collect

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
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
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
            classifier: takes images `(B, C, H, W)` in [-1, 1] on the pipeline's device and returns logits
                `(B, num_classes)`.
            known: codes `(num_images, *code_layout.shape)` int64 to keep.
            known_mask: where they are to be kept, bool of the same shape.
            **sampling: options of the prior's `sample`: temperature, top_k, top_p, guidance_scale and so on.

        Raises:
            ValueError: for unknown classes and options out of range.
            TypeError: for options that the prior does not have.
        """
        batches = self.batches(
            num_images,
            labels,
            batch_size=batch_size,
            seed=seed,
            part=(0, 1),
            grid=grid,
            best_of=best_of,
            classifier=classifier,
            known=known,
            known_mask=known_mask,
            **sampling,
        )
        return collect(batches, output_type)

    def batches(
        self,
        num_images: int = 1,
        labels: Labels = None,
        *,
        batch_size: int = 64,
        seed: int | None = None,
        part: tuple[int, int] = (0, 1),
        grid: Sequence[int] | None = None,
        best_of: int = 1,
        classifier: Classifier | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        **sampling: Any,
    ) -> Iterator[DrawnBatch]:
        """The images of a call with the same arguments a batch at a time, each drawn when it is asked for.

        Args:
            part: (i, n) gives the i-th of n runs of batches, counted from 0, so that n processes draw what one would.

        Raises:
            ValueError: for unknown classes and counts, before anything is drawn; otherwise as a call.
        """
        check_counts(num_images=num_images, batch_size=batch_size, best_of=best_of)
        numbers = self.label_numbers(labels, num_images)
        if (best_of > 1) != (classifier is not None) or (best_of > 1 and numbers is None):
            raise ValueError(
                f"best_of={best_of} chooses by what a classifier thinks of the class: give best_of=, classifier= and "
                "labels together"
            )
        larger = None if grid is None else check_grid(self.prior, grid)
        both = {"known": known, "known_mask": known_mask}
        given = {name: codes for name, codes in both.items() if codes is not None}
        expected = (num_images, *self.prior.code_layout.shape)
        for name, codes in given.items():
            if codes.shape != expected or larger is not None:
                came = f"{tuple(codes.shape)} and grid={grid}"
                raise ValueError(f"{name} has shape {expected}, without grid=, got {came}")

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            classes = None if numbers is None else numbers[index].to(self.device)
            if larger is None:
                here = {name: codes[index.to(codes.device)] for name, codes in given.items()}
                codes = self.prior.sample(len(index), classes, seeds=seeds, **here, **sampling)
            else:
                codes = sample_larger(self.prior, larger, len(index), classes, seeds=seeds, **sampling)
            decode = self.tokenizer.decode if larger is None else self.tokenizer.decode_larger
            return codes.cpu(), decode(codes.to(self.tokenizer.device)).float().cpu()

        def draw_best(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            if classifier is None:
                return draw(index, seeds)
            assert numbers is not None
            candidates = (draw(index, mix(seeds, number) if number else seeds) for number in range(best_of))
            return self._likeliest(candidates, classifier, numbers[index])

        return self.draw_batches(num_images, numbers, batch_size, seed, draw_best, part)

    def _likeliest(
        self, candidates: Iterator[tuple[Tensor, Tensor]], classifier: Classifier, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of several draws of codes and images, each image that a classifier finds likeliest to be of its class."""
        codes, images = next(candidates)
        best = self._probability(classifier, images, classes)
        for others in candidates:
            score = self._probability(classifier, others[1], classes)
            better = score > best
            codes[better], images[better] = others[0][better], others[1][better]
            best = torch.maximum(best, score)
        return codes, images

    def _probability(self, classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
        """What a classifier thinks of images `(B, C, H, W)` being of their class, `(B,)`."""
        logits = classifier(images.to(self.device))
        expected = (len(images), self.prior.config.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the classifier should return logits, a tensor {expected}, got {came}")
        return logits.float().softmax(-1).cpu().gather(1, classes[:, None])[:, 0]
