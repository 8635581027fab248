"""The code dataset: what is written is what is read, made whole or not at all, and by one tokenizer."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from configs.layout import CodeGrid, CodeLayout
from configs.loading import load_config
from configs.schema import EncodingConfig
from pipelines import encode_dataset, load_codes
from pipelines.code_data import (
    CodeInfo,
    code_dtype,
    is_code_dataset,
    load_code_info,
    load_code_tensor,
    make_split,
)
from pipelines.preprocessing import to_pixels, to_unit_range
from tokenizer import ImageTokenizer

LAYOUTS = {
    "one grid": CodeLayout.single((4, 3), 16),
    "depth": CodeLayout.single((2, 3), 1000, depth=4),
    "one dimension": CodeLayout.single((7,), 5),
    "several grids": CodeLayout((CodeGrid((1, 1), 300), CodeGrid((2, 2), 20), CodeGrid((4, 4), 300))),
}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def info_of(layout: CodeLayout, class_names: list[str] | None = None) -> CodeInfo:
    return CodeInfo(layout, "f" * 64, class_names, None, (3, 16, 16), {"dataset": "digits"})


def write_codes(folder: Path, layout: CodeLayout, codes: np.ndarray, labels: list[int] | None = None) -> None:
    """A code dataset with the split train, and the classes a and b where there are labels."""
    info = info_of(layout, None if labels is None else ["a", "b"])
    split = make_split(codes, None if labels is None else np.array(labels), info)
    datasets.DatasetDict(train=split).save_to_disk(folder)
    info.write(folder)


def encoding(tokenizer: Path, dataset: Path | str, output: Path, *overrides: str) -> EncodingConfig:
    values = [f"tokenizer={tokenizer}", f"data.dataset={dataset}", f"output_dir={output}", *overrides]
    return load_config(EncodingConfig, None, values)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of writing."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_codes_and_labels_are_read_as_they_were_written(tmp_path, layout):
    codes = np.random.default_rng(0).integers(0, layout.vocab_size, (9, layout.num_codes))
    write_codes(tmp_path / "codes", layout, codes, [0, 1, 1, 0, 0, 1, 0, 1, 0])
    found, labels = load_code_tensor(tmp_path / "codes", "train")
    assert found.shape == (9, *layout.shape)
    assert_close(found.long(), torch.from_numpy(codes).reshape(9, *layout.shape))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 0]


def test_without_classes_there_are_no_labels(tmp_path):
    write_codes(tmp_path / "codes", LAYOUTS["one grid"], np.zeros((3, 12), np.int64))
    assert load_code_tensor(tmp_path / "codes", "train")[1] is None
    assert load_code_info(tmp_path / "codes").class_names is None
    assert load_codes(tmp_path / "codes", "train").column_names == ["codes"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("class_names", [None, ["cat", "dog, brown", "Größe"]])
def test_what_stands_beside_the_codes_is_read_as_it_was_written(tmp_path, layout, class_names):
    info = info_of(layout, class_names)
    info.write(tmp_path)
    assert CodeInfo.read(tmp_path) == info


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_codes_are_stored_in_the_smallest_type_and_read_back_equal(tmp_path, vocab_size, dtype):
    assert code_dtype(vocab_size) == np.dtype(dtype)
    layout = CodeLayout.single((2, 2), vocab_size)
    codes = np.random.default_rng(0).integers(0, vocab_size, (50, 4))
    codes[0], codes[1] = 0, vocab_size - 1
    write_codes(tmp_path / "codes", layout, codes)
    assert load_codes(tmp_path / "codes", "train").features["codes"].feature.dtype == dtype
    found, _ = load_code_tensor(tmp_path / "codes", "train")
    assert_close(found.long(), torch.from_numpy(codes).view(50, 2, 2))
    index = torch.tensor([49, 0, 1])
    assert_close(found[index].long(), torch.from_numpy(codes).view(50, 2, 2)[index])


@pytest.mark.parametrize("vocab_size", [32767, 32768, 32769, 40000])
def test_codes_around_the_sign_bit_of_sixteen_bits_are_read_equal(tmp_path, vocab_size):
    layout = CodeLayout.single((3,), vocab_size)
    codes = np.arange(vocab_size - 12, vocab_size).reshape(4, 3)
    write_codes(tmp_path / "codes", layout, codes)
    assert_close(load_code_tensor(tmp_path / "codes", "train")[0].long(), torch.from_numpy(codes))


def test_a_column_of_several_chunks_is_joined_in_order(tmp_path):
    layout = LAYOUTS["one grid"]
    codes = np.random.default_rng(0).integers(0, 16, (10, 12))
    info = info_of(layout)
    split = make_split(codes, None, info)
    datasets.DatasetDict(train=split).save_to_disk(tmp_path / "codes", num_shards={"train": 3})
    info.write(tmp_path / "codes")
    assert_close(load_code_tensor(tmp_path / "codes", "train")[0].long(), torch.from_numpy(codes).view(10, 4, 3))


def test_a_stored_code_outside_the_layout_is_refused(tmp_path):
    write_codes(tmp_path / "codes", CodeLayout.single((2,), 200), np.array([[3, 150]]))
    info_of(CodeLayout.single((2,), 100)).write(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"split train holds code 150, outside \[2 of 100\]"):
        load_code_tensor(tmp_path / "codes", "train")


def test_bits_per_code_is_the_mean_of_log2_k():
    square, mixed = CodeLayout.single((8, 8), 1024), CodeLayout((CodeGrid((1,), 4), CodeGrid((3,), 16)))
    assert square.bits / square.num_codes == 10
    assert mixed.bits / mixed.num_codes == (2 + 3 * 4) / 4


def test_a_dataset_of_codes_knows_layout_classes_and_tokenizer(code_folder, tokenizer_run, image_folder):
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_run)
    info = load_code_info(code_folder)
    assert info.layout == tokenizer.code_layout == CodeLayout.single((4, 4), 16)
    assert info.fingerprint == tokenizer.fingerprint
    assert info.class_names == ["cat", "dog"]
    assert info.tokenizer == str(tokenizer_run.resolve())
    assert info.image_shape == (3, 16, 16)
    assert info.origin["dataset"] == str(image_folder.resolve())


def test_splits_stay_splits_and_labels_keep_their_names(code_folder):
    splits = load_codes(code_folder)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 12, "test": 6}
    assert splits["test"].features["label"].names == ["cat", "dog"]
    assert splits["test"]["label"][:] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("test", 3)])
def test_the_codes_are_those_of_each_image_in_source_order(code_folder, tokenizer_run, image_folder, split, count):
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_run).eval()
    codes, labels = load_code_tensor(code_folder, split)
    files = [image_folder / split / name / f"{index}.png" for name in ("cat", "dog") for index in range(count)]
    for file, found, label in zip(files, codes, labels, strict=True):
        image = to_unit_range(to_pixels(Image.open(file), tokenizer.config.preprocessing))[None]
        assert_close(found.long()[None], tokenizer.encode(image))
        assert label == ["cat", "dog"].index(file.parent.name)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_codes_do_not_depend_on_the_batch_size(code_folder, tokenizer_run, image_folder, tmp_path, batch_size):
    folder = encode_dataset(encoding(tokenizer_run, image_folder, tmp_path / "codes", f"batch_size={batch_size}"))
    for split in ("train", "test"):
        assert_close(load_code_tensor(folder, split), load_code_tensor(code_folder, split))


def test_encoding_twice_returns_at_once_and_touches_nothing(code_folder, tokenizer_run, image_folder, capsys):
    before = contents(code_folder)
    assert encode_dataset(encoding(tokenizer_run, image_folder, code_folder)) == code_folder
    assert contents(code_folder) == before
    assert "holds these codes already: 12 train, 6 test" in capsys.readouterr().out


def test_encoding_into_an_empty_folder_fills_it(tokenizer_run, image_folder, tmp_path):
    (tmp_path / "codes").mkdir()
    folder = encode_dataset(encoding(tokenizer_run, image_folder, tmp_path / "codes"))
    assert len(load_codes(folder, "train")) == 12
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["codes"]


def another_tokenizer(tokenizer_run: Path, folder: Path) -> Path:
    """The same tokenizer with one weight changed."""
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_run)
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).view(-1)[0] += 0.5
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_with_codes_of_another_tokenizer_is_refused(code_folder, tokenizer_run, image_folder, tmp_path):
    other = another_tokenizer(tokenizer_run, tmp_path / "other")
    before = contents(code_folder)
    with pytest.raises(ValueError, match=r"holds codes of another tokenizer \(.*\); choose another output_dir"):
        encode_dataset(encoding(other, image_folder, code_folder))
    assert contents(code_folder) == before


def test_a_folder_with_codes_of_another_source_is_refused_with_both_named(code_folder, tokenizer_run, image_folder):
    before = contents(code_folder)
    with pytest.raises(ValueError, match="choose another output_dir") as error:
        encode_dataset(encoding(tokenizer_run, "digits", code_folder))
    assert f"dataset: {str(image_folder)!r} there, 'digits' now" in str(error.value)
    assert contents(code_folder) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tokenizer_run, image_folder, tmp_path, name):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"is not empty and holds no codes \({name}\); choose another output_dir"):
        encode_dataset(encoding(tokenizer_run, image_folder, tmp_path / "codes"))
    assert [p.name for p in (tmp_path / "codes").iterdir()] == [name]


def test_a_file_where_the_folder_should_stand_is_refused(tokenizer_run, image_folder, tmp_path):
    (tmp_path / "codes").write_text("mine")
    with pytest.raises(ValueError, match="codes is a file; choose another output_dir"):
        encode_dataset(encoding(tokenizer_run, image_folder, tmp_path / "codes"))
    assert (tmp_path / "codes").read_text() == "mine"


def test_an_interrupted_encoding_leaves_nothing_that_looks_whole_and_can_be_repeated(
    code_folder, tokenizer_run, image_folder, tmp_path
):
    images, output = tmp_path / "images", tmp_path / "runs" / "codes"
    shutil.copytree(image_folder, images)
    broken = images / "test" / "dog" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cannot read image .*2\.png"):
        encode_dataset(encoding(tokenizer_run, images, output))
    assert not output.exists()
    assert not any(is_code_dataset(folder) for folder in output.parent.iterdir())
    broken.write_bytes(whole)
    encode_dataset(encoding(tokenizer_run, images, output))
    assert [p.name for p in output.parent.iterdir()] == ["codes"]
    for split in ("train", "test"):
        assert_close(load_code_tensor(output, split), load_code_tensor(code_folder, split))


def test_skipped_broken_images_leave_no_gap(code_folder, tokenizer_run, image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "train" / "cat" / "4.png").write_bytes(b"no image")
    folder = encode_dataset(encoding(tokenizer_run, images, tmp_path / "codes", "data.skip_broken=true"))
    assert "train: skipped 1 broken images" in capsys.readouterr().out
    kept = [row for row in range(12) if row != 4]
    codes, labels = load_code_tensor(code_folder, "train")
    assert_close(load_code_tensor(folder, "train"), (codes[kept], labels[kept]))
    assert_close(load_code_tensor(folder, "test"), load_code_tensor(code_folder, "test"))


def test_images_without_classes_give_codes_without_labels(tokenizer_run, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "png")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}] * 3})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    folder = encode_dataset(encoding(tokenizer_run, tmp_path / "x.parquet", tmp_path / "codes"))
    codes, labels = load_code_tensor(folder, "train")
    assert codes.shape == (3, 4, 4)
    assert labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format": 1, "layo', "is damaged: .*encode the dataset again"),
        (b'{"format": 1}', "is damaged: .*layout.*encode the dataset again"),
        (b"[]", "is damaged: .*encode the dataset again"),
        (b"\xff\xfe\x00", "is damaged: .*encode the dataset again"),
        (b"", "is damaged: .*encode the dataset again"),
        (b'{"format": 2}', "has format 2, this version reads 1"),
    ],
)
def test_a_damaged_description_is_refused_with_its_file(code_folder, tmp_path, text, message):
    shutil.copytree(code_folder, tmp_path / "codes")
    (tmp_path / "codes" / "codes.json").write_bytes(text)
    for load in (load_codes, load_code_info):
        with pytest.raises(ValueError, match=rf"codes/codes\.json {message}"):
            load(tmp_path / "codes")


def test_a_damaged_layout_is_refused_with_its_file(code_folder, tmp_path):
    shutil.copytree(code_folder, tmp_path / "codes")
    file = tmp_path / "codes" / "codes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": [{"shape": [4, 4]}]}))
    with pytest.raises(ValueError, match=r"codes/codes\.json is damaged: .*a code layout is a list of"):
        load_code_info(tmp_path / "codes")


@pytest.mark.parametrize("lost", ["dataset_dict.json", "train", "train/state.json"])
def test_codes_without_their_rows_are_refused(code_folder, tmp_path, lost):
    shutil.copytree(code_folder, tmp_path / "codes")
    place = tmp_path / "codes" / lost
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(ValueError, match=r"codes is damaged: .*encode the dataset again"):
        load_codes(tmp_path / "codes")


def test_a_missing_split_is_named_with_the_existing_ones(code_folder):
    for load in (load_codes, load_code_tensor):
        with pytest.raises(ValueError, match=r"unknown split 'tests'; did you mean 'test'\? choose one of test, train"):
            load(code_folder, "tests")


def test_a_tokenizer_folder_where_codes_belong_is_refused_by_name(tokenizer_run):
    with pytest.raises(ValueError, match="holds no codes") as error:
        load_codes(tokenizer_run)
    message = str(error.value)
    assert message.startswith(str(tokenizer_run))
    assert "config.json" in message
    assert "scripts/encode_dataset.py" in message


def test_a_folder_that_does_not_exist_is_said_not_to(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no codes .*found: no such folder.*encode_dataset"):
        load_codes(tmp_path / "nowhere")
