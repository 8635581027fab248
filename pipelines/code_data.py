"""The code dataset: a Hugging Face dataset of codes with the layout and the tokenizer's fingerprint beside it.

A folder holds `codes.json` (`CodeInfo`) and what `DatasetDict.save_to_disk` writes: per split the column `codes`, a
flat fixed-size list of `layout.num_codes` numbers in the smallest unsigned type, and `label` where there are classes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from configs.layout import CodeLayout
from configs.pretrained import is_hub_name
from configs.validation import did_you_mean

INFO_FILE = "codes.json"
FORMAT = 1


@dataclass(frozen=True)
class CodeInfo:
    """What stands beside the codes."""

    layout: CodeLayout
    fingerprint: str
    """Of the tokenizer that made the codes."""
    class_names: list[str] | None
    """None where there are no labels."""
    tokenizer: str | None
    """Where that tokenizer was: a path or hub name."""
    image_shape: tuple[int, int, int]
    """(channels, height, width) of the images that were encoded."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The configuration that made them."""

    def write(self, folder: Path) -> None:
        values = {
            "format": FORMAT,
            "layout": self.layout.to_list(),
            "fingerprint": self.fingerprint,
            "class_names": self.class_names,
            "tokenizer": self.tokenizer,
            "image_shape": list(self.image_shape),
            "origin": self.origin,
        }
        (folder / INFO_FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> CodeInfo:
        """The description of a code dataset.

        Raises:
            ValueError: where the folder holds none, or one of another format.
        """
        file = folder / INFO_FILE
        if not file.is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
            raise ValueError(
                f"{folder} holds no codes ({INFO_FILE} is missing; found: {found or 'nothing'}); "
                "make some with scripts/encode_dataset.py"
            )
        try:
            values = json.loads(file.read_text())
            if values["format"] == FORMAT:
                return cls(
                    CodeLayout.from_list(values["layout"]),
                    values["fingerprint"],
                    values["class_names"],
                    values["tokenizer"],
                    tuple(values["image_shape"]),
                    values["origin"],
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error!r}; encode the dataset again") from error
        raise ValueError(f"{file} has format {values['format']}, this version reads {FORMAT}")


def is_code_dataset(folder: str | Path) -> bool:
    return (Path(folder) / INFO_FILE).is_file()


def code_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds codes in [0, vocab_size)."""
    return np.min_scalar_type(vocab_size - 1)


def make_split(codes: np.ndarray, labels: np.ndarray | None, info: CodeInfo) -> datasets.Dataset:
    """Codes `(N, num_codes)` and labels `(N,)` as one split."""
    dtype = code_dtype(info.layout.vocab_size)
    features: dict[str, Any] = {"codes": datasets.List(datasets.Value(str(dtype)), length=info.layout.num_codes)}
    flat = pa.array(np.ascontiguousarray(codes, dtype=dtype).reshape(-1))
    columns: dict[str, Any] = {"codes": pa.FixedSizeListArray.from_arrays(flat, info.layout.num_codes)}
    if labels is not None and info.class_names is not None:
        features["label"] = datasets.ClassLabel(names=info.class_names)
        columns["label"] = pa.array(labels, pa.int64())
    schema = datasets.Features(features)
    return datasets.Dataset(pa.table(columns, schema=schema.arrow_schema))


def _folder(path_or_hub: str | Path) -> Path:
    path = Path(path_or_hub)
    if not is_hub_name(path_or_hub):
        return path
    try:
        return Path(snapshot_download(str(path_or_hub), repo_type="dataset"))
    except (OSError, ValueError):
        return path  # CodeInfo.read says that there is nothing


@overload
def load_codes(path_or_hub: str | Path) -> datasets.DatasetDict: ...
@overload
def load_codes(path_or_hub: str | Path, split: str) -> datasets.Dataset: ...
def load_codes(path_or_hub: str | Path, split: str | None = None) -> datasets.DatasetDict | datasets.Dataset:
    """The splits of a code dataset, or one of them, memory-mapped.

    Raises:
        ValueError: where there is no code dataset or no such split; the existing ones are listed.
    """
    folder = _folder(path_or_hub)
    CodeInfo.read(folder)
    try:
        splits = datasets.DatasetDict.load_from_disk(str(folder))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: {error}; encode the dataset again") from error
    if split is None:
        return splits
    if split not in splits:
        raise ValueError(f"{path_or_hub}: {did_you_mean(split, splits, 'split')}")
    return splits[split]


def load_code_info(path_or_hub: str | Path) -> CodeInfo:
    """The layout, classes and fingerprint of a code dataset."""
    return CodeInfo.read(_folder(path_or_hub))


def load_code_tensor(path_or_hub: str | Path, split: str) -> tuple[Tensor, Tensor | None]:
    """Codes `(N, *layout.shape)` in the stored type and labels `(N,)` int64 (None without classes) of a split.

    The codes share memory with the file while it is one chunk, so that a large dataset is paged in as it is used.

    Raises:
        ValueError: where the split does not exist, or the stored codes do not fit the layout.
    """
    info = load_code_info(path_or_hub)
    rows = load_codes(path_or_hub, split)
    column = rows.data.column("codes")
    width = info.layout.num_codes
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    if values.size and int(values.max()) >= info.layout.vocab_size:
        raise ValueError(f"{path_or_hub} split {split} holds code {values.max()}, outside [{info.layout}]")
    # torch indexes signed types only; the bits of values below the sign bit are the same.
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[values.dtype.itemsize]
    if values.dtype.itemsize > 1 and info.layout.vocab_size > 2 ** (8 * values.dtype.itemsize - 1):
        values, signed = values.astype(np.int32), np.int32
    with_shape = values.view(signed).reshape(len(values), *info.layout.shape)
    labels = torch.tensor(rows["label"][:], dtype=torch.int64) if "label" in rows.column_names else None
    return _from_readonly(with_shape), labels


def _from_readonly(array: np.ndarray) -> Tensor:
    """A tensor over memory that is never written, without torch's warning that it could be."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def digest(codes: Tensor, labels: Tensor | None) -> str:
    """SHA-256 of codes and labels, to notice that they changed."""
    found = hashlib.sha256(codes.contiguous().numpy().data)
    if labels is not None:
        found.update(labels.numpy().data)
    return found.hexdigest()
