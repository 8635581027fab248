"""Edits of given images: a masked part, or a random share of the codes, is drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from configs.layout import CodeLayout
from configs.random_streams import mix, uniform
from pipelines.pipeline_base import GenerationOutput, Labels, PipelineBase, as_list, check_counts, collect
from pipelines.preprocessing import to_mask

_WHERE = 1
"""The stream of an image's random numbers that says which positions a variation draws anew."""


class ImageEditing(PipelineBase):
    """A pipeline that draws parts of given images anew."""

    @torch.no_grad()
    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        masks: Image.Image | Sequence[Image.Image],
        labels: Labels = None,
        *,
        margin: int = 0,
        blend: bool = True,
        batch_size: int = 64,
        seed: int | None = None,
        output_type: Literal["pil", "tensor"] = "pil",
        **sampling: Any,
    ) -> GenerationOutput:
        """Draw the masked part of images anew: inpainting, outpainting, class-conditional editing.

        The codes of all other patches are kept. An autoregressive prior sees the codes before a gap only;
        `num_candidates=` lets it take account of those after it.

        Args:
            images: pictures of any size.
            masks: one for each image and of its size; what is neither black nor transparent is drawn anew.
            labels: classes of the new parts, as in a call.
            margin: codes around those of the mask that are drawn anew too.
            blend: put the pixels outside of the mask back; otherwise they are the tokenizer's reconstruction.
            batch_size: images at once.
            seed: image i depends on (seed, i) only.
            output_type: pictures or a tensor.
            **sampling: options of the prior's `sample`.

        Raises:
            ValueError: where masks do not fit the images, or the codes stand for no patches.
        """
        check_counts(batch_size=batch_size)
        pictures, covers = ([ImageOps.exif_transpose(p) for p in as_list(given)] for given in (images, masks))
        if [p.size for p in pictures] != [c.size for c in covers]:
            raise ValueError(
                f"every image needs a mask of its size: got {[p.size for p in pictures]} and {[c.size for c in covers]}"
            )
        numbers = self.label_numbers(labels, len(pictures))
        originals = self.preprocess(pictures)
        pixels = torch.stack([to_mask(cover, self.tokenizer.config.preprocessing) for cover in covers])
        unknown = codes_of_pixels(pixels, self.prior.code_layout, margin)

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            codes, decoded = self._redraw(originals[index], unknown[index], numbers, index, seeds, sampling)
            if blend:
                decoded = torch.where(pixels[index][:, None], decoded, originals[index].cpu())
            return codes, decoded

        return collect(self.draw_batches(len(pictures), numbers, batch_size, seed, draw), output_type)

    @torch.no_grad()
    def variations(
        self,
        image: Image.Image,
        strength: float,
        num_images: int = 4,
        labels: Labels = None,
        *,
        batch_size: int = 64,
        seed: int | None = None,
        output_type: Literal["pil", "tensor"] = "pil",
        **sampling: Any,
    ) -> GenerationOutput:
        """Draw a random share of an image's positions anew, another one for each variation.

        Args:
            image: a picture of any size.
            strength: the share, from 0 (the reconstruction) to 1 (a new image).
            num_images: how many variations.
            labels: classes of the new parts, as in a call.
            batch_size: images at once.
            seed: variation i depends on (seed, i) only.
            output_type: pictures or a tensor.
            **sampling: options of the prior's `sample`.

        Raises:
            ValueError: for a strength outside of [0, 1].
        """
        check_counts(num_images=num_images, batch_size=batch_size)
        if not isinstance(image, Image.Image):
            raise ValueError(f"expected one picture (PIL.Image.Image), got {type(image).__name__}")
        numbers = self.label_numbers(labels, num_images)
        original = self.preprocess(image)

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            unknown = random_positions(self.prior.code_layout, strength, mix(seeds, _WHERE))
            return self._redraw(original.expand(len(index), -1, -1, -1), unknown, numbers, index, seeds, sampling)

        return collect(self.draw_batches(num_images, numbers, batch_size, seed, draw), output_type)

    def _redraw(
        self,
        images: Tensor,
        unknown: Tensor,
        numbers: Tensor | None,
        index: Tensor,
        seeds: Tensor,
        sampling: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Codes and decoded images `(B, C, H, W)` with the codes of `unknown` drawn anew."""
        codes = self.prior.sample(
            len(index),
            None if numbers is None else numbers[index].to(self.device),
            seeds=seeds,
            known=self.tokenizer.encode(images).to(self.device),
            known_mask=~unknown.to(self.device),
            **sampling,
        )
        return codes.cpu(), self.tokenizer.decode(codes.to(self.tokenizer.device)).float().cpu()


def codes_of_pixels(mask: Tensor, layout: CodeLayout, margin: int = 0) -> Tensor:
    """The codes whose patches hold a masked pixel, `(B, *layout.shape)` bool, at every depth.

    They are widened by `margin` codes of the finest grid; a coarser code goes with any finer one that it covers.

    Args:
        mask: `(B, H, W)` bool, True where pixels are to change.
        layout: of the image's codes.
        margin: codes on every side.

    Raises:
        ValueError: for codes that stand for no patch of the image, and for a negative margin.
    """
    if any(len(grid.shape) != 2 for grid in layout.grids):
        raise ValueError(
            f"an edit needs codes that stand for patches of the image, but they are laid out as [{layout}]: a code of "
            "a grid that is not two-dimensional concerns the whole image"
        )
    if not isinstance(margin, int) or margin < 0:
        raise ValueError(f"margin should be 0 codes or more, got {margin}")
    finest = max((grid.shape for grid in layout.grids), key=math.prod)
    # Pooling windows overlap where pixels do not divide evenly: every code that touches a masked pixel is in.
    changed = F.adaptive_max_pool2d(mask[:, None].float(), finest)
    if margin:
        changed = F.max_pool2d(changed, 2 * margin + 1, stride=1, padding=margin)
    parts = []
    for grid in layout.grids:
        cells = F.adaptive_max_pool2d(changed, grid.shape).bool()[:, 0]
        parts.append(cells.unsqueeze(-1).expand(*cells.shape, grid.depth).flatten(1))
    return torch.cat(parts, dim=1).view(len(mask), *layout.shape)


def random_positions(layout: CodeLayout, share: float, seeds: Tensor) -> Tensor:
    """A share of each grid's positions, drawn by the images' seeds `(B,)`; `(B, *layout.shape)` bool, at every depth.

    Raises:
        ValueError: for a share outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"strength should be from 0 to 1, got {share}")
    parts = []
    for index, grid in enumerate(layout.grids):
        positions = math.prod(grid.shape)
        numbers = uniform(mix(seeds, index)[:, None], torch.arange(positions, device=seeds.device))
        drawn = numbers.argsort(dim=1).argsort(dim=1) < round(share * positions)
        parts.append(drawn.repeat_interleave(grid.depth, dim=1))
    return torch.cat(parts, dim=1).view(len(seeds), *layout.shape)
