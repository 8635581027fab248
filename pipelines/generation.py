"""Sample new images into a folder: the fourth of the four verbs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from configs.sampling import SamplingOptions
from configs.schema import GenerationConfig
from configs.validation import from_mapping
from pipelines.compilation import require_compiler
from pipelines.devices import explain_out_of_memory, make_accelerator
from pipelines.image_generation import ImageGenerationPipeline
from pipelines.pictures import picture_grid
from pipelines.preprocessing import to_pil
from pipelines.run_folder import whole_folder


def generate(config: GenerationConfig) -> Path:
    """Sample images into numbered PNGs and grid.png, and return their folder, which appears when it is whole.

    Raises:
        ValueError: where models are missing or do not belong together, a class is unknown, or the folder is not empty.
    """
    accelerator = make_accelerator(config.mixed_precision)
    output = Path(config.output_dir)
    if not accelerator.is_main_process:
        return output  # one process draws them all: `accelerate launch` starts one on every GPU
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty; choose another output_dir or empty it")
    if config.pipeline is not None:
        pipeline = ImageGenerationPipeline.from_pretrained(config.pipeline)
    else:
        assert config.tokenizer is not None
        assert config.prior is not None
        pipeline = ImageGenerationPipeline.from_parts(config.tokenizer, config.prior)
    pipeline.to(accelerator.device)
    options = type(pipeline.prior).sampling_options
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(SamplingOptions)}
    if twice := sorted(common.keys() & config.sampling.keys()):
        raise ValueError(f"sampling.{twice[0]}= is {twice[0]}= here, one of the options that all priors have")
    sampling = from_mapping(options, common | config.sampling, prefix="sampling.").to_dict()
    if config.compile:
        require_compiler(accelerator.device)
        pipeline.prior.compile_sampling()
    num_images, labels, columns = config.num_images, config.labels, None
    if labels == "each":
        num_classes = pipeline.prior.config.num_classes
        if not num_classes:
            raise ValueError("labels=each needs a prior with classes, and this one has none")
        labels, columns = [label for label in range(num_classes) for _ in range(num_images)], num_images
        num_images *= num_classes
    with accelerator.autocast(), explain_out_of_memory(f"lower batch_size={config.batch_size}"):
        result = pipeline(
            num_images,
            labels,
            batch_size=config.batch_size,
            seed=config.seed,
            output_type="tensor",
            grid=config.grid,
            **sampling,
        )
    assert isinstance(result.images, torch.Tensor)
    with whole_folder(output) as partial:
        for index, picture in enumerate(to_pil(result.images)):
            picture.save(partial / f"{index:05d}.png")
        # A grid is for looking at: the first 256 images, or every class's row.
        shown = result.images if columns else result.images[:256]
        picture_grid(shown, columns or max(1, round(len(shown) ** 0.5))).save(partial / "grid.png")
    print(f"{output}: {num_images} images and grid.png")
    return output
