"""Where images come from: digits, folders, parquet and arrow files, and Hugging Face datasets."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from configs.pretrained import is_hub_name
from configs.schema import DataConfig, SourceConfig
from configs.validation import did_you_mean
from pipelines.code_data import is_code_dataset
from pipelines.index_stream import hold_out

_IMAGE_SUFFIXES = set(Image.registered_extensions())
_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
_LABEL_NAMES = ("label", "labels", "class")


@dataclass(frozen=True)
class ImageSource:
    """Splits of rows `{image: {bytes, path}, label}`; `class_names` is None where there are no labels."""

    name: str
    splits: dict[str, datasets.Dataset]
    class_names: list[str] | None

    def split(self, name: str) -> datasets.Dataset:
        """The rows of a split, or of a part of it such as `train[:100]`."""
        base, part = _parse_split(name)
        if base not in self.splits:
            raise ValueError(f"{self.name}: {did_you_mean(base, self.splits, 'split')}")
        rows = self.splits[base]
        return rows if part is None else rows.select(range(len(rows))[part])


def _parse_split(name: str) -> tuple[str, slice | None]:
    """`train` as it is; of `train[:100]`, the split's name and the rows."""
    found = re.fullmatch(r"(.+)\[(-?\d+)?:(-?\d+)?\]", name)
    if found is None:
        return name, None
    first, end = (int(number) if number else None for number in found.groups()[1:])
    return found[1], slice(first, end)


@contextmanager
def _quiet_datasets():
    """Without progress bars, which would tear our own."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _digits() -> datasets.DatasetDict:
    """The 1,797 handwritten 8x8 digits inside scikit-learn, split 1,497 / 300 with every class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = []
    for picture in digits.images:
        file = io.BytesIO()
        Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    train, test = train_test_split(np.arange(len(rows)), test_size=300, stratify=digits.target, random_state=0)
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(d) for d in range(10)])
    )
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [rows[i] for i in index], "label": digits.target[index].tolist()}, features=features
            )
            for name, index in (("train", np.sort(train)), ("test", np.sort(test)))
        }
    )


def _load_folder(folder: Path) -> datasets.DatasetDict:
    if is_code_dataset(folder):
        raise ValueError(f"{folder} holds codes, where images were expected; give it to train_prior.py as codes=")
    if (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds a saved model, where images were expected")
    if (folder / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(str(folder))
    if (folder / "state.json").is_file():
        return datasets.DatasetDict(train=datasets.Dataset.load_from_disk(str(folder)))
    suffixes = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()}
    for suffix, kind in _TABLE_SUFFIXES.items():
        if suffix in suffixes:
            return datasets.load_dataset(kind, data_dir=str(folder))
    if suffixes & _IMAGE_SUFFIXES:
        splits = datasets.load_dataset("imagefolder", data_dir=str(folder))
        return splits.remove_columns("label") if _labels_are_split_folders(splits, folder) else splits
    found = ", ".join(sorted(suffixes)) or "nothing"
    raise ValueError(f"{folder} holds neither images nor parquet or arrow files; found: {found}")


def _labels_are_split_folders(splits: datasets.DatasetDict, folder: Path) -> bool:
    """Whether datasets took train/ and test/ for classes, as it does where images lie in them directly."""
    label = next(iter(splits.values())).features.get("label")
    if len(splits) == 1 or not isinstance(label, datasets.ClassLabel):
        return False
    used = [value for rows in splits.values() for value in rows.unique("label")]
    return len(used) == len(set(used)) and all((folder / name).is_dir() for name in label.names)


def _load(name: str, configuration: str | None) -> datasets.DatasetDict:
    if configuration is not None and not is_hub_name(name) and (name == "digits" or "/" in name):
        raise ValueError(f"data.name={configuration} is for datasets of the hub, not for data.dataset={name}")
    if name == "digits":
        return _digits()
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path)
    files = sorted(glob(str(path), recursive=True))
    if files:
        kinds = {_TABLE_SUFFIXES.get(Path(file).suffix.lower()) for file in files}
        if len(kinds) > 1 or None in kinds:
            raise ValueError(f"{name} should name parquet files or arrow files, got {', '.join(files[:4])}")
        return datasets.load_dataset(kinds.pop(), data_files={"train": files})
    looks_like_a_path = path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1 or "*" in name
    if looks_like_a_path:
        raise ValueError(f"there is no image data at {name}: no such file or folder")
    try:
        return datasets.load_dataset(name, configuration)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError, OSError) as error:
        raise ValueError(f"{name} is no file or folder here, and could not be loaded from the hub: {error}") from error


def _image_column(features: datasets.Features, wanted: str | None) -> str:
    def holds_images(feature: object) -> bool:
        encoded = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        return isinstance(feature, datasets.Image) or encoded

    if wanted is not None:
        if wanted not in features:
            raise ValueError(did_you_mean(wanted, features, "data.image_column"))
        kind = getattr(features[wanted], "dtype", None)
        if not holds_images(features[wanted]) and kind not in ("binary", "large_binary", "string", "large_string"):
            raise ValueError(
                f"data.image_column={wanted} holds no images, but {kind}; choose one of {', '.join(features)}"
            )
        return wanted
    candidates = [name for name, feature in features.items() if holds_images(feature)]
    if len(candidates) != 1:
        what = f"several image columns ({', '.join(candidates)})" if candidates else "no image column"
        raise ValueError(f"the data has {what}; give data.image_column=, one of {', '.join(features)}")
    return candidates[0]


def _label_column(features: datasets.Features, wanted: str | None) -> str | None:
    def holds_labels(feature: object) -> bool:
        plain = isinstance(feature, datasets.Value) and ("int" in feature.dtype or "string" in feature.dtype)
        return isinstance(feature, datasets.ClassLabel) or plain

    if wanted is not None:
        if wanted not in features:
            raise ValueError(did_you_mean(wanted, features, "data.label_column"))
        if not holds_labels(features[wanted]):
            raise ValueError(f"data.label_column={wanted} should hold integers or texts, got {features[wanted]}")
        return wanted
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(named) == 1:
        return named[0]
    return next((name for name in _LABEL_NAMES if name in features and holds_labels(features[name])), None)


def _encode_labels(splits: datasets.DatasetDict, column: str) -> tuple[datasets.DatasetDict, list[str]]:
    """Labels as integers with names: named classes as they are, integers and texts by their sorted values."""
    feature = next(iter(splits.values())).features[column]
    if isinstance(feature, datasets.ClassLabel):
        return splits, list(feature.names)
    values = set().union(*(rows.unique(column) for rows in splits.values()))
    if all(isinstance(v, int) for v in values):
        if min(values) < 0:
            raise ValueError(f"data.label_column={column} holds {min(values)}; classes are numbered from 0")
        return splits, [str(v) for v in range(max(values) + 1)]
    if all(isinstance(v, str) for v in values):
        names = sorted(values)
        features = datasets.ClassLabel(names=names)
        return splits.cast_column(column, features), names
    raise ValueError(f"data.label_column={column} should hold integers or texts, got {sorted(map(str, values))[:5]}")


def load_source(config: SourceConfig) -> ImageSource:
    """The splits of an image dataset.

    Raises:
        ValueError: where there is no such dataset or column, with the existing ones.
    """
    with _quiet_datasets():
        splits = _load(config.dataset, config.name)
        if isinstance(splits, datasets.Dataset):
            splits = datasets.DatasetDict(train=splits)
        features = next(iter(splits.values())).features
        image_column = _image_column(features, config.image_column)
        label_column = _label_column(features, config.label_column)
        columns = {image_column: "image"}
        class_names = None
        if label_column is not None:
            splits, class_names = _encode_labels(splits, label_column)
            columns[label_column] = "label"
        splits = splits.select_columns(list(columns))
        splits = splits.rename_columns({old: new for old, new in columns.items() if old != new})
        try:
            splits = splits.cast_column("image", datasets.Image(decode=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"data.image_column={image_column} holds no images: {error}") from error
    return ImageSource(config.dataset, {str(name): rows for name, rows in splits.items()}, class_names)


def training_splits(config: DataConfig, seed: int) -> tuple[ImageSource, datasets.Dataset, datasets.Dataset | None]:
    """The source, its training rows and its validation rows, None where there are none."""
    source = load_source(config)
    train = source.split(config.split)
    choice = config.validation
    if choice is None:
        trained = _parse_split(config.split)[0]
        others = [n for n in ("validation", "valid", "val", "test") if n in source.splits and n != trained]
        return source, train, source.splits[others[0]] if others else None
    if isinstance(choice, float):
        if choice == 0:
            return source, train, None
        kept, held_out = hold_out(len(train), choice, seed)
        return source, train.select(kept), train.select(held_out)
    if _parse_split(choice)[0] in source.splits:
        return source, train, source.split(choice)
    if Path(choice).exists() or glob(choice) or "/" in choice:
        other = load_source(SourceConfig(choice, None, config.image_column, config.label_column))
        if other.class_names != source.class_names:
            raise ValueError(f"data.validation={choice} has other classes than {config.dataset}")
        preferred = [name for name in ("validation", "test") if name in other.splits]
        return source, train, other.splits[[*preferred, *other.splits][0]]
    return source, train, source.split(choice)


def resolve_dataset_name(name: str) -> str:
    """An absolute path for a local dataset, so that a run folder means the same from anywhere; else the name."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or "*" in name else name
