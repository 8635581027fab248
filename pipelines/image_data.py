"""Datasets of pictures, and batches of their pixels `(B, C, H, W)`."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image, ImageColor
from torch import Tensor
from tqdm import tqdm

from configs.random_streams import mix, uniform
from configs.schema import DataConfig, ImagePreprocessing, SourceConfig
from pipelines.preprocessing import to_pixels, to_unit_range

_AUGMENTATION = -2
"""The stream of an image's crop and flip, apart from what models draw from the same seeds."""


@dataclass
class ImageBatch:
    """Images and what belongs to them."""

    images: Tensor
    """`(B, C, H, W)`: uint8 as loaded, float32 in [-1, 1] after `to_device`."""
    labels: Tensor
    """`(B,)` int64; -1 where the source has none."""
    seeds: Tensor
    """`(B,)` int64: the key of everything random about each image in this step."""

    def pin_memory(self) -> ImageBatch:
        """In page-locked memory, from where a GPU copies by itself; torch's loader calls it."""
        return ImageBatch(self.images.pin_memory(), self.labels.pin_memory(), self.seeds.pin_memory())

    def to_device(self, device: torch.device) -> ImageBatch:
        """On a device, with images float32 in [-1, 1] and channels last."""
        images, labels, seeds = (t.to(device, non_blocking=True) for t in (self.images, self.labels, self.seeds))
        return ImageBatch(to_unit_range(images).contiguous(memory_format=torch.channels_last), labels, seeds)


class ImageDataset(torch.utils.data.Dataset):
    """Rows of an image source as batches of pixels; items are (row, position in the stream of training items).

    Args:
        rows: rows `{image: {bytes, path}, label}`.
        preprocessing: what images become.
        num_classes: labels must be below it; None where there are none.
        augmentation: random crop and flip, keyed (seed, position); None for evaluation.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: ImagePreprocessing,
        *,
        num_classes: int | None,
        augmentation: DataConfig | None = None,
        seed: int = 0,
    ) -> None:
        try:
            ImageColor.getrgb(preprocessing.background)
        except ValueError as error:
            name = preprocessing.background
            raise ValueError(f"background={name!r} is no colour; give a name such as white, or #rrggbb") from error
        self.rows = rows
        self.preprocessing = preprocessing
        self.random_crop = augmentation is not None and augmentation.crop == "random"
        self.flip = augmentation is not None and augmentation.flip
        self.seed = seed
        self.pixels: Tensor | None = None
        self.num_skipped = 0
        if len(rows) == 0:
            raise ValueError("the split holds no images")
        labels = rows.select_columns(["label"])[:]["label"] if num_classes is not None else [-1] * len(rows)
        self.labels = torch.tensor([-1 if label is None else label for label in labels], dtype=torch.int64)
        # A split whose labels are all withheld, as test sets on the hub often are, is one without labels.
        self.labelled = bool((self.labels >= 0).any())
        outside = (self.labels < 0) | (self.labels >= (num_classes or 0))
        if self.labelled and bool(outside.any()):
            wrong = int(outside.nonzero()[0])
            raise ValueError(f"row {wrong} has label {int(self.labels[wrong])}, outside the {num_classes} classes")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Memory that all decoded images take."""
        height, width = self.preprocessing.size
        return len(self) * self.preprocessing.in_channels * height * width

    def _decode(self, row: int, image: dict[str, Any] | None, crop_at: tuple[float, float]) -> Tensor | ValueError:
        image = image or {"bytes": None, "path": None}
        try:
            file = image["path"] if image["path"] and not image["bytes"] else io.BytesIO(image["bytes"])
            with Image.open(file) as picture:
                return to_pixels(picture, self.preprocessing, crop_at)
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            name = image["path"] or f"row {row}"
            return ValueError(f"cannot read image {name}: {error}; repair it, or give data.skip_broken=true")

    def decode_rows(self, rows: Sequence[int], crops: Sequence[tuple[float, float]]) -> list[Tensor | ValueError]:
        """The pixels of each row, or the error that its file gave."""
        images = self.rows[list(rows)]["image"]
        return [self._decode(r, image, at) for r, image, at in zip(rows, images, crops, strict=True)]

    def digest(self) -> str:
        """SHA-256 of all labels and of 256 image files spread over all of them, to notice that the images changed."""
        found = hashlib.sha256(self.labels.numpy().data)
        for image in self.rows[torch.linspace(0, len(self) - 1, min(len(self), 256)).long().tolist()]["image"]:
            data = image["bytes"] or b""
            if not data and image["path"] and Path(image["path"]).is_file():  # decoding names a file that is missing
                data = Path(image["path"]).read_bytes()
            found.update(hashlib.sha256(data).digest())
        return found.hexdigest()

    def __getitems__(self, items: list[tuple[int, int]]) -> ImageBatch | ValueError:
        rows = torch.tensor([row for row, _ in items])
        seeds = mix(self.seed, torch.tensor([position for _, position in items]))
        draws = mix(seeds, _AUGMENTATION)
        if self.pixels is not None:
            images = self.pixels[rows]
        else:
            crops = [(0.5, 0.5)] * len(items)
            if self.random_crop:
                crops = list(zip(uniform(draws, 0).tolist(), uniform(draws, 1).tolist(), strict=True))
            decoded = self.decode_rows(rows.tolist(), crops)
            for image in decoded:
                if isinstance(image, ValueError):
                    return image  # a loader process would bury it in a traceback: image_batches raises it
            images = torch.stack(decoded)  # type: ignore[arg-type]
        if self.flip:
            mirrored = (uniform(draws, 2) < 0.5).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(3), images)
        return ImageBatch(images, self.labels[rows], seeds)


class _CheckedRows(torch.utils.data.Dataset):
    """Rows decoded one block at a time, errors included, for a single pass over everything."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: list[int]) -> list[Tensor | ValueError]:
        return self.dataset.decode_rows(rows, [(0.5, 0.5)] * len(rows))


def _loader(dataset: Any, batches: Iterable, num_workers: int, *, pin: bool = False) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin,
        generator=torch.Generator(),  # a loader draws a seed when it starts: not from the one that a run resumes
        prefetch_factor=4 if num_workers else None,
    )


def _identity(batch: Any) -> Any:
    return batch


def default_num_workers(config: SourceConfig) -> int:
    """Decoding processes: as configured, else one less than the cores, at most 8."""
    return config.num_workers if config.num_workers is not None else min(8, max(0, (os.cpu_count() or 1) - 1))


def prepare_dataset(dataset: ImageDataset, config: SourceConfig, *, cache_mib: int, show: bool = False) -> ImageDataset:
    """Decode everything once where that is asked for: to keep it in memory, or to find broken files.

    Raises:
        ValueError: for the first broken image, unless `data.skip_broken`; then they are dropped and counted.
    """
    keep = not dataset.random_crop and dataset.num_bytes <= cache_mib * 2**20
    if not keep and not config.skip_broken:
        return dataset
    num_workers = default_num_workers(config) if len(dataset) >= 2000 else 0
    blocks = [list(range(start, min(start + 256, len(dataset)))) for start in range(0, len(dataset), 256)]
    pixels: list[Tensor] = []
    whole: list[int] = []
    progress = tqdm(total=len(dataset), desc="decoding images", unit="img", disable=None if show else True, leave=False)
    for rows, decoded in zip(blocks, _loader(_CheckedRows(dataset), blocks, num_workers), strict=True):
        for row, image in zip(rows, decoded, strict=True):
            if isinstance(image, Tensor):
                whole.append(row)
            elif not config.skip_broken:
                raise image
        images = [image for image in decoded if isinstance(image, Tensor)]
        if keep and images:
            pixels.append(torch.stack(images))
        progress.update(len(rows))
    progress.close()
    if not whole:
        raise ValueError("none of the images can be read")
    dataset.num_skipped = len(dataset) - len(whole)
    if dataset.num_skipped:
        dataset.rows = dataset.rows.select(whole)
        dataset.labels = dataset.labels[whole]
    dataset.pixels = torch.cat(pixels) if keep else None
    return dataset


def image_batches(
    dataset: ImageDataset, batches: Iterable[list[tuple[int, int]]], device: torch.device, num_workers: int
) -> Iterator[ImageBatch]:
    """Batches on a device, float32 in [-1, 1], channels last.

    Raises:
        ValueError: when a broken image is reached.
    """
    num_workers = num_workers if dataset.pixels is None else 0
    for batch in _loader(dataset, batches, num_workers, pin=device.type == "cuda"):
        if isinstance(batch, ValueError):
            raise batch
        yield batch.to_device(device)


def in_order(num_items: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Every item once, in order, as (item, position) batches; the last may be smaller."""
    items = [(i, i) for i in range(num_items)]
    return [items[start : start + batch_size] for start in range(0, num_items, batch_size)]
