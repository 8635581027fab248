"""Pictures to pixels: every mode, size and orientation, and what is random about it."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from configs.random_streams import uniform
from configs.schema import DataConfig, ImagePreprocessing, SourceConfig
from pipelines.image_data import ImageDataset, image_batches, in_order, prepare_dataset
from pipelines.image_sources import load_source
from pipelines.index_stream import IndexStream
from pipelines.preprocessing import to_pil, to_pixels, to_uint8, to_unit_range

CPU = torch.device("cpu")


def target(size: int | list[int] = 8, in_channels: int = 3, **options: str) -> ImagePreprocessing:
    return ImagePreprocessing(image_size=size, in_channels=in_channels, **options)


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """`(height, width, channels)` uint8, without the last axis for one channel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """`(C, H, W)` uint8."""
    return torch.from_numpy(np.array(pixels)).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def through_a_file(picture: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def palette_picture() -> Image.Image:
    """Columns of the palette colours red, green and blue, 9x9."""
    picture = Image.fromarray(np.tile(np.repeat(np.arange(3, dtype=np.uint8), 3), (9, 1)), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return picture


def rows_of(pictures: list[np.ndarray]) -> datasets.Dataset:
    """Rows of PNGs with labels 0, 1, 0, 1 ..."""
    images = []
    for pixels in pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"]))
    labels = [index % 2 for index in range(len(images))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    """24 colour PNGs of 20x12 pixels."""
    return rows_of([noise(20, 12, 3, seed) for seed in range(24)])


def test_a_grey_picture_keeps_its_values_in_one_and_in_three_channels():
    pixels = noise(8, 8, 1)
    assert_close(to_pixels(Image.fromarray(pixels), target(in_channels=1)), as_tensor(pixels))
    assert_close(to_pixels(Image.fromarray(pixels), target()), as_tensor(pixels).expand(3, 8, 8))


def test_a_colour_picture_keeps_its_values_and_its_luma_is_its_grey():
    pixels = noise(8, 8, 3)
    assert_close(to_pixels(Image.fromarray(pixels), target()), as_tensor(pixels))
    luma = np.round(pixels @ np.array([0.299, 0.587, 0.114]))
    grey = to_pixels(Image.fromarray(pixels), target(in_channels=1))
    assert_close(grey.float(), as_tensor(luma.astype(np.uint8)).float(), atol=1, rtol=0)


def test_a_palette_picture_shows_its_palettes_colours():
    pixels = to_pixels(palette_picture(), target(9))
    assert pixels[:, 0, ::3].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_transparent_palette_entry_shows_the_background(kind):
    picture = through_a_file(palette_picture(), kind, transparency=1)
    assert picture.mode == "P"
    pixels = to_pixels(picture, target(9, background="#102030"))
    assert pixels[:, 0, ::3].T.tolist() == [[255, 0, 0], [16, 32, 48], [0, 0, 255]]


def test_a_palette_with_an_alpha_for_each_entry_is_laid_on_the_background():
    picture = through_a_file(palette_picture(), "png", transparency=bytes([0, 255, 0]))
    pixels = to_pixels(picture, target(9, background="black"))
    assert pixels[:, 0, ::3].T.tolist() == [[0, 0, 0], [0, 255, 0], [0, 0, 0]]


@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96))])
def test_alpha_is_laid_on_the_background(background, colour):
    pixels = noise(8, 8, 4)
    alpha = pixels[:, :, 3:].astype(np.float64) / 255
    expected = np.round(pixels[:, :, :3] * alpha + np.array(colour) * (1 - alpha)).astype(np.uint8)
    found = to_pixels(Image.fromarray(pixels, "RGBA"), target(background=background))
    assert_close(found.int(), as_tensor(expected).int(), atol=1, rtol=0)


def test_white_is_the_default_background_of_a_wholly_transparent_picture():
    pixels = noise(8, 8, 4)
    pixels[:, :, 3] = 0
    for in_channels in (1, 3):
        assert bool((to_pixels(Image.fromarray(pixels, "RGBA"), target(in_channels=in_channels)) == 255).all())


@pytest.mark.parametrize(("background", "grey"), [("white", 255), ("black", 0)])
def test_grey_with_alpha_is_laid_on_the_background(background, grey):
    pixels = noise(8, 8, 2)
    alpha = pixels[:, :, 1].astype(np.float64) / 255
    expected = np.round(pixels[:, :, 0] * alpha + grey * (1 - alpha)).astype(np.uint8)
    found = to_pixels(Image.fromarray(pixels, "LA"), target(in_channels=1, background=background))
    assert_close(found.int(), as_tensor(expected).int(), atol=1, rtol=0)


def test_a_transparent_colour_of_an_rgb_file_shows_the_background():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = (9, 8, 7)
    picture = through_a_file(Image.fromarray(pixels), "png", transparency=(9, 8, 7))
    found = to_pixels(picture, target(background="red"))
    assert found[:, 0, ::4].T.tolist() == [[0, 0, 0], [255, 0, 0]]


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("from_a_file", [False, True])
def test_sixteen_bit_greys_are_scaled_by_their_range(in_channels, from_a_file):
    values = np.array([[0, 128, 129], [257, 32896, 65535], [385, 386, 65407]], np.uint16)
    picture = Image.fromarray(values)
    if from_a_file:
        picture = through_a_file(picture, "png")
    assert picture.mode.startswith("I")
    expected = torch.tensor([[0, 0, 1], [1, 128, 255], [1, 2, 255]], dtype=torch.uint8)
    assert_close(to_pixels(picture, target(3, in_channels)), expected.expand(in_channels, 3, 3))


def test_a_sixteen_bit_picture_equals_its_eight_bit_one():
    pixels = noise(8, 8, 1)
    wide = Image.fromarray(pixels.astype(np.uint16) * 257)
    assert_close(to_pixels(wide, target()), to_pixels(Image.fromarray(pixels), target()))


@pytest.mark.parametrize("value", [-1, 65536])
def test_thirty_two_bit_pixels_beyond_sixteen_bits_are_refused_with_their_range(value):
    picture = Image.fromarray(np.array([[0, value]], np.int32))
    with pytest.raises(ValueError, match=f"from .*{value}.*; expected 8 or 16 bits a channel"):
        to_pixels(picture, target(1))


def test_a_cmyk_jpeg_shows_the_colours_of_its_rgb_twin():
    colours = np.repeat(np.array([[[255, 255, 255], [200, 30, 40], [20, 60, 220]]], np.uint8), 8, axis=1)
    picture = Image.fromarray(np.tile(colours, (24, 1, 1)))
    file = through_a_file(picture.convert("CMYK"), "jpeg", quality=100, subsampling=0)
    assert file.mode == "CMYK"
    assert_close(to_pixels(file, target(24)).float(), to_pixels(picture, target(24)).float(), atol=12, rtol=0)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_one_bit_pictures_are_black_and_white(in_channels):
    bits = noise(8, 8, 1) > 127
    found = to_pixels(through_a_file(Image.fromarray(bits), "png"), target(in_channels=in_channels))
    assert_close(found, as_tensor(bits.astype(np.uint8) * 255).expand(in_channels, 8, 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_by_its_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    stored = Image.fromarray(noise(6, 10, 3))
    upright = stored.transpose(turn[orientation]) if orientation > 1 else stored
    found = to_pixels(through_a_file(stored, "png", exif=exif), target([upright.height, upright.width]))
    assert_close(found, as_tensor(np.asarray(upright)))


def test_floating_point_pixels_are_refused():
    picture = through_a_file(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "tiff")
    assert picture.mode == "F"
    with pytest.raises(ValueError, match=r"floating-point pixels.*expected 8 or 16 bits a channel"):
        to_pixels(picture, target())


@pytest.mark.parametrize("size", [(5, 9), (9, 5), (40, 41), (7, 100), (1, 1)])
@pytest.mark.parametrize("wanted", [[8, 8], [6, 10], [11, 3]])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_any_size_becomes_the_target_size(size, wanted, in_channels):
    pixels = to_pixels(Image.fromarray(noise(*size, 3)), target(wanted, in_channels))
    assert pixels.shape == (in_channels, *wanted)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


def test_a_picture_of_the_target_size_is_unchanged():
    pixels = noise(6, 10, 3)
    for interpolation in ("nearest", "bilinear", "bicubic"):
        found = to_pixels(Image.fromarray(pixels), target([6, 10], interpolation=interpolation))
        assert_close(found, as_tensor(pixels))


def test_the_centre_is_cropped():
    wide, tall = noise(8, 14, 3), noise(20, 8, 3)
    assert_close(to_pixels(Image.fromarray(wide), target(8)), as_tensor(wide[:, 3:11]))
    assert_close(to_pixels(Image.fromarray(tall), target(8)), as_tensor(tall[6:14]))


def test_a_crop_lies_where_it_is_told():
    wide, tall = noise(8, 14, 3), noise(20, 8, 3)
    assert_close(to_pixels(Image.fromarray(wide), target(8), (0.5, 0.0)), as_tensor(wide[:, :8]))
    assert_close(to_pixels(Image.fromarray(wide), target(8), (0.5, 1.0)), as_tensor(wide[:, 6:]))
    assert_close(to_pixels(Image.fromarray(tall), target(8), (0.25, 0.5)), as_tensor(tall[3:11]))


def test_a_picture_is_resized_until_it_just_covers_the_target():
    # Halves: red left, blue right. Covering 4x4 from 8x16 leaves 4x8, whose central 4 columns hold both halves.
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8, 0] = 255
    pixels[:, 8:, 2] = 255
    found = to_pixels(Image.fromarray(pixels), target(4, interpolation="nearest"))
    assert found[0].tolist() == [[255, 255, 0, 0]] * 4
    assert found[2].tolist() == [[0, 0, 255, 255]] * 4


def test_nearest_enlarges_by_repeating_pixels():
    pixels = noise(4, 4, 3)
    found = to_pixels(Image.fromarray(pixels), target(12, interpolation="nearest"))
    assert_close(found, as_tensor(pixels.repeat(3, 0).repeat(3, 1)))


@pytest.mark.parametrize(
    ("interpolation", "filter"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("size", [7, 40])
def test_smooth_filters_equal_pillows(interpolation, filter, size):
    picture = Image.fromarray(noise(20, 20, 3))
    expected = as_tensor(np.asarray(picture.resize((size, size), filter)))
    found = to_pixels(picture, target(size, interpolation=interpolation))
    assert_close(found.int(), expected.int(), atol=1, rtol=0)


def test_an_unknown_background_colour_is_refused_before_any_image_is_read(rows):
    with pytest.raises(ValueError, match="whitish"):
        ImageDataset(rows, target(background="whitish"), num_classes=2)


def test_unit_range_and_back_is_exact_for_every_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_unit_range(pixels)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert_close(to_uint8(images), pixels, rtol=0, atol=0)


def test_values_outside_the_range_are_clamped():
    assert to_uint8(torch.tensor([-1.5, -1.001, 1.001, 7.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("in_channels", [1, 3])
def test_pictures_of_images_hold_their_pixels(in_channels):
    pixels = as_tensor(noise(8, 6, in_channels))
    (picture,) = to_pil(to_unit_range(pixels)[None])
    assert picture.mode == {1: "L", 3: "RGB"}[in_channels]
    assert_close(to_pixels(picture, target([8, 6], in_channels)), pixels)


def augmented(rows: datasets.Dataset, seed: int = 0, crop: str = "random", flip: bool = True) -> ImageDataset:
    config = DataConfig(crop=crop, flip=flip)
    return ImageDataset(rows, target(8), num_classes=2, augmentation=config, seed=seed)


def test_crop_and_flip_depend_on_seed_and_position_only(rows):
    items = [(row, 100 + row) for row in range(24)]
    together = augmented(rows).__getitems__(items)
    shuffled = augmented(rows).__getitems__(items[::-1])
    alone = [augmented(rows).__getitems__([item]) for item in items]
    assert_close(shuffled.images.flip(0), together.images)
    assert_close(torch.cat([batch.images for batch in alone]), together.images)
    assert_close(torch.cat([batch.seeds for batch in alone]), together.seeds)


def test_what_a_model_draws_from_an_images_seed_does_not_depend_on_its_flip(rows):
    batch = augmented(rows, crop="center").__getitems__([(0, position) for position in range(400)])
    flipped = (batch.images != batch.images[0]).flatten(1).any(1)
    for counter in range(4):
        drawn = uniform(batch.seeds, counter)
        assert 0.4 < drawn[flipped].mean() < 0.6
        assert 0.4 < drawn[~flipped].mean() < 0.6


def test_another_seed_and_another_position_crop_and_flip_otherwise(rows):
    items = [(row, row) for row in range(24)]
    first = augmented(rows).__getitems__(items).images
    for other in (
        augmented(rows, seed=1).__getitems__(items).images,
        augmented(rows).__getitems__([(row, 24 + row) for row in range(24)]).images,
    ):
        differing = (first != other).flatten(1).any(1)
        assert int(differing.sum()) > 12


def test_random_crops_are_windows_of_the_resized_picture_and_half_are_mirrored():
    # The column's number is the pixel's value, so a window shows where it lies and which way it runs.
    pixels = np.tile(np.arange(40, dtype=np.uint8), (8, 1))
    dataset = ImageDataset(
        rows_of([pixels]), target(8, 1), num_classes=2, augmentation=DataConfig(crop="random", flip=True)
    )
    windows = dataset.__getitems__([(0, position) for position in range(400)]).images[:, 0, 0].int()  # (400, 8)
    steps = windows.diff(dim=1)
    assert bool(((steps == 1).all(1) | (steps == -1).all(1)).all())
    assert 150 < int((steps[:, 0] == -1).sum()) < 250
    starts = windows.min(1).values
    assert set(starts.tolist()) == set(range(33))


def test_without_augmentation_the_centre_is_taken_whatever_the_position(rows):
    dataset = ImageDataset(rows, target(8), num_classes=2)
    first, second = (dataset.__getitems__([(3, position)]).images for position in (0, 12345))
    assert_close(first, second)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_the_same_for_no_and_for_two_loader_processes(rows, crop):
    def batches(num_workers: int) -> list:
        stream = islice(IndexStream(24, 8, seed=5), 6)
        return list(image_batches(augmented(rows, 5, crop), list(stream), CPU, num_workers))

    for alone, workers in zip(batches(0), batches(2), strict=True):
        assert_close(workers.images, alone.images, rtol=0, atol=0)
        assert_close(workers.labels, alone.labels)
        assert_close(workers.seeds, alone.seeds)


@pytest.mark.parametrize("flip", [False, True])
def test_cached_pixels_equal_those_decoded_every_time(rows, flip):
    fresh, cached = augmented(rows, crop="center", flip=flip), augmented(rows, crop="center", flip=flip)
    prepare_dataset(fresh, SourceConfig(), cache_mib=0)
    prepare_dataset(cached, SourceConfig(), cache_mib=1)
    assert fresh.pixels is None
    assert cached.pixels is not None
    items = [(row, 7 * row) for row in (5, 0, 23, 5)]
    assert_close(cached.__getitems__(items).images, fresh.__getitems__(items).images, rtol=0, atol=0)
    assert_close(cached.__getitems__(items).labels, fresh.__getitems__(items).labels)


def test_a_randomly_cropped_set_is_not_cached_and_neither_is_one_that_does_not_fit(rows):
    assert prepare_dataset(augmented(rows), SourceConfig(), cache_mib=1024).pixels is None
    large = ImageDataset(rows, target(256), num_classes=2)
    assert large.num_bytes == 24 * 3 * 256 * 256
    assert prepare_dataset(large, SourceConfig(), cache_mib=4).pixels is None


def test_batches_are_floats_in_the_unit_range_with_their_labels_in_order(rows):
    dataset = ImageDataset(rows, target([8, 6]), num_classes=2)
    batches = list(image_batches(dataset, in_order(24, 10), CPU, 0))
    assert [tuple(batch.images.shape) for batch in batches] == [(10, 3, 8, 6), (10, 3, 8, 6), (4, 3, 8, 6)]
    images = torch.cat([batch.images for batch in batches])
    expected = torch.stack([to_pixels(Image.open(io.BytesIO(row["image"]["bytes"])), target([8, 6])) for row in rows])
    assert_close(to_uint8(images), expected, rtol=0, atol=0)
    assert images.dtype == torch.float32
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1] * 12


def test_labels_are_minus_one_where_there_are_no_classes(rows):
    dataset = ImageDataset(rows.remove_columns("label"), target(8), num_classes=None)
    assert dataset.__getitems__([(1, 0), (2, 1)]).labels.tolist() == [-1, -1]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_classes_is_refused_with_its_row(rows, label):
    plain = rows.cast_column("label", datasets.Value("int64"))
    wrong = plain.map(lambda row, index: {"label": label if index == 3 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match=f"row 3 has label {label}, outside the 2 classes"):
        ImageDataset(wrong, target(8), num_classes=2)


def test_a_row_without_a_label_is_refused(rows):
    plain = rows.cast_column("label", datasets.Value("int64"))
    wrong = plain.map(lambda row, index: {"label": None if index == 3 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 3 has label"):
        ImageDataset(wrong, target(8), num_classes=2)


def test_a_split_without_images_is_refused(rows):
    with pytest.raises(ValueError, match="no images"):
        ImageDataset(rows.select([]), target(8), num_classes=2)


def broken_folder(folder: Path, broken: list[int], count: int = 6) -> SourceConfig:
    """PNGs 0.png, 1.png, ... of which some hold no image."""
    folder.mkdir()
    for index in range(count):
        if index in broken:
            (folder / f"{index}.png").write_bytes(b"no image at all")
        else:
            Image.new("RGB", (8, 8), (index, index, index)).save(folder / f"{index}.png")
    return SourceConfig(dataset=str(folder), skip_broken=True)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_stops_with_its_file_named(tmp_path, num_workers):
    source = load_source(broken_folder(tmp_path / "images", [4]))
    dataset = ImageDataset(source.splits["train"], target(8), num_classes=None)
    with pytest.raises(ValueError, match=r"cannot read image .*4\.png.*data\.skip_broken=true"):
        list(image_batches(dataset, in_order(6, 2), CPU, num_workers))


def test_a_broken_image_stops_caching_too(tmp_path):
    source = load_source(broken_folder(tmp_path / "images", [4]))
    dataset = ImageDataset(source.splits["train"], target(8), num_classes=None)
    with pytest.raises(ValueError, match=r"4\.png"):
        prepare_dataset(dataset, SourceConfig(), cache_mib=1)


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_skipping_broken_images_drops_and_counts_them(tmp_path, cache_mib):
    config = broken_folder(tmp_path / "images", [0, 4])
    dataset = ImageDataset(load_source(config).splits["train"], target(8), num_classes=None)
    prepare_dataset(dataset, config, cache_mib=cache_mib)
    assert dataset.num_skipped == 2
    assert len(dataset) == len(dataset.labels) == 4
    batch = dataset.__getitems__([(row, row) for row in range(4)])
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2, 3, 5]


def test_skipping_keeps_each_images_own_label(tmp_path):
    rows = rows_of([noise(8, 8, 3, seed) for seed in range(6)])
    broken = rows.map(
        lambda row, i: {"image": {"bytes": b"nothing", "path": None}} if i in (1, 2) else row, with_indices=True
    )
    dataset = ImageDataset(broken, target(8), num_classes=2)
    prepare_dataset(dataset, SourceConfig(skip_broken=True), cache_mib=1)
    assert dataset.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_when_every_image_is_broken_that_is_said(tmp_path, cache_mib):
    config = broken_folder(tmp_path / "images", [0, 1, 2], count=3)
    dataset = ImageDataset(load_source(config).splits["train"], target(8), num_classes=None)
    with pytest.raises(ValueError, match="none of the images can be read"):
        prepare_dataset(dataset, config, cache_mib=cache_mib)


@pytest.mark.parametrize("image", [None, {"bytes": b"", "path": None}])
def test_a_row_without_an_image_is_a_broken_one_named_by_its_number(image):
    features = datasets.Features(image=datasets.Image(decode=False))
    whole = rows_of([noise(8, 8, 3)])[0]["image"]
    rows = datasets.Dataset.from_dict({"image": [whole, image, whole]}, features=features)
    dataset = ImageDataset(rows, target(8), num_classes=None)
    with pytest.raises(ValueError, match=r"cannot read image row 1.*data\.skip_broken=true"):
        list(image_batches(dataset, in_order(3, 3), CPU, 0))
    prepare_dataset(dataset, SourceConfig(skip_broken=True), cache_mib=0)
    assert (len(dataset), dataset.num_skipped) == (2, 1)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "bmp", "webp"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_truncated_file_is_a_broken_image_and_nothing_worse(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(noise(24, 24, 3)).save(file, kind, **({} if kind in ("gif", "bmp") else {"exif": exif}))
    whole = file.getvalue()
    lengths = range(1, len(whole), max(1, len(whole) // 40))
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": whole[:length], "path": None} for length in lengths]},
        features=datasets.Features(image=datasets.Image(decode=False)),
    )
    dataset = ImageDataset(rows, target(8), num_classes=None)
    for found in dataset.decode_rows(range(len(rows)), [(0.5, 0.5)] * len(rows)):
        assert isinstance(found, ValueError | torch.Tensor)
