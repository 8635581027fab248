"""The pipeline object: a prior samples codes, a tokenizer decodes them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import HfApi
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from configs.pretrained import local_folder
from configs.random_streams import mix
from configs.validation import did_you_mean
from pipelines.editing import codes_of_pixels, random_positions
from pipelines.image_data import to_mask, to_pil, to_pixels, to_unit_range
from pipelines.larger_grids import check_grid, sample_larger
from pipelines.model_card import model_card
from pipelines.run_folder import whole_folder
from prior import Prior
from tokenizer import ImageTokenizer

INDEX_FILE = "pipeline.json"

_WHERE = 1
"""The stream of an image's random numbers that says which positions a variation draws anew."""

Classifier = Callable[[Tensor], Tensor]
Labels = int | str | Sequence[int | str] | Tensor | None


@dataclass
class GenerationOutput:
    """What a call of the pipeline gives."""

    images: list[Image.Image] | Tensor
    """Pictures, or `(N, C, H, W)` float32 in [-1, 1] with output_type="tensor"."""
    codes: Tensor
    """`(N, *code_layout.shape)` int64."""
    labels: list[int] | None
    """The class of each image; None where they were sampled without."""
    seed: int
    """Image i is drawn again by the same seed and index."""


class ImageGenerationPipeline:
    """Samples new images.

    >>> pipeline = ImageGenerationPipeline.from_pretrained("runs/quickstart/pipeline")
    >>> pipeline(num_images=4, labels=7, seed=0).images[0].save("seven.png")

    Args:
        tokenizer: decodes the codes.
        prior: samples them.

    Raises:
        ValueError: where the prior was trained on another layout, or on codes of another tokenizer.
    """

    def __init__(self, tokenizer: ImageTokenizer, prior: Prior) -> None:
        prior.require_codes(tokenizer.code_layout, tokenizer.fingerprint, "the tokenizer")
        if prior.code_layout != tokenizer.code_layout:
            raise ValueError(
                f"the prior models [{prior.code_layout}] alone, of [{tokenizer.code_layout}]; a pipeline needs a prior "
                "of all grids"
            )
        self.tokenizer = tokenizer.eval()
        self.prior = prior.eval()
        self.progress_bar = True

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, by number; None for an unconditional prior."""
        return self.prior.config.class_names

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both models to a device, cast them to a floating type, or both."""
        for model in (self.tokenizer, self.prior):
            model.to(device=device, dtype=dtype)
        return self

    def label_number(self, label: int | str) -> int:
        """The number of a class given by number or name.

        Raises:
            ValueError: for a class that the prior does not have.
        """
        names, count = self.class_names or [], self.prior.config.num_classes
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"a class is given by number or name, got {label!r}")
        if count == 0:
            raise ValueError(f"this prior was trained without classes, but label {label!r} was given")
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, str) and not label.isdecimal():
            raise ValueError(did_you_mean(label, names, "class"))
        if not 0 <= int(label) < count:
            raise ValueError(f"the classes are numbered 0 to {count - 1}, got {label}")
        return int(label)

    def _label_numbers(self, labels: Labels, num_images: int) -> Tensor | None:
        if labels is None:
            if self.prior.config.num_classes and self.prior.config.label_dropout == 0:
                raise ValueError(
                    "this prior was trained without label dropout, so it samples within a class only; give labels, "
                    f"one of {', '.join((self.class_names or [])[:20])}"
                )
            return None
        if isinstance(labels, Tensor):
            labels = labels.tolist()
        each = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
        numbers = [self.label_number(label) for label in each]
        if len(numbers) == 1:
            numbers *= num_images
        if len(numbers) != num_images:
            raise ValueError(f"expected one label or num_images={num_images} of them, got {len(numbers)}")
        return torch.tensor(numbers, dtype=torch.int64)

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
        numbers = self._label_numbers(labels, num_images)
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

        return self._in_batches(num_images, numbers, batch_size, seed, output_type, draw_best)

    def _in_batches(
        self,
        num_images: int,
        numbers: Tensor | None,
        batch_size: int,
        seed: int | None,
        output_type: str,
        draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> GenerationOutput:
        """What `draw` makes of the indices `(B,)` and seeds `(B,)` of images, a batch at a time."""
        if output_type not in ("pil", "tensor"):
            raise ValueError(f"output_type should be pil or tensor, got {output_type!r}")
        seed = int.from_bytes(os.urandom(4)) if seed is None else seed
        codes, images = [], []
        with tqdm(total=num_images, desc="sampling", unit="img", disable=None if self.progress_bar else True) as bar:
            for index in torch.arange(num_images).split(batch_size):
                drawn, decoded = draw(index, image_seeds(seed, index))
                codes.append(drawn)
                images.append(decoded)
                bar.update(len(index))
        pixels = torch.cat(images)
        return GenerationOutput(
            images=to_pil(pixels) if output_type == "pil" else pixels,
            codes=torch.cat(codes),
            labels=None if numbers is None else numbers.tolist(),
            seed=seed,
        )

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
        pictures, covers = ([ImageOps.exif_transpose(p) for p in _as_list(given)] for given in (images, masks))
        if [p.size for p in pictures] != [c.size for c in covers]:
            raise ValueError(
                f"every image needs a mask of its size: got {[p.size for p in pictures]} and {[c.size for c in covers]}"
            )
        numbers = self._label_numbers(labels, len(pictures))
        originals = self.preprocess(pictures)
        pixels = torch.stack([to_mask(cover, self.tokenizer.config.preprocessing) for cover in covers])
        unknown = codes_of_pixels(pixels, self.prior.code_layout, margin)

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            codes, decoded = self._redraw(originals[index], unknown[index], numbers, index, seeds, sampling)
            if blend:
                decoded = torch.where(pixels[index][:, None], decoded, originals[index].cpu())
            return codes, decoded

        return self._in_batches(len(pictures), numbers, batch_size, seed, output_type, draw)

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
        numbers = self._label_numbers(labels, num_images)
        original = self.preprocess(image)

        def draw(index: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
            unknown = random_positions(self.prior.code_layout, strength, mix(seeds, _WHERE))
            return self._redraw(original.expand(len(index), -1, -1, -1), unknown, numbers, index, seeds, sampling)

        return self._in_batches(num_images, numbers, batch_size, seed, output_type, draw)

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

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode as the tokenizer's input, `(B, C, H, W)` float32 in [-1, 1]."""
        pictures = _as_list(images)
        pixels = torch.stack([to_pixels(picture, self.tokenizer.config.preprocessing) for picture in pictures])
        return to_unit_range(pixels).to(self.tokenizer.device)

    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Codes `(B, *code_layout.shape)` int64 of pictures of any size and mode."""
        return self.tokenizer.encode(self.preprocess(images))

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Pictures of codes `(B, *code_layout.shape)` int64."""
        return to_pil(self.tokenizer.decode(codes.to(self.tokenizer.device)))

    def reconstruct(self, images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures of any size and mode through the tokenizer and back, at its image size."""
        return self.decode(self.encode(images))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write one folder with `tokenizer/`, `prior/` and a model card; it appears when it is whole.

        Raises:
            ValueError: where the folder holds something that is no pipeline.
        """
        folder = Path(save_directory)
        replaces = (folder / INDEX_FILE).is_file()
        if folder.exists() and not replaces and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no pipeline; choose another folder")
        replaced = None
        with whole_folder(folder) as partial:
            self._write(partial)
            if replaces:
                replaced = Path(tempfile.mkdtemp(dir=folder.parent))
                os.replace(folder, replaced)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _write(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.prior.save_pretrained(folder / "prior")
        (folder / "README.md").write_text(model_card(self.tokenizer, self.prior))
        (folder / INDEX_FILE).write_text(json.dumps({"pipeline": type(self).__name__, "format": 1}) + "\n")

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the saved pipeline to the Hugging Face hub, `user/name`; returns its address."""
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch))
            return str(api.upload_folder(repo_id=name, folder_path=scratch).commit_url)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """Load a saved pipeline from a folder or the hub.

        Raises:
            ValueError: where there is none, or its parts do not belong together.
        """
        folder = local_folder(name_or_path)
        if not (folder / INDEX_FILE).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"{folder} holds no saved pipeline ({INDEX_FILE} is missing; found: {found}); "
                "put one together from a tokenizer and a prior with from_parts"
            )
        return cls.from_parts(folder / "tokenizer", folder / "prior", dtype=dtype)

    @classmethod
    def from_parts(cls, tokenizer: str | Path, prior: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """Put a pipeline together from the run folders or saved models of a tokenizer and a prior.

        Raises:
            ValueError: where one is missing, or they do not belong together.
        """
        options = {} if dtype is None else {"dtype": dtype}
        return cls(ImageTokenizer.from_pretrained(tokenizer, **options), Prior.from_pretrained(prior, **options))


def _as_list(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures:
        raise ValueError("expected at least one image, got none")
    return pictures


def image_seeds(seed: int, index: Tensor) -> Tensor:
    """The keys `(B,)` int64 of images `index` under a seed: different seeds share no image."""
    return mix(torch.full_like(index, seed), index)
