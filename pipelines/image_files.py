"""Drawn images as files: numbered PNGs, or one parquet file that is a Hugging Face dataset of images."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.pipeline_base import DrawnBatch
from pipelines.preprocessing import to_pil


@dataclass
class ImageFiles(ABC):
    """Where every process writes its own images, a batch at a time."""

    folder: Path
    """One folder of all processes."""
    num_images: int
    """Of all processes."""
    class_names: list[str] | None
    """What the images' labels stand for; None where they have none."""

    @abstractmethod
    def write(self, batches: Iterable[DrawnBatch], process_index: int) -> None:
        """Write one process's batches, each when it is drawn."""

    @abstractmethod
    def join(self, num_processes: int) -> None:
        """Make one of what all processes wrote, on the main process."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The pictures with these indices, in ascending order, after they were joined."""


class NumberedFiles(ImageFiles):
    """00000.png, 00001.png and so on."""

    def write(self, batches: Iterable[DrawnBatch], process_index: int) -> None:
        for batch in batches:
            for index, picture in zip(batch.index.tolist(), to_pil(batch.images), strict=True):
                picture.save(self._file(index))

    def join(self, num_processes: int) -> None:
        """Nothing is left to do: numbers do not meet."""

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            with Image.open(self._file(index)) as picture:
                yield picture

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:0{max(5, len(str(self.num_images - 1)))}d}.png"


class ParquetFile(ImageFiles):
    """images.parquet: image (PNG), label (where there are any) and index, in order of index, a batch a row group."""

    def write(self, batches: Iterable[DrawnBatch], process_index: int) -> None:
        schema = self._schema()
        with pq.ParquetWriter(self._part(process_index), schema) as writer:
            for batch in batches:
                columns: dict[str, Any] = {"image": [_encoded(picture) for picture in to_pil(batch.images)]}
                if batch.labels is not None:
                    columns["label"] = batch.labels.numpy()
                columns["index"] = batch.index.numpy()
                writer.write_table(pa.table(columns, schema=schema))

    def join(self, num_processes: int) -> None:
        with pq.ParquetWriter(self._whole, self._schema()) as writer:
            for part in map(self._part, range(num_processes)):
                with pq.ParquetFile(part) as rows:
                    for group in range(rows.num_row_groups):
                        writer.write_table(rows.read_row_group(group))
                part.unlink()

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        first = 0
        with pq.ParquetFile(self._whole) as rows:
            for group in range(rows.num_row_groups):
                end = first + rows.metadata.row_group(group).num_rows
                if here := [index - first for index in indices if first <= index < end]:
                    images = rows.read_row_group(group, columns=["image"])["image"]
                    yield from (Image.open(io.BytesIO(images[row].as_py()["bytes"])) for row in here)
                first = end

    @property
    def _whole(self) -> Path:
        return self.folder / "images.parquet"

    def _part(self, process_index: int) -> Path:
        return self.folder / f"part-{process_index}.parquet"

    def _schema(self) -> pa.Schema:
        """With the features in its metadata, where datasets looks for them."""
        features: dict[str, Any] = {"image": datasets.Image()}
        if self.class_names is not None:
            features["label"] = datasets.ClassLabel(names=self.class_names)
        return datasets.Features(features | {"index": datasets.Value("int64")}).arrow_schema


def _encoded(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


FORMATS: dict[str, type[ImageFiles]] = {"png": NumberedFiles, "parquet": ParquetFile}
