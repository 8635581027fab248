"""The keys of training and encoding, with defaults, units and meaning: what `--help` prints and a run records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from configs.objective import ObjectiveConfig
from configs.validation import Count, CountOrZero, NonNegative, Range, Schema, Seed, Share

PixelSize = Annotated[int, Range(1, 16384)]


@dataclass
class ImagePreprocessing(Schema):
    """How a picture of any size and mode becomes a tokenizer's input; saved with the tokenizer."""

    image_size: PixelSize | list[PixelSize] = 32
    """Pixels: one number for squares, or [height, width]."""
    in_channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    background: str = "white"
    """Colour that lies under transparent pixels: a name or #rrggbb."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    """How pictures are resized until they cover image_size; the rest is cropped."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size[0], self.image_size[1]

    def validate(self) -> None:
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"image_size should be one number or [height, width], got {self.image_size}")


@dataclass
class SourceConfig(Schema):
    """Where images come from."""

    dataset: str = "digits"
    """digits, a folder of images, a file, glob or folder of parquet or arrow, or the name of a Hugging Face dataset."""
    name: str | None = None
    """Configuration of a Hugging Face dataset."""
    image_column: str | None = None
    """Column with the images; by default the only image column."""
    label_column: str | None = None
    """Column with the classes; by default the only column of named classes, or one called label."""
    skip_broken: bool = False
    """Skip and count images that cannot be read, instead of stopping. Reads every image once at the start."""
    num_workers: CountOrZero | None = None
    """Processes that decode images; by default one less than the cores, at most 8."""


@dataclass
class DataConfig(SourceConfig):
    """Images to train on."""

    split: str = "train"
    """Split to train on, or rows of it: train[:100] are the first 100."""
    validation: Annotated[float, Range(0, 0.9)] | str | None = None
    """A split, another source, or a share such as 0.02 drawn by seed; by default the split validation or test."""
    image_size: PixelSize | list[PixelSize] = 32
    """Pixels: one number for squares, or [height, width]."""
    background: str = "white"
    """Colour that lies under transparent pixels: a name or #rrggbb."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    """How pictures are resized until they cover image_size; the rest is cropped."""
    crop: Literal["center", "random"] = "center"
    """Where training pictures that are not of image_size's proportions are cropped; elsewhere it is the centre."""
    flip: bool = False
    """Mirror every second training picture, left to right."""
    cache_mib: CountOrZero = 1024
    """MiB of decoded images to keep in memory; a set that fits is decoded once. 0 decodes every time."""


@dataclass
class RunConfig(Schema):
    """What both trainings share."""

    output_dir: str = "runs/run"
    """The run folder: config.yaml, metrics.jsonl, images/, checkpoints/ and the final model."""
    steps: Count | None = None
    """Optimizer steps; give steps or epochs."""
    epochs: Annotated[float, Range(0.0001)] | None = None
    """Passes over the training split; give steps or epochs."""
    batch_size: Annotated[int, Range(1, 2**20)] = 64
    """Images per optimizer step, summed over processes and accumulation steps."""
    accumulation_steps: Count = 1
    """Forward and backward passes per optimizer step; more of them need less memory."""
    learning_rate: Annotated[float, Range(1e-9, 1)] = 1e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: CountOrZero = 100
    """Steps over which the learning rate rises from zero."""
    betas: list[Share] = field(default_factory=lambda: [0.9, 0.99])
    """AdamW's decay rates of the two moments."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay of matrices; vectors, norms and embeddings have none."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this global norm; 0 is off."""
    weight_ema: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay of a moving average of the weights, which then is evaluated and saved; it rises from 0. 0 is off."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast type; auto is bf16 where the hardware multiplies it natively, otherwise no."""
    seed: Seed = 0
    """Seed of weights, data order and everything random."""
    log_every: Count = 20
    """Steps between lines in metrics.jsonl."""
    validate_every: CountOrZero = 500
    """Steps between passes over the validation split; 0 validates at the end only."""
    sample_every: CountOrZero = 500
    """Steps between pictures in images/; 0 draws at the end only."""
    checkpoint_every: CountOrZero = 500
    """Steps between checkpoints; 0 saves one at the end only."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints to keep."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest whole checkpoint, or starts; never refuses a folder that holds a run."""
    init_from: str | None = None
    """A saved model or run folder whose weights a new run starts from."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics and pictures go besides the run folder. Nothing leaves the machine unless asked."""
    project: str = "tessera"
    """The tracker's project."""
    dry_run: bool = False
    """Do two steps of everything in a temporary folder, a checkpoint and a picture included, and keep nothing."""

    def validate(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give steps or epochs, got both: steps={self.steps} epochs={self.epochs}")
        if self.batch_size % self.accumulation_steps:
            parts = f"accumulation_steps={self.accumulation_steps} equal parts"
            raise ValueError(f"batch_size={self.batch_size} does not divide into {parts}; choose a multiple")
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(f"betas should be two numbers in [0, 1), got {self.betas}")


@dataclass
class TokenizerTrainingConfig(RunConfig):
    """Train a tokenizer on images."""

    output_dir: str = "runs/tokenizer"
    """The run folder: config.yaml, metrics.jsonl, images/, checkpoints/ and the final model."""
    model: dict[str, Any] = field(default_factory=lambda: {"name": "vqvae"})
    """The network: name, then its options."""
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "ema"})
    """The quantizer: name, then its options."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the network is trained on: reconstruction, perceptual and adversarial terms."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    train_only: Literal["all", "decoder"] = "all"
    """decoder tunes the decoder of init_from= alone: its codes and fingerprint stay."""
    quantize_after: CountOrZero = 0
    """Optimizer steps as a continuous autoencoder before the quantizer starts from the encoder's latents."""
    compile: bool = False
    """Compile encoder, decoder and discriminator (not with R1); the first steps take minutes. Needs a compiler."""
    activation_checkpointing: bool = False
    """Compute activations of the vqgan's blocks again in the backward pass: less memory, more time."""

    def validate(self) -> None:
        super().validate()
        for block in ("model", "quantizer"):
            if not isinstance(getattr(self, block).get("name"), str):
                raise ValueError(f"{block} needs a name, got {getattr(self, block)!r}; give {block}.name=")
        if self.train_only == "decoder" and self.init_from is None:
            raise ValueError("train_only=decoder tunes a saved tokenizer; give init_from=DIR")
        if self.train_only == "decoder" and self.quantize_after:
            raise ValueError(f"train_only=decoder keeps the codes; leave out quantize_after={self.quantize_after}")


@dataclass
class EncodingConfig(Schema):
    """Turn a dataset of images into a dataset of codes."""

    tokenizer: str
    """A tokenizer's run folder or saved model, or its hub name."""
    output_dir: str = "runs/codes"
    """Folder of the code dataset."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """The images. Splits stay splits; a single file becomes the split train."""
    batch_size: Count = 128
    """Images per forward pass, on each process."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    """Autocast type. Codes are the same for any number of processes in full precision only."""


@dataclass
class PriorTrainingConfig(RunConfig):
    """Train a prior on a dataset of codes."""

    codes: str = "runs/codes"
    """A code dataset's folder or hub name; it knows the layout, the classes and the tokenizer's fingerprint."""
    output_dir: str = "runs/prior"
    """The run folder: config.yaml, metrics.jsonl, images/, checkpoints/ and the final model."""
    split: str = "train"
    """Split to train on."""
    validation: Annotated[float, Range(0, 0.9)] | str | None = None
    """A split, or a share such as 0.02 drawn by seed; by default the split validation or test."""
    model: dict[str, Any] = field(default_factory=lambda: {"name": "gpt"})
    """The prior: name, then its options."""
    class_conditional: bool = True
    """Condition on the classes of the code dataset, where it has any."""
    tokenizer: str | None = None
    """Tokenizer that draws the sample pictures; by default the one recorded beside the codes."""
    num_samples: Count = 16
    """Pictures in a sample grid."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Options of the sample pictures, those of the prior's sampling: temperature, guidance_scale, steps and so on."""
    learning_rate: Annotated[float, Range(1e-9, 1)] = 5e-4
    """Peak learning rate of AdamW."""
    betas: list[Share] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the two moments."""
    weight_decay: NonNegative = 0.05
    """AdamW's weight decay of matrices; vectors, norms and embeddings have none."""
    compile: bool = False
    """Compile the network's blocks; the first steps take minutes. Needs a compiler."""
    activation_checkpointing: bool = False
    """Compute activations of the transformer's blocks again in the backward pass: less memory, more time."""

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.model.get("name"), str):
            raise ValueError(f"model needs a name, got {self.model!r}; give model.name=")
