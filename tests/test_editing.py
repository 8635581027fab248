"""Editing: which codes an edit draws anew, and what the pipeline keeps of an image."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from pipeline_cases import TOKENIZERS, make_pipeline, picture
from torch import Tensor

from configs.layout import CodeGrid, CodeLayout
from pipelines.image_editing import codes_of_pixels, random_positions

SQUARE = CodeLayout.single((4, 4), 16)
DEEP = CodeLayout.single((4, 4), 16, depth=3)
PYRAMID = CodeLayout((CodeGrid((1, 1), 4), CodeGrid((2, 2), 4, 2), CodeGrid((3, 3), 4), CodeGrid((6, 5), 8)))
UNEVEN = CodeLayout((CodeGrid((5, 1), 4), CodeGrid((3, 4), 4)))
"""The finest grid is the one of most codes, not the longest."""
LAYOUTS = [SQUARE, DEEP, PYRAMID, UNEVEN]


def mask_of(width: int, height: int, *boxes: tuple[int, int, int, int]) -> Image.Image:
    """Black with white boxes (left, top, right, bottom)."""
    mask = Image.new("L", (width, height))
    for box in boxes:
        mask.paste(255, box)
    return mask


def unknown_codes(mask: Tensor, layout: CodeLayout, margin: int) -> Tensor:
    """The definition of `codes_of_pixels` for one mask `(H, W)`, in loops over patches; `(num_codes,)` bool."""
    H, W = mask.shape
    rows, columns = max((grid.shape for grid in layout.grids), key=math.prod)

    def overlap(i: int, n: int, j: int, m: int) -> bool:
        """Whether part i of n equal parts of an edge and part j of m have more than a border in common."""
        return max(i * m, j * n) < min((i + 1) * m, (j + 1) * n)

    touched = {
        (r, c)
        for r, c in itertools.product(range(rows), range(columns))
        for y, x in mask.nonzero().tolist()
        if overlap(r, rows, y, H) and overlap(c, columns, x, W)
    }
    near = range(-margin, margin + 1)
    wide = {(r + a, c + b) for r, c in touched for a in near for b in near}
    wide = {(r, c) for r, c in wide if 0 <= r < rows and 0 <= c < columns}
    codes = []
    for grid in layout.grids:
        height, width = grid.shape
        for r, c in itertools.product(range(height), range(width)):
            hit = any(overlap(r, height, y, rows) and overlap(c, width, x, columns) for y, x in wide)
            codes += [hit] * grid.depth
    return torch.tensor(codes)


@pytest.mark.parametrize("margin", [0, 1, 2])
@pytest.mark.parametrize("size", [(16, 16), (24, 30), (17, 13), (4, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_of_masked_pixels_are_those_whose_patches_they_touch(layout, size, margin):
    masks = torch.zeros(4, *size, dtype=torch.bool)
    masks[1, size[0] // 2, size[1] // 3] = True
    masks[2, :, -1] = True
    masks[3] = torch.rand(size) < 0.03
    found = codes_of_pixels(masks, layout, margin)
    assert found.shape == (4, *layout.shape)
    assert found.dtype == torch.bool
    assert not found[0].any()
    assert torch.equal(found.flatten(1), torch.stack([unknown_codes(mask, layout, margin) for mask in masks]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_edit_of_everything_concerns_every_code(layout):
    assert codes_of_pixels(torch.ones(2, 16, 16, dtype=torch.bool), layout).all()


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout.single((32,), 16),
        CodeLayout.single((2, 4, 4), 16),
        CodeLayout((CodeGrid((4, 4), 8), CodeGrid((5,), 8))),
    ],
    ids=str,
)
def test_codes_that_stand_for_no_patch_are_refused_by_their_layout(layout):
    message = f"an edit needs codes that stand for patches of the image, but they are laid out as [{layout}]"
    with pytest.raises(ValueError, match=re.escape(message)):
        codes_of_pixels(torch.ones(1, 16, 16, dtype=torch.bool), layout)


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="margin should be 0 codes or more, got -1"):
        codes_of_pixels(torch.ones(1, 16, 16, dtype=torch.bool), SQUARE, -1)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.77, 1])
@pytest.mark.parametrize("layout", [*LAYOUTS, CodeLayout.single((7,), 4)], ids=str)
def test_random_positions_are_an_exact_share_of_each_grid_at_every_depth(layout, share):
    drawn = random_positions(layout, share, torch.arange(20))
    assert drawn.dtype == torch.bool
    for grid, part in zip(layout.grids, layout.split(drawn), strict=True):
        levels = part.reshape(20, -1, grid.depth)
        assert torch.equal(levels, levels[..., :1].expand_as(levels))
        assert (levels[..., 0].sum(1) == round(share * math.prod(grid.shape))).all()


def test_random_positions_belong_to_an_image_and_are_equally_likely():
    drawn = random_positions(DEEP, 0.25, torch.arange(4000))
    assert torch.equal(random_positions(DEEP, 0.25, torch.arange(100, 103)), drawn[100:103])
    assert ((drawn.float().mean(0) - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / 4000)).all()
    # A larger share draws the same positions and more.
    assert (drawn <= random_positions(DEEP, 0.5, torch.arange(4000))).all()


def test_random_positions_of_one_grid_say_nothing_about_those_of_another():
    drawn = random_positions(CodeLayout((CodeGrid((4, 4), 8), CodeGrid((4, 4), 8))), 0.5, torch.arange(500))
    first, second = drawn.split(16, dim=1)
    assert abs((first & second).float().mean() - 0.25) < 0.02


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_strength_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"strength should be from 0 to 1, got {share}"):
        random_positions(SQUARE, share, torch.arange(2))


@pytest.mark.parametrize(
    ("quantizer", "prior"),
    [*itertools.product(TOKENIZERS, ["gpt", "maskgit"]), ("one grid", "pixelcnn")],
)
def test_an_edit_keeps_the_codes_of_all_other_patches(quantizer, prior):
    pipeline, images = make_pipeline(quantizer, prior), [picture(), picture(seed=1)]
    masks = [mask_of(16, 16, (5, 6, 9, 7)), mask_of(16, 16, (0, 0, 1, 1), (12, 8, 16, 16))]
    before = pipeline.encode(images)
    for margin in (0, 1):
        codes = pipeline.edit(images, masks, labels=["cat", "dog"], margin=margin, seed=0).codes
        pixels = torch.stack([torch.from_numpy(np.array(mask)) > 0 for mask in masks])
        unknown = codes_of_pixels(pixels, pipeline.prior.code_layout, margin)
        assert not unknown.all()
        assert torch.equal(codes[~unknown], before[~unknown])
        assert not torch.equal(codes[unknown], before[unknown])


@pytest.mark.parametrize("margin", [0, 1])
def test_blending_puts_every_untouched_pixel_back(margin):
    pipeline, image, mask = make_pipeline(), picture(), mask_of(16, 16, (5, 6, 9, 12))
    original, inside = np.array(image), np.array(mask) > 0
    output = pipeline.edit(image, mask, margin=margin, seed=0)
    blended = np.array(output.images[0])
    plain = np.array(pipeline.edit(image, mask, margin=margin, seed=0, blend=False).images[0])
    np.testing.assert_array_equal(blended[~inside], original[~inside])
    assert not np.array_equal(plain[~inside], original[~inside])
    np.testing.assert_array_equal(plain, np.array(pipeline.decode(output.codes)[0]))
    np.testing.assert_array_equal(blended[inside], plain[inside])


def test_an_empty_mask_gives_the_image_back_and_a_full_one_a_new_image():
    pipeline, image = make_pipeline(), picture()
    same = pipeline.edit(image, mask_of(16, 16), seed=0, blend=False)
    assert torch.equal(same.codes, pipeline.encode(image))
    assert same.images[0].tobytes() == pipeline.reconstruct(image)[0].tobytes()
    new = pipeline.edit(image, mask_of(16, 16, (0, 0, 16, 16)), labels="dog", seed=3)
    fresh = pipeline(1, labels="dog", seed=3)
    assert torch.equal(new.codes, fresh.codes)
    assert new.images[0].tobytes() == fresh.images[0].tobytes()


@pytest.mark.parametrize("prior", ["gpt", "maskgit", "pixelcnn"])
def test_an_edited_image_does_not_depend_on_the_batch_size(prior):
    pipeline, images = make_pipeline(prior=prior), [picture(seed=seed) for seed in range(5)]
    masks = [mask_of(16, 16, (3 * i, 0, 3 * i + 2, 16)) for i in range(5)]
    options = {"labels": [0, 1, 1, 0, 1], "seed": 0, "output_type": "tensor", "guidance_scale": 2.0}
    whole = pipeline.edit(images, masks, **options)
    parts = pipeline.edit(images, masks, **options, batch_size=2)
    assert torch.equal(parts.codes, whole.codes)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-4)
    other = pipeline.edit(images, masks, **(options | {"seed": 1}))
    assert not torch.equal(other.codes, whole.codes)


def test_an_edit_takes_the_options_of_sampling():
    pipeline, image, mask = make_pipeline(), picture(), mask_of(16, 16, (0, 0, 8, 8))
    greedy = [pipeline.edit(image, mask, seed=seed, temperature=0.0).codes for seed in range(3)]
    assert all(torch.equal(codes, greedy[0]) for codes in greedy)
    one, many = (pipeline.edit(image, mask, seed=0, num_candidates=n).codes for n in (1, 16))
    assert not torch.equal(one, many)
    with pytest.raises(TypeError, match="nonsense"):
        pipeline.edit(image, mask, nonsense=1)


def test_masks_that_do_not_fit_the_images_are_refused():
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=r"every image needs a mask of its size: got \[\(16, 16\)\] and \[\(16, 8\)\]"):
        pipeline.edit(picture(), mask_of(16, 8))
    with pytest.raises(ValueError, match=r"every image needs a mask of its size"):
        pipeline.edit([picture(), picture()], [mask_of(16, 16)])
    with pytest.raises(ValueError, match="margin should be 0 codes or more, got -1"):
        pipeline.edit(picture(), mask_of(16, 16), margin=-1)
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        pipeline.edit([], [])


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_a_mask_of_any_mode_says_what_is_not_black(mode):
    pipeline, mask = make_pipeline(), Image.new("L", (16, 16))
    mask.paste(255 if mode == "1" else 2, (4, 0, 8, 4))
    output = pipeline.edit(picture(), mask.convert(mode), seed=0)
    expected = pipeline.edit(picture(), mask_of(16, 16, (4, 0, 8, 4)), seed=0)
    assert torch.equal(output.codes, expected.codes)


def palette_mask() -> Image.Image:
    """Code 0 is white, 1 red and 2 black."""
    mask = Image.new("P", (16, 16))
    mask.putpalette([255, 255, 255, 255, 0, 0, 0, 0, 0])
    mask.paste(1, (4, 0, 8, 4))
    return mask


def test_a_palette_says_what_is_black():
    pipeline, mask = make_pipeline(), palette_mask()
    mask.paste(2, (8, 0, 16, 16))
    output = pipeline.edit(picture(), mask, seed=0)
    expected = pipeline.edit(picture(), mask_of(16, 16, (0, 0, 8, 16)), seed=0)
    assert torch.equal(output.codes, expected.codes)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_a_mask_hides_is_kept_and_what_shines_through_ever_so_little_is_drawn_anew(mode):
    pipeline = make_pipeline()
    if mode == "P":
        mask = palette_mask()
        mask.info["transparency"] = 0
    else:
        mask = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
        mask.paste((255, 255, 255, 1), (4, 0, 8, 4))
        mask = mask.convert(mode)
    output = pipeline.edit(picture(), mask, seed=0)
    expected = pipeline.edit(picture(), mask_of(16, 16, (4, 0, 8, 4)), seed=0)
    assert torch.equal(output.codes, expected.codes)
    assert output.images[0].tobytes() == expected.images[0].tobytes()


def test_the_darkest_colour_that_is_not_black_is_drawn_anew():
    pipeline, mask = make_pipeline(), Image.new("RGB", (16, 16))
    mask.paste((0, 0, 4), (4, 0, 8, 4))
    output = pipeline.edit(picture(), mask, seed=0)
    expected = pipeline.edit(picture(), mask_of(16, 16, (4, 0, 8, 4)), seed=0)
    assert torch.equal(output.codes, expected.codes)


def test_a_photograph_that_lies_on_its_side_is_edited_upright():
    pipeline, photograph, mask = make_pipeline(), picture(20, 12), mask_of(12, 20, (0, 0, 12, 5))
    photograph.getexif()[ExifTags.Base.Orientation] = 6
    upright = ImageOps.exif_transpose(photograph)
    assert upright.size == mask.size
    codes = pipeline.edit(photograph, mask, seed=0).codes
    assert torch.equal(codes, pipeline.edit(upright, mask, seed=0).codes)


def test_an_image_larger_than_the_tokenizer_s_is_edited_at_the_tokenizer_s_size():
    pipeline, image = make_pipeline(), picture(64, 48)
    output = pipeline.edit(image, mask_of(64, 48, (30, 20, 36, 26)), seed=0, output_type="tensor")
    assert output.images.shape == (1, 3, 16, 16)
    before = pipeline.encode(image)
    # The box is in the middle of 4x4 patches.
    outside = torch.ones(1, 4, 4, dtype=torch.bool)
    outside[:, 1:3, 1:3] = False
    assert torch.equal(output.codes[outside], before[outside])
    assert not torch.equal(output.codes, before)
    torch.testing.assert_close(output.images[..., :5, :], pipeline.preprocess(image)[..., :5, :], rtol=0, atol=0)


@pytest.mark.parametrize("size", [32, 64, 8], ids=str)
def test_patches_without_a_masked_pixel_are_kept_in_an_image_of_another_size(size):
    pipeline, image = make_pipeline(), picture(size, size)
    codes = pipeline.edit(image, mask_of(size, size, (0, 0, size // 2, size)), seed=0, temperature=3.0).codes
    before = pipeline.encode(image)
    assert torch.equal(codes[..., 2:], before[..., 2:])
    assert not torch.equal(codes[..., :2], before[..., :2])


@pytest.mark.parametrize(("width", "height"), [(48, 16), (16, 48)], ids=str)
def test_a_mask_is_cropped_like_its_image(width, height):
    pipeline, image, wide = make_pipeline(), picture(width, height), width > height
    box, outside = ((16, 0, 20, 16), (0, 0, 16, 16)) if wide else ((0, 16, 16, 20), (0, 0, 16, 16))
    codes = pipeline.edit(image, mask_of(width, height, box, outside), seed=0, temperature=3.0).codes
    changed = (codes != pipeline.encode(image))[0]
    # The middle third is the picture, and of it the first column (or row) of codes is masked.
    first, others = (changed[:, 0], changed[:, 1:]) if wide else (changed[0], changed[1:])
    assert first.any()
    assert not others.any()


@pytest.mark.parametrize("size", [64, 256, 1024], ids=str)
def test_a_single_masked_pixel_of_a_large_image_counts(size):
    pipeline, image = make_pipeline(), picture(size, size)
    middle = size * 3 // 8  # in the middle of the second patch of four
    mask = mask_of(size, size, (middle, middle, middle + 1, middle + 1))
    drawn = torch.cat([pipeline.edit(image, mask, seed=seed, temperature=3.0).codes for seed in range(4)])
    assert len(drawn[:, 1, 1].unique()) > 1


def test_a_mask_of_which_the_crop_leaves_nothing_is_refused():
    pipeline, image = make_pipeline(), picture(40, 20)
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 5, 20))
    with pytest.raises(ValueError, match="all that the mask marks is cut off where a picture of 40x20 is cropped"):
        pipeline.edit(image, mask)
    mask.paste(255, (0, 0, 12, 20))
    assert pipeline.edit(image, mask, seed=0).images[0].size == (16, 16)


@pytest.mark.parametrize("given", ["photo.png", 3, np.zeros((16, 16, 3), dtype=np.uint8)], ids=repr)
def test_what_is_no_picture_is_refused_by_its_type(given):
    with pytest.raises(ValueError, match=f"expected a picture .* or a list of them, got {type(given).__name__}"):
        make_pipeline().edit(given, picture())


@pytest.mark.parametrize("prior", ["gpt", "maskgit", "pixelcnn"])
def test_known_codes_of_a_call_are_kept_in_batches_of_any_size(prior):
    pipeline = make_pipeline(prior=prior)
    known = torch.randint(0, 16, (5, 4, 4))
    given = {"known": known, "known_mask": torch.rand(known.shape) < 0.5}
    whole = pipeline(5, labels=[0, 1, 1, 0, 1], seed=0, **given).codes
    assert torch.equal(whole[given["known_mask"]], known[given["known_mask"]])
    assert torch.equal(pipeline(5, labels=[0, 1, 1, 0, 1], seed=0, batch_size=2, **given).codes, whole)


def test_known_codes_of_another_number_of_images_or_of_a_larger_grid_are_refused():
    pipeline, known = make_pipeline(), torch.zeros(2, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"known has shape \(3, 4, 4\), without grid=, got \(2, 4, 4\)"):
        pipeline(3, known=known, known_mask=known == 0)
    with pytest.raises(ValueError, match=r"known has shape .* and grid=\[4, 8\]"):
        pipeline(2, known=known, known_mask=known == 0, grid=[4, 8])
    with pytest.raises(ValueError, match="known codes come with a known_mask"):
        pipeline(2, known=known)
