"""A small image classifier, trained here in seconds: says whether samples are of their class, and gives features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.random_streams import integer, mix
from pipelines.index_stream import IndexStream


class Classifier(nn.Module):
    """Three strided convolutions, an average over positions and a linear layer.

    Args:
        in_channels: of images in [-1, 1].
        num_classes: of the labels.
        width: channels of the last layer, the features.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels in (width // 4, width // 2, width):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=2, padding=1),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """`(B, width)` of images `(B, C, H, W)` in [-1, 1]."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)`."""
        return self.head(self.features(images))


def _shifted(images: Tensor, seeds: Tensor, reach: int) -> Tensor:
    """Each image moved by up to `reach` pixels either way, by its own seed."""
    padded = F.pad(images, [reach] * 4, mode="replicate")
    height, width = images.shape[2:]
    down, right = (integer(seeds, axis, 2 * reach + 1).tolist() for axis in (0, 1))
    crops = [p[:, y : y + height, x : x + width] for p, y, x in zip(padded, down, right, strict=True)]
    return torch.stack(crops)


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0, num_steps: int = 400, batch_size: int = 64
) -> Classifier:
    """A classifier of images `(N, C, H, W)` in [-1, 1] with labels `(N,)`, in eval mode; shifts augment."""
    torch.manual_seed(seed)
    classifier = Classifier(images.shape[1], num_classes).to(images.device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    batches = iter(IndexStream(len(images), min(batch_size, len(images)), seed=seed))
    for _ in range(num_steps):
        index, positions = torch.tensor(next(batches)).T
        shifted = _shifted(images[index], mix(positions, seed), reach=max(1, images.shape[-1] // 16))
        loss = F.cross_entropy(classifier(shifted), labels[index], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """The likeliest class of each image, `(N,)` int64."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(batch_size)])
