"""Sample new images into a folder: the fourth of the four verbs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as VF

from configs.generation import GenerationConfig
from configs.sampling import SamplingOptions
from configs.validation import from_mapping
from pipelines.compilation import require_compiler
from pipelines.devices import explain_out_of_memory, make_accelerator
from pipelines.image_files import FORMATS, ImageFiles
from pipelines.image_generation import ImageGenerationPipeline
from pipelines.pictures import picture_grid
from pipelines.preprocessing import to_unit_range
from pipelines.shared_folder import shared_folder

_SHOWN = 256
"""Images in grid.png. It is for looking at, and is made in memory."""


def generate(config: GenerationConfig) -> Path:
    """Sample images into files and grid.png, and return their folder, which appears when it is whole.

    Every process draws its share of the batches that one process would draw, and writes each when it is drawn.

    Raises:
        ValueError: where models are missing or do not belong together, a class is unknown, or the folder is not empty.
    """
    accelerator = make_accelerator(config.mixed_precision)
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; choose another output_dir or empty it")
    if config.pipeline is not None:
        pipeline = ImageGenerationPipeline.from_pretrained(config.pipeline)
    else:
        assert config.tokenizer is not None
        assert config.prior is not None
        pipeline = ImageGenerationPipeline.from_parts(config.tokenizer, config.prior)
    pipeline.to(accelerator.device).progress_bar = accelerator.is_main_process
    sampling = _sampling_options(config, type(pipeline.prior).sampling_options)
    if config.compile:
        require_compiler(accelerator.device)
        pipeline.prior.compile_sampling()
    num_images, labels, num_classes = config.num_images, config.labels, pipeline.prior.config.num_classes
    if labels == "each":
        if not num_classes:
            raise ValueError("labels=each needs a prior with classes, and this one has none")
        labels = [label for label in range(num_classes) for _ in range(num_images)]
        num_images *= num_classes
    batches = pipeline.batches(
        num_images,
        labels,
        batch_size=config.batch_size,
        seed=config.seed,
        part=(accelerator.process_index, accelerator.num_processes),
        grid=config.grid,
        **sampling.to_dict(),
    )
    # Here on all processes: one that has nothing to draw would wait for the others.
    pipeline.prior.check_sampling(labels is not None, sampling)
    names = None if labels is None else pipeline.class_names or [str(label) for label in range(num_classes)]
    with shared_folder(output, accelerator) as partial:
        files = FORMATS[config.format](partial, num_images, names)
        with accelerator.autocast(), explain_out_of_memory(f"lower batch_size={config.batch_size}"):
            files.write(batches, accelerator.process_index)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files.join(accelerator.num_processes)
            rows = num_classes if config.labels == "each" else None
            _grid(files, rows).save(partial / "grid.png")
    if accelerator.is_main_process:
        print(f"{output}: {num_images} images and grid.png")
    return output


def _sampling_options(config: GenerationConfig, options: type[SamplingOptions]) -> SamplingOptions:
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingOptions)}
    if twice := sorted(common.keys() & config.sampling.keys()):
        raise ValueError(f"sampling.{twice[0]}= is {twice[0]}= here, one of the options that all priors have")
    return from_mapping(options, common | config.sampling, prefix="sampling.")


def _grid(files: ImageFiles, rows: int | None) -> Image.Image:
    """The first images; or, where there are as many of each class, a row of each class's first."""
    if rows is None:
        shown = list(range(min(files.num_images, _SHOWN)))
        columns = max(1, round(len(shown) ** 0.5))
    else:
        each = files.num_images // rows
        columns = min(each, max(1, _SHOWN // rows))
        shown = [row * each + column for row in range(rows) for column in range(columns)]
    pixels = torch.stack([VF.pil_to_tensor(picture) for picture in files.read(shown)])
    return picture_grid(to_unit_range(pixels), columns)
