"""The interface of every tokenizer: images to codes and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.layout import CodeLayout
from configs.pretrained import StrictConfig, StrictLoading
from configs.schema import ImagePreprocessing
from configs.validation import did_you_mean
from tokenizer.pixels import OUTPUTS_PER_CHANNEL, images_of
from tokenizer.quantizers import Quantizer, build_quantizer


class ImageTokenizerConfig(StrictConfig):
    """What every tokenizer's config holds.

    The training writes `image_size` [height, width], `background` and `interpolation` (together with `in_channels` the
    preprocessing of images), `quantizer` (its name and options), what the decoder's outputs are (`decoder_output`) and,
    on saving, the `fingerprint`.
    """

    image_size: list[int] | int = 32
    background: str = "white"
    interpolation: str = "bicubic"
    quantizer: dict[str, Any] | None = None
    fingerprint: str | None = None
    decoder_output: str = "values"
    in_channels: int = 3
    """Channels of images: 1 for grey, 3 for colour."""

    # Fields that do not decide codes; a subclass adds those of its decoder.
    not_in_fingerprint: ClassVar[frozenset[str]] = frozenset({"fingerprint", "decoder_output"})

    def validate(self) -> None:
        if self.decoder_output not in OUTPUTS_PER_CHANNEL:
            raise ValueError(did_you_mean(self.decoder_output, OUTPUTS_PER_CHANNEL, "decoder_output"))
        self.quantizer = self.quantizer or {"name": "ema"}
        self.image_size = list(self.preprocessing.size)

    @property
    def out_channels(self) -> int:
        """Channels of the decoder's outputs."""
        return self.in_channels * OUTPUTS_PER_CHANNEL[self.decoder_output]

    @property
    def preprocessing(self) -> ImagePreprocessing:
        """How a picture of any size and mode becomes an input of this tokenizer."""
        return ImagePreprocessing(
            image_size=self.image_size,
            in_channels=self.in_channels,  # type: ignore[arg-type]
            background=self.background,
            interpolation=self.interpolation,  # type: ignore[arg-type]
        )


@dataclass
class TokenizerOutput:
    """What a forward pass gives."""

    reconstruction: Tensor
    """`(B, C, H, W)`, about [-1, 1], not clamped."""
    outputs: Tensor
    """What the decoder gives, `(B, config.out_channels, H, W)`; the reconstruction itself where it gives values."""
    codes: Tensor
    """`(B, *code_layout.shape)` int64."""
    losses: dict[str, Tensor]
    """The quantizer's weighted losses; the objective adds the reconstruction's."""
    metrics: dict[str, Tensor]
    """Detached scalars to log."""


class ImageTokenizer(StrictLoading, PreTrainedModel):
    """Images `(B, C, H, W)` in [-1, 1] to codes `(B, *code_layout.shape)` and back.

    A subclass has three submodules, `encoder`, `quantizer` and `decoder`, which it hands to `assemble`.
    """

    config_class = ImageTokenizerConfig
    config: ImageTokenizerConfig
    main_input_name = "images"
    downsampling_factor: int
    """Pixels of a position's side."""
    encoder: nn.Module
    quantizer: Quantizer
    decoder: nn.Module
    _codes_frozen = False

    def assemble(
        self,
        encoder: Callable[[Any], nn.Module],
        decoder: Callable[[Any], nn.Module],
        latent_dim: int,
        downsampling_factor: int,
    ) -> None:
        """Build the three parts from the config; the last line of a subclass's constructor.

        Args:
            encoder: makes one from the config: images `(B, C, H, W)` to latents `(B, D, *grid)`.
            decoder: likewise: latents to outputs `(B, config.out_channels, H, W)`.
            latent_dim: D.
            downsampling_factor: pixels of a position's side.

        Raises:
            ValueError: where the image size is not a multiple of the downsampling factor.
        """
        self.downsampling_factor = downsampling_factor
        self.check_size_fits()
        assert self.config.quantizer is not None
        self.encoder = encoder(self.config)
        self.quantizer = build_quantizer(self.config.quantizer, latent_dim)
        self.decoder = decoder(self.config)
        self.post_init()

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents `(B, D, *grid)` of images `(B, C, H, W)`, before quantization."""
        return self.encoder(images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Outputs `(B, config.out_channels, H, W)` of quantized latents `(B, D, *grid)`: see `pixels.images_of`."""
        return self.decoder(latents)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the decoder's last layer."""
        return [parameter for parameter in self.decoder.parameters() if parameter.ndim > 1][-1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images this tokenizer was made for."""
        return (self.config.in_channels, *self.config.preprocessing.size)

    @property
    def code_layout(self) -> CodeLayout:
        """What this tokenizer's codes mean, at its image size."""
        _, height, width = self.image_shape
        factor = self.downsampling_factor
        return self.quantizer.code_layout((height // factor, width // factor))

    def check_size_fits(self) -> None:
        """Raise a ValueError where the image size is not a multiple of the downsampling factor."""
        _, height, width = self.image_shape
        factor = self.downsampling_factor
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height}x{width} pixels do not divide into patches of {factor}x{factor}: height and width "
                f"must be multiples of the downsampling factor; "
                f"try {max(factor, round(height / factor) * factor)}x{max(factor, round(width / factor) * factor)}"
            )

    def _check_images(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"expected images (B, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"expected images as floating point in [-1, 1], got {images.dtype}")
        return images.to(self.dtype)

    def forward(self, images: Tensor, seeds: Tensor | None = None, *, quantize: bool = True) -> TokenizerOutput:
        """Encode, quantize and decode images `(B, C, H, W)` in [-1, 1].

        Args:
            images: as said.
            seeds: `(B,)` int64, one an image and step, for quantizers that draw random numbers in training.
            quantize: False decodes the latents themselves, through the quantizer's projections; there are no codes.

        Raises:
            ValueError: where the images have another shape or are integers.
        """
        latents = self.encode_latents(self._check_images(images))
        quantized = self.quantizer(latents, seeds) if quantize else self.quantizer.pass_through(latents)
        outputs = self.decode_latents(quantized.quantized.to(self.dtype))
        reconstruction = images_of(outputs, self.config.decoder_output, differentiable=self.training)
        return TokenizerOutput(reconstruction, outputs, quantized.codes, quantized.losses, quantized.metrics)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes `(B, *code_layout.shape)` int64 of images `(B, C, H, W)` in [-1, 1]."""
        return self.quantizer(self.encode_latents(self._check_images(images))).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1], clamped, of codes `(B, *code_layout.shape)` int64.

        Raises:
            ValueError: where the codes have another shape, or are not in [0, K).
        """
        return self._decode(self.code_layout.split(codes))

    @torch.no_grad()
    def decode_larger(self, codes: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1], clamped, of a single grid of any height and width.

        Raises:
            ValueError: where the tokenizer has several grids, or the depth is another.
        """
        layout, shape = self.code_layout, tuple(codes.shape[1:])
        if len(layout.grids) > 1 or len(shape) != len(layout.shape) or shape[2:] != layout.shape[2:]:
            raise ValueError(f"codes of another size should be one grid like [{layout}], got {tuple(codes.shape)}")
        return self._decode([codes])

    def _decode(self, grids: list[Tensor]) -> Tensor:
        for part, grid in zip(grids, self.code_layout.grids, strict=True):
            if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < grid.vocab_size:
                raise ValueError(
                    f"codes of [{grid}] are in [0, {grid.vocab_size}), got {int(part.min())} to {int(part.max())}"
                )
        outputs = self.decode_latents(self.quantizer.decode(grids).to(self.dtype))
        return images_of(outputs, self.config.decoder_output).clamp(-1, 1)

    def freeze_codes(self) -> None:
        """Leave only the decoder to train: encoder and quantizer keep their values, and so every code."""
        self._codes_frozen = True
        self.requires_grad_(False)
        self.decoder.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self._codes_frozen:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def _code_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that decide codes: encoder and quantizer without counters, by name."""
        bookkeeping = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            if isinstance(module, Quantizer)
            for name in module.bookkeeping
        }
        for name, tensor in sorted(self.state_dict().items()):
            counter = name in bookkeeping or name.endswith(".num_batches_tracked")
            if not name.startswith("decoder.") and not counter:
                yield name, tensor

    def compute_fingerprint(self) -> str:
        """SHA-256 over what decides codes: configuration of encoder and quantizer, and their tensors as float32."""
        options = {k: v for k, v in self.config.options().items() if k not in self.config.not_in_fingerprint}
        digest = hashlib.sha256(json.dumps([self.config.model_type, options], sort_keys=True).encode())
        for name, tensor in self._code_tensors():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            values = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(values.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identifies the codes of a saved tokenizer; computed when it is saved, and kept by casts and moves."""
        return self.config.fingerprint or self.compute_fingerprint()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save config and weights; the fingerprint is computed anew where the tensors are float32."""
        floating = [tensor for _, tensor in self._code_tensors() if tensor.is_floating_point()]
        if self.config.fingerprint is None or all(tensor.dtype == torch.float32 for tensor in floating):
            self.config.fingerprint = self.compute_fingerprint()
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def known_classes(cls) -> tuple[str, dict[str, Any]]:
        from tokenizer import TOKENIZERS  # the table imports this file

        return "tokenizer", TOKENIZERS
