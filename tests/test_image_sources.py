"""Where images come from: digits, folders, parquet and arrow files, and how they are split."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.schema import DataConfig, ImagePreprocessing, SourceConfig
from pipelines.image_data import ImageDataset
from pipelines.image_sources import ImageSource, load_source, resolve_dataset_name, training_splits


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(value: int) -> bytes:
    """A grey 8x8 PNG whose pixels all have one value."""
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "png")
    return file.getvalue()


def picture_files(folder: Path, values: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        (folder / f"{value:03d}.png").write_bytes(png(value))


def image_rows(values: list[int], **columns: list) -> datasets.Dataset:
    """A Hugging Face dataset with the column `image`, and any others."""
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(v), "path": None} for v in values], **columns})
    return rows.cast_column("image", datasets.Image())


def plain_parquet(file: Path, values: list[int], **columns: list) -> None:
    """A parquet file that no Hugging Face library wrote: images as structs, no metadata."""
    images = pa.array(
        [{"bytes": png(v), "path": None} for v in values], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": images, **columns}), file)


def load(dataset: Path | str, **options: object) -> ImageSource:
    return load_source(SourceConfig(dataset=str(dataset), **options))


def values_of(rows: datasets.Dataset) -> list[int]:
    """The grey value of each picture."""
    dataset = ImageDataset(rows, ImagePreprocessing(image_size=8, in_channels=1), num_classes=None)
    return [int(image[0, 0, 0]) for image in dataset.decode_rows(range(len(rows)), [(0.5, 0.5)] * len(rows))]


def split_values(source: ImageSource) -> dict[str, list[int]]:
    return {name: values_of(rows) for name, rows in source.splits.items()}


def test_digits_are_1497_and_300_with_ten_classes():
    source = load("digits")
    assert {name: len(rows) for name, rows in source.splits.items()} == {"train": 1497, "test": 300}
    assert source.class_names == [str(digit) for digit in range(10)]


def test_digits_are_the_same_in_every_call():
    first, second = load("digits"), load("digits")
    for name, rows in first.splits.items():
        assert rows["label"][:] == second.splits[name]["label"][:]
        assert rows["image"][:] == second.splits[name]["image"][:]


def test_digits_have_every_class_in_proportion():
    source = load("digits")
    train, test = (np.bincount(source.splits[name]["label"][:], minlength=10) for name in ("train", "test"))
    share = 300 / 1797
    assert np.abs(test - share * (train + test)).max() < 1


def test_no_digit_is_in_both_splits_more_often_than_in_the_source():
    from sklearn.datasets import load_digits

    source = load("digits")
    found = sorted(row["image"]["bytes"] for rows in source.splits.values() for row in rows)
    expected = []
    for picture in load_digits().images:
        file = io.BytesIO()
        Image.fromarray(np.round(picture * 255 / 16).astype(np.uint8)).save(file, "png")
        expected.append(file.getvalue())
    assert found == sorted(expected)


def test_a_folder_of_class_folders_gives_classes_and_one_split(tmp_path):
    picture_files(tmp_path / "set" / "dog", [1, 2])
    picture_files(tmp_path / "set" / "cat", [3])
    source = load(tmp_path / "set")
    assert source.class_names == ["cat", "dog"]
    assert split_values(source) == {"train": [3, 1, 2]}
    assert source.splits["train"]["label"][:] == [0, 1, 1]


def test_a_folder_of_splits_with_class_folders_gives_both(image_folder):
    source = load(image_folder)
    assert source.class_names == ["cat", "dog"]
    assert {name: len(rows) for name, rows in source.splits.items()} == {"train": 12, "test": 6}
    assert source.splits["test"]["label"][:] == [0, 0, 0, 1, 1, 1]


def test_a_folder_without_class_folders_has_no_labels(tmp_path):
    picture_files(tmp_path / "set", [1, 2, 3])
    source = load(tmp_path / "set")
    assert source.class_names is None
    assert split_values(source) == {"train": [1, 2, 3]}
    assert source.splits["train"].column_names == ["image"]


def test_split_folders_without_class_folders_are_splits_and_not_classes(tmp_path):
    picture_files(tmp_path / "set" / "train", [1, 2, 3])
    picture_files(tmp_path / "set" / "test", [4, 5])
    source = load(tmp_path / "set")
    assert split_values(source) == {"train": [1, 2, 3], "test": [4, 5]}
    assert source.class_names is None


def test_classes_that_differ_between_splits_stay_classes(tmp_path):
    picture_files(tmp_path / "set" / "train" / "cat", [1])
    picture_files(tmp_path / "set" / "train" / "dog", [2])
    picture_files(tmp_path / "set" / "test" / "cow", [3])
    source = load(tmp_path / "set")
    assert source.class_names == ["cat", "cow", "dog"]
    assert source.splits["test"]["label"][:] == [1]


def test_images_stay_files_until_they_are_decoded(image_folder):
    row = load(image_folder).splits["train"][0]
    assert set(row) == {"image", "label"}
    assert row["image"]["path"].endswith("train/cat/0.png")


def test_one_parquet_file_becomes_train(tmp_path):
    image_rows([1, 2, 3]).to_parquet(tmp_path / "any name.parquet")
    source = load(tmp_path / "any name.parquet")
    assert split_values(source) == {"train": [1, 2, 3]}
    assert source.class_names is None


def test_a_glob_joins_its_files_in_order_of_their_names(tmp_path):
    for name, values in (("b", [3]), ("a", [1, 2]), ("other", [9])):
        image_rows(values).to_parquet(tmp_path / f"{name}.parquet")
    assert split_values(load(tmp_path / "[ab].parquet")) == {"train": [1, 2, 3]}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_folder_of_tables_takes_its_splits_from_their_names(tmp_path, kind):
    (tmp_path / "set").mkdir()
    for name, values in (("train-00000-of-00002", [1, 2]), ("train-00001-of-00002", [3]), ("test-00000-of-00001", [4])):
        rows = image_rows(values, label=[0] * len(values))
        if kind == "parquet":
            rows.to_parquet(tmp_path / "set" / f"{name}.parquet")
        else:
            with pa.ipc.new_stream(tmp_path / "set" / f"{name}.arrow", rows.data.table.schema) as writer:
                writer.write_table(rows.data.table)
    assert split_values(load(tmp_path / "set")) == {"train": [1, 2, 3], "test": [4]}


def test_an_arrow_file_becomes_train(tmp_path):
    image_rows([1, 2], label=[0, 1]).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    source = load(file)
    assert split_values(source) == {"train": [1, 2]}
    assert source.class_names == ["0", "1"]


def test_a_saved_dataset_dict_keeps_its_splits(tmp_path):
    splits = {"train": image_rows([1, 2], label=[0, 1]), "extra": image_rows([3], label=[1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert split_values(load(tmp_path / "saved")) == {"train": [1, 2], "extra": [3]}


def test_a_saved_dataset_becomes_train(tmp_path):
    image_rows([1, 2]).save_to_disk(tmp_path / "saved")
    assert split_values(load(tmp_path / "saved")) == {"train": [1, 2]}


def test_parquet_without_metadata_is_read_too(tmp_path):
    plain_parquet(tmp_path / "x.parquet", [5, 6], label=pa.array(["b", "a"]))
    source = load(tmp_path / "x.parquet")
    assert split_values(source) == {"train": [5, 6]}
    assert source.class_names == ["a", "b"]
    assert source.splits["train"]["label"][:] == [1, 0]


def test_named_columns_are_taken(tmp_path):
    rows = image_rows([1, 2, 3], kind=["x", "z", "y"], label=[7, 7, 7]).rename_column("image", "photo")
    rows.to_parquet(tmp_path / "x.parquet")
    source = load(tmp_path / "x.parquet", image_column="photo", label_column="kind")
    assert source.splits["train"].column_names == ["image", "label"]
    assert source.class_names == ["x", "y", "z"]
    assert source.splits["train"]["label"][:] == [0, 2, 1]


def test_the_only_column_of_named_classes_is_the_label_whatever_its_name(tmp_path):
    rows = image_rows([1, 2], breed=[1, 0]).cast_column("breed", datasets.ClassLabel(names=["pug", "collie"]))
    rows.to_parquet(tmp_path / "x.parquet")
    source = load(tmp_path / "x.parquet")
    assert source.class_names == ["pug", "collie"]
    assert source.splits["train"]["label"][:] == [1, 0]


def test_integer_labels_without_names_are_named_by_their_numbers(tmp_path):
    image_rows([1, 2, 3], label=[4, 0, 2]).to_parquet(tmp_path / "x.parquet")
    source = load(tmp_path / "x.parquet")
    assert source.class_names == ["0", "1", "2", "3", "4"]
    assert source.splits["train"]["label"][:] == [4, 0, 2]


def test_text_labels_are_numbered_in_sorted_order_over_all_splits(tmp_path):
    (tmp_path / "set").mkdir()
    image_rows([1, 2], label=["plum", "fig"]).to_parquet(tmp_path / "set" / "train.parquet")
    image_rows([3], label=["apple"]).to_parquet(tmp_path / "set" / "test.parquet")
    source = load(tmp_path / "set")
    assert source.class_names == ["apple", "fig", "plum"]
    assert source.splits["train"]["label"][:] == [2, 1]
    assert source.splits["test"]["label"][:] == [0]


def test_negative_labels_without_names_are_refused(tmp_path):
    image_rows([1, 2], label=[0, -1]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"label_column=label holds -1; classes are numbered from 0"):
        load(tmp_path / "x.parquet")


def test_a_label_of_minus_one_among_named_classes_is_refused_with_its_row(tmp_path):
    rows = image_rows([1, 2, 3], label=[0, 1, -1]).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    rows.save_to_disk(tmp_path / "saved")
    source = load(tmp_path / "saved")
    with pytest.raises(ValueError, match="row 2 has label -1, outside the 2 classes"):
        ImageDataset(source.splits["train"], ImagePreprocessing(), num_classes=len(source.class_names))


@pytest.mark.parametrize("labels", [[0.5, 1.5], [[0], [1]], [{"x": 1}, {"x": 2}]])
def test_only_integers_and_texts_are_labels(tmp_path, labels):
    image_rows([1, 2], label=labels).to_parquet(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet").class_names is None
    with pytest.raises(ValueError, match=r"data\.label_column=label should hold integers or texts, got "):
        load(tmp_path / "x.parquet", label_column="label")


def test_rows_without_a_label_among_labelled_ones_are_refused(tmp_path):
    image_rows([1, 2], label=[0, None]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"data\.label_column=label should hold integers or texts, got \['0', 'None'\]"
    ):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["missing.parquet", "no/such/folder", "./missing", "missing/*.parquet"])
def test_a_missing_path_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no image data at") as error:
        load(name)
    assert name in str(error.value)
    assert "no such file or folder" in str(error.value)


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_a_missing_column_is_named_with_the_existing_ones(tmp_path, column):
    image_rows([1], kind=["a"]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"data\.{column} 'kinds'; did you mean 'kind'\? choose one of image, kind"):
        load(tmp_path / "x.parquet", **{column: "kinds"})


def test_a_missing_split_is_named_with_the_existing_ones(image_folder):
    with pytest.raises(ValueError, match=r"unknown split 'trian'; did you mean 'train'\? choose one of test, train"):
        load(image_folder).split("trian")


def test_several_image_columns_are_listed(tmp_path):
    images = [{"bytes": png(value), "path": None} for value in (3, 4)]
    both = image_rows([1, 2], mask=images).cast_column("mask", datasets.Image())
    both.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"several image columns \(image, mask\); give data\.image_column="):
        load(tmp_path / "x.parquet")
    assert split_values(load(tmp_path / "x.parquet", image_column="mask")) == {"train": [3, 4]}


def test_a_table_without_an_image_column_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no image column; give data\.image_column=, one of a, b"):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("column", ["label", "size"])
def test_a_column_of_numbers_where_images_belong_is_refused(tmp_path, column):
    image_rows([1], label=[0], size=[8]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=rf"data\.image_column={column} holds no images, but int64; choose one of image, "
    ):
        load(tmp_path / "x.parquet", image_column=column)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_encoded_files_is_an_image_column_when_named(tmp_path, kind):
    pq.write_table(pa.table({"jpg": pa.array([png(1), png(2)], kind)}), tmp_path / "x.parquet")
    assert split_values(load(tmp_path / "x.parquet", image_column="jpg")) == {"train": [1, 2]}


def test_a_column_of_paths_is_an_image_column_when_named(tmp_path):
    picture_files(tmp_path / "files", [1, 2])
    paths = [str(tmp_path / "files" / f"{value:03d}.png") for value in (2, 1)]
    pq.write_table(pa.table({"file": paths}), tmp_path / "x.parquet")
    assert split_values(load(tmp_path / "x.parquet", image_column="file")) == {"train": [2, 1]}


def test_an_image_column_called_label_is_no_label(tmp_path):
    masks = [{"bytes": png(value), "path": None} for value in (3, 4)]
    image_rows([1, 2], label=masks).cast_column("label", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    source = load(tmp_path / "x.parquet", image_column="image")
    assert source.class_names is None
    assert split_values(source) == {"train": [1, 2]}


def test_a_folder_with_nothing_usable_says_what_it_found(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="neither images nor parquet or arrow files; found: nothing"):
        load(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("x")
    (tmp_path / "set" / "data.csv").write_text("x")
    with pytest.raises(ValueError, match=r"neither images nor parquet or arrow files; found: \.csv, \.txt"):
        load(tmp_path / "set")


@pytest.mark.parametrize("name", ["x.csv", "x.png"])
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(png(3))
    with pytest.raises(ValueError, match=rf"should name parquet files or arrow files, got .*{name}"):
        load(tmp_path / name)


def test_a_code_dataset_where_images_belong_is_refused(code_folder):
    with pytest.raises(
        ValueError, match=r"holds codes, where images were expected; give it to train_prior\.py as codes="
    ):
        load(code_folder)


def test_a_saved_model_where_images_belong_is_refused(tokenizer_run):
    with pytest.raises(ValueError, match="holds a saved model, where images were expected"):
        load(tokenizer_run)


def test_a_name_that_is_neither_here_nor_on_the_hub_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="imges is no file or folder here, and could not be loaded from the hub"):
        load("imges")


def splits_of(dataset: Path | str, seed: int = 0, **options: object) -> tuple[list[int], list[int] | None]:
    """The grey values of the training and the validation pictures."""
    _, train, validation = training_splits(DataConfig(dataset=str(dataset), **options), seed)
    return values_of(train), None if validation is None else values_of(validation)


@pytest.fixture
def three_splits(tmp_path) -> Path:
    for name, values in (("train", list(range(20))), ("validation", [100, 101]), ("test", [200])):
        picture_files(tmp_path / "three" / name, values)
    return tmp_path / "three"


def test_validation_is_the_split_of_that_name_by_default(three_splits):
    assert splits_of(three_splits) == (list(range(20)), [100, 101])


def test_validation_is_the_test_split_where_there_is_no_other(tmp_path):
    picture_files(tmp_path / "set" / "train", [1, 2])
    picture_files(tmp_path / "set" / "test", [3])
    assert splits_of(tmp_path / "set") == ([1, 2], [3])


def test_validation_is_none_where_there_is_only_a_training_split(tmp_path):
    picture_files(tmp_path / "set", [1, 2])
    assert splits_of(tmp_path / "set") == ([1, 2], None)


def test_training_on_the_test_split_does_not_validate_on_it(tmp_path):
    picture_files(tmp_path / "set" / "train", [1, 2])
    picture_files(tmp_path / "set" / "test", [3])
    assert splits_of(tmp_path / "set", split="test") == ([3], None)


def test_validation_can_be_a_split(three_splits):
    assert splits_of(three_splits, validation="test") == (list(range(20)), [200])


@pytest.mark.parametrize(
    ("part", "rows"),
    [("[:3]", [0, 1, 2]), ("[17:]", [17, 18, 19]), ("[5:7]", [5, 6]), ("[-2:]", [18, 19]), ("[:]", list(range(20)))],
)
def test_rows_of_a_split_are_named_as_in_datasets(three_splits, part, rows):
    assert splits_of(three_splits, split=f"train{part}") == (rows, [100, 101])
    assert splits_of(three_splits, validation=f"train{part}") == (list(range(20)), rows)


def test_rows_of_the_test_split_are_not_validated_on_the_test_split(tmp_path):
    picture_files(tmp_path / "set" / "train", [1, 2])
    picture_files(tmp_path / "set" / "test", [3, 4])
    assert splits_of(tmp_path / "set", split="test[:1]") == ([3], None)


def test_rows_of_an_unknown_split_are_refused_by_its_name(three_splits):
    with pytest.raises(ValueError, match="unknown split 'trian'; did you mean 'train'"):
        splits_of(three_splits, split="trian[:3]")


def test_validation_can_be_off(three_splits):
    assert splits_of(three_splits, validation=0) == (list(range(20)), None)


def test_validation_can_be_a_share(three_splits):
    train, validation = splits_of(three_splits, validation=0.25)
    assert len(validation) == 5
    assert sorted(train + validation) == list(range(20))


def test_a_share_is_drawn_by_seed(three_splits):
    draws = [splits_of(three_splits, seed, validation=0.25)[1] for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_validation_can_be_another_source(three_splits, tmp_path):
    picture_files(tmp_path / "other", [50, 51])
    assert splits_of(three_splits, validation=str(tmp_path / "other")) == (list(range(20)), [50, 51])
    image_rows([60]).to_parquet(tmp_path / "x.parquet")
    assert splits_of(three_splits, validation=str(tmp_path / "x.parquet")) == (list(range(20)), [60])


def test_another_source_gives_its_own_validation_split(three_splits, tmp_path):
    picture_files(tmp_path / "other" / "train", [50])
    picture_files(tmp_path / "other" / "test", [51])
    assert splits_of(three_splits, validation=str(tmp_path / "other")) == (list(range(20)), [51])


def test_another_source_with_other_classes_is_refused(image_folder, tmp_path):
    picture_files(tmp_path / "other" / "cow", [50])
    picture_files(tmp_path / "other" / "dog", [51])
    with pytest.raises(ValueError, match="other has other classes than"):
        splits_of(image_folder, validation=str(tmp_path / "other"))


def test_an_unknown_validation_split_is_named_with_the_existing_ones(three_splits):
    with pytest.raises(
        ValueError, match=r"unknown split 'valdation'; did you mean 'validation'\? choose one of test, train"
    ):
        splits_of(three_splits, validation="valdation")


def test_an_unknown_training_split_is_named_with_the_existing_ones(three_splits):
    with pytest.raises(ValueError, match="unknown split 'full'; choose one of test, train, validation"):
        splits_of(three_splits, split="full")


def test_a_local_dataset_resolves_to_an_absolute_path_and_a_name_to_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert resolve_dataset_name("here") == str(tmp_path / "here")
    assert resolve_dataset_name("here/*.parquet") == str(tmp_path / "here" / "*.parquet")
    assert resolve_dataset_name("digits") == "digits"
