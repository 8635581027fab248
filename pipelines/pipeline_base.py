"""What every use of a pipeline needs: its two models, classes by name, pictures in and out, saving and loading."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.pretrained import local_folder
from configs.random_streams import mix
from configs.validation import did_you_mean
from pipelines.model_card import model_card
from pipelines.preprocessing import to_pil, to_pixels, to_unit_range
from pipelines.run_folder import whole_folder
from prior import Prior
from tokenizer import ImageTokenizer

INDEX_FILE = "pipeline.json"

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


@dataclass
class DrawnBatch:
    """Some of the images of a call."""

    index: Tensor
    """`(B,)` int64: which of the call's images they are."""
    labels: Tensor | None
    """`(B,)` int64; None where they were sampled without."""
    codes: Tensor
    """`(B, *code_layout.shape)` int64."""
    images: Tensor
    """`(B, C, H, W)` float32 in [-1, 1]."""
    seed: int
    """Image i is drawn again by the same seed and index."""


class PipelineBase:
    """A tokenizer and the prior of its codes.

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
        if isinstance(label, bool) or not isinstance(label, Integral | str):
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

    def label_numbers(self, labels: Labels, num_images: int) -> Tensor | None:
        """The numbers `(num_images,)` int64 of one class for all images, or of one for each; None without classes.

        Raises:
            ValueError: for unknown classes, another number of them, and none where the prior knows no "no class".
        """
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

    def draw_batches(
        self,
        num_images: int,
        numbers: Tensor | None,
        batch_size: int,
        seed: int | None,
        draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[DrawnBatch]:
        """What `draw` makes of the indices `(B,)` and seeds `(B,)` of images, a batch at a time.

        Args:
            num_images: of all parts.
            numbers: the classes of all images, `(num_images,)` int64.
            batch_size: images at once.
            seed: image i depends on (seed, i) only; None draws a seed.
            draw: gives codes and images `(B, C, H, W)`.
            part: (i, n) draws the i-th of n runs of batches, counted from 0.
        """
        if seed is not None and (not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63):
            raise ValueError(f"seed should be an integer of 64 bits, got {seed!r}")
        key = int.from_bytes(os.urandom(4)) if seed is None else seed
        batches, (i, n) = torch.arange(num_images).split(batch_size), part
        mine = batches[len(batches) * i // n : len(batches) * (i + 1) // n]

        @torch.no_grad()
        def drawn() -> Iterator[DrawnBatch]:
            shown = None if self.progress_bar else True
            with tqdm(total=sum(map(len, mine)), desc="sampling", unit="img", disable=shown) as bar:
                for index in mine:
                    codes, images = draw(index, image_seeds(key, index))
                    bar.update(len(index))
                    yield DrawnBatch(index, None if numbers is None else numbers[index], codes, images, key)

        return drawn()

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode as the tokenizer's input, `(B, C, H, W)` float32 in [-1, 1]."""
        pictures = as_list(images)
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


def collect(batches: Iterator[DrawnBatch], output_type: str) -> GenerationOutput:
    """All batches of a call as one.

    Raises:
        ValueError: for an unknown output_type, before anything is drawn.
    """
    if output_type not in ("pil", "tensor"):
        raise ValueError(f"output_type should be pil or tensor, got {output_type!r}")
    drawn = list(batches)
    pixels = torch.cat([batch.images for batch in drawn])
    labels = [batch.labels for batch in drawn if batch.labels is not None]
    return GenerationOutput(
        images=to_pil(pixels) if output_type == "pil" else pixels,
        codes=torch.cat([batch.codes for batch in drawn]),
        labels=torch.cat(labels).tolist() if labels else None,
        seed=drawn[0].seed,
    )


def as_list(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """One picture or several as a list, of at least one."""
    pictures = []
    for picture in images if isinstance(images, list | tuple) else [images]:
        if not isinstance(picture, Image.Image):
            raise ValueError(f"expected a picture (PIL.Image.Image) or a list of them, got {type(picture).__name__}")
        pictures.append(picture)
    if not pictures:
        raise ValueError("expected at least one image, got none")
    return pictures


def check_counts(**counts: int) -> None:
    """Raise a ValueError for a number of things, given by name, that is none or none at all."""
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} should be an integer of at least 1, got {count!r}")


def image_seeds(seed: int, index: Tensor) -> Tensor:
    """The keys `(B,)` int64 of images `index` under a seed: different seeds share no image."""
    return mix(torch.full_like(index, seed), index)
