"""A picture of any mode, size and orientation as pixels `(C, H, W)`, and pixels as pictures."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from configs.schema import ImagePreprocessing


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 in [0, 255], rounded."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images `(B, C, H, W)` in [-1, 1] as pictures, grey or RGB."""
    return [VF.to_pil_image(image) for image in to_uint8(images.detach()).cpu()]


def _has_transparency(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info


def _flatten_mode(picture: Image.Image, preprocessing: ImagePreprocessing) -> Image.Image:
    """The picture upright, 8 bits a channel, without transparency, in L or RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # 16-bit greys: I;16 in its byte orders, and I where a reader widened them.
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit pixels from {values.min()} to {values.max()}; expected 8 or 16 bits a channel")
        picture = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels, whose range nobody knows; expected 8 or 16 bits a channel")
    if _has_transparency(picture):
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, ImageColor.getrgb(preprocessing.background))
        picture = Image.alpha_composite(ground, picture)
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    return picture.convert("L" if preprocessing.in_channels == 1 else "RGB")


def to_pixels(
    picture: Image.Image, preprocessing: ImagePreprocessing, crop_at: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """One picture as `(C, H, W)` uint8: resized until it covers the image size, then cropped.

    Args:
        picture: any mode and size.
        preprocessing: the target.
        crop_at: where the crop lies vertically and horizontally, each in [0, 1]; 0.5 is the centre.
    """
    picture = _flatten_mode(picture, preprocessing)
    pixels = torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1).permute(2, 0, 1)
    covering, crop = _geometry(picture, preprocessing, crop_at)
    if covering != (picture.height, picture.width):
        mode, smooth = VF.InterpolationMode(preprocessing.interpolation), preprocessing.interpolation != "nearest"
        pixels = VF.resize(pixels, list(covering), interpolation=mode, antialias=smooth)
    return pixels[:, *crop].contiguous()


def to_mask(picture: Image.Image, preprocessing: ImagePreprocessing) -> Tensor:
    """What a mask marks, `(H, W)` bool, where `to_pixels` puts it with its crop at the centre.

    A pixel is marked where any pixel of the mask that it covers is neither black nor wholly transparent.

    Raises:
        ValueError: where the crop leaves nothing of what is marked.
    """
    picture = ImageOps.exif_transpose(picture)
    if _has_transparency(picture):
        picture = picture.convert("RGBA")
        picture = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size), _opacity(picture))
    elif len(picture.getbands()) > 1 or picture.mode == "P":
        picture = picture.convert("RGB")
    values = torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1)
    covering, crop = _geometry(picture, preprocessing, (0.5, 0.5))
    marked = (values != 0).any(-1)
    kept = F.adaptive_max_pool2d(marked[None].float(), covering)[0, *crop].bool()
    if marked.any() and not kept.any():
        height, width = preprocessing.size
        raise ValueError(
            f"all that the mask marks is cut off where a picture of {picture.width}x{picture.height} is cropped to the "
            f"proportions of {width}x{height}; crop picture and mask around it first"
        )
    return kept


def _opacity(picture: Image.Image) -> Image.Image:
    """White where a picture is not wholly transparent."""
    return picture.convert("RGBA").getchannel("A").point(lambda value: 255 if value else 0)


def _geometry(
    picture: Image.Image, preprocessing: ImagePreprocessing, crop_at: tuple[float, float]
) -> tuple[tuple[int, int], tuple[slice, slice]]:
    """Height and width of the resized picture that covers the image size, and the rows and columns that are kept."""
    height, width = preprocessing.size
    scale = max(height / picture.height, width / picture.width)
    covering = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    top, left = (round(at * (have - want)) for at, have, want in zip(crop_at, covering, (height, width), strict=True))
    return covering, (slice(top, top + height), slice(left, left + width))
