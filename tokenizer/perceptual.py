"""LPIPS: the distance of two images in the features of VGG16 (Zhang et al. 2018, arXiv:1801.03924)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

_STAGES = [0, 4, 9, 16, 23, 30]
"""Where the layers up to relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 begin and end in torchvision's features."""


class LPIPS(nn.Module):
    """Mean over images of sum over layers of mean over positions of w (f(x) - f(y))^2, with f of length 1.

    Nothing in it is trained. Grey images are repeated to three channels.

    Args:
        file: weights of torchvision's VGG16 as .pth or .safetensors, with keys such as features.0.weight; by default
            torchvision's own, which it downloads once.

    Raises:
        ValueError: where weights cannot be had, with what to download and where to put it.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, file: str | None = None) -> None:
        super().__init__()
        with torch.device("meta"):
            features = vgg16().features
        shapes = {name: tensor.shape for name, tensor in features.state_dict().items()}
        linear_weights = _linear_weights()  # before VGG16's, which may be half a gigabyte to download
        features.load_state_dict(_vgg_weights(file, shapes), assign=True)
        layers = [layer if not isinstance(layer, nn.ReLU) else nn.ReLU() for layer in features]  # not in place
        self.stages = nn.ModuleList(nn.Sequential(*layers[start:end]) for start, end in pairwise(_STAGES))
        for i, weight in enumerate(linear_weights):
            self.register_buffer(f"weight{i}", weight)  # (1, C, 1, 1)
        # Of images in [-1, 1]: what ImageNet's normalization is to images in [0, 1], as published.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance, a scalar, of images `(B, C, H, W)` in [-1, 1] and as many others; C is 1 or 3."""
        distances = []
        # Two passes, so that the backward one goes through what needs a gradient only.
        for i, (x, y) in enumerate(zip(self._features(images), self._features(others), strict=True)):
            distances.append(((x - y).square() * self.get_buffer(f"weight{i}")).sum(1).mean())
        return torch.stack(distances).sum()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Those of each layer, `(B, C, h, w)` float32, of length 1 over channels."""
        features, found = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale, []
        for stage in self.stages:
            features = stage(features)
            found.append(nn.functional.normalize(features.float(), dim=1, eps=1e-10))
        return found


def _linear_weights() -> list[Tensor]:
    """The weights of the channels of each layer, `(1, C, 1, 1)` float32, from the package lpips."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise ValueError(
            "objective.perceptual_weight > 0 needs the package lpips for the weights of LPIPS: "
            "pip install 'tessera-images[perceptual]'; objective.perceptual_weight=0 goes on without"
        )
    path = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return [saved[f"lin{i}.model.1.weight"].float() for i in range(len(_STAGES) - 1)]
    except Exception as error:
        raise ValueError(
            f"the package lpips is not whole: {path} cannot be read ({error!r}); pip install --force-reinstall lpips. "
            "objective.perceptual_weight=0 goes on without"
        ) from error


def _vgg_weights(file: str | None, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of vgg16.features, by names such as 0.weight, which are to have these shapes."""
    url = VGG16_Weights.IMAGENET1K_V1.url
    off = "objective.perceptual_weight=0" + (" objective.perceptual_file=null" if file is not None else "")
    advice = f"download {url} and give objective.perceptual_file=PATH; {off} goes on without"
    source = f"objective.perceptual_file={file}" if file is not None else "the file that torchvision has downloaded"
    path = None if file is None else Path(file).expanduser()
    if path is not None and not path.is_file():
        raise ValueError(f"there is no file objective.perceptual_file={file}; {advice}")
    try:
        if path is None:
            saved = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        elif path.suffix == ".safetensors":
            saved = load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        problem = "the weights of VGG16 could not be downloaded" if path is None else f"{source} cannot be read"
        raise ValueError(f"{problem} ({error}); {advice}") from error
    tensors = saved if isinstance(saved, Mapping) else {}
    features = {
        str(name).removeprefix("features."): tensor
        for name, tensor in tensors.items()
        if str(name).startswith("features.") and isinstance(tensor, Tensor)
    }
    if {name: tensor.shape for name, tensor in features.items()} != shapes:
        raise ValueError(
            f"{source} does not hold torchvision's VGG16: it has {len(features)} tensors features.*, {len(shapes)} "
            f"of certain shapes were expected; {advice}"
        )
    return {name: tensor.float() for name, tensor in features.items()}
