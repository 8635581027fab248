"""Train a tokenizer: the first of the four verbs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from configs.schema import TokenizerTrainingConfig
from pipelines.code_use import CodeUse
from pipelines.evaluation import evaluate_tokenizer
from pipelines.image_data import (
    ImageBatch,
    ImageDataset,
    default_num_workers,
    image_batches,
    in_order,
    prepare_dataset,
)
from pipelines.image_sources import ImageSource, training_splits
from pipelines.pictures import reconstruction_grid
from pipelines.training_run import TrainingRun, open_run
from pipelines.weights import load_matching_weights
from tokenizer import ImageTokenizer, build_tokenizer
from tokenizer.objective import reconstruction_losses
from tokenizer.quantizers.collectives import gather_rows


def train_tokenizer(config: TokenizerTrainingConfig) -> Path:
    """Train a tokenizer on images and return its run folder, which is also the saved model.

    Where the folder holds the same run already, it goes on from the newest checkpoint, or returns at once.

    Raises:
        ValueError: for anything wrong with the configuration, the data or the folder; before training where possible.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    with open_run(config) as run:
        config = run.config  # type: ignore[assignment]
        tokenizer = _make_tokenizer(config)
        source, train_rows, validation_rows = training_splits(config.data, config.seed)
        if run.plan(len(train_rows)):
            return run.folder
        train, validation = _make_datasets(run, config, tokenizer, source, train_rows, validation_rows)
        if run.plan(len(train)):  # broken images that were skipped make an epoch shorter
            return run.folder
        num_workers = default_num_workers(config.data)
        run.announce(
            tokenizer,
            {
                "codes": f"{tokenizer.code_layout}, {tokenizer.code_layout.bits:,.0f} bits an image",
                "images": f"{len(train):,} of {config.data.dataset}"
                + (f" ({train.num_skipped} broken ones skipped)" if train.num_skipped else ""),
                "validation": "none: give data.validation= to measure"
                if validation is None
                else f"{len(validation):,}",
            },
            len(train),
        )
        torch.nn.Module.to(tokenizer, memory_format=torch.channels_last)
        run.prepare(tokenizer)
        stream = run.stream(len(train))
        if run.start_step == 0 and config.init_from is None:
            _initialize(run, tokenizer, image_batches(train, stream, run.device, 0))
        batches = image_batches(train, stream, run.device, num_workers)
        code_use = CodeUse(tokenizer.quantizer, run.accelerator)
        figures: dict[str, float] = {}

        tokenizer.train()
        for step in run.steps():
            tokenizer.quantizer.anneal((step + 1) / run.total_steps)
            for batch in islice(batches, config.accumulation_steps):
                with run.accelerator.accumulate(run.model):
                    output = run.model(batch.images, batch.seeds)
                    losses = reconstruction_losses(config.objective, batch.images, output.reconstruction)
                    losses |= output.losses
                    loss = torch.stack(list(losses.values())).sum()
                    run.accelerator.backward(loss)
                    run.optimizer_step()
                    run.log.add({"loss": loss, **losses, **output.metrics})
                    code_use.add(output.codes)
            tokenizer.quantizer.update(step)
            run.update_average()
            if run.due(config.log_every, step):
                figures_of_codes, warning = code_use.take()
                run.log_means(step, **figures_of_codes)
                if step >= config.warmup_steps:
                    run.log.warn_once(warning)
            if run.due(config.validate_every, step):
                figures = _validate(run, validation, num_workers, step)
            if run.due(config.sample_every, step):
                _draw(run, validation or train, step)
            if run.due(config.checkpoint_every, step):
                run.save_checkpoint(step)
        if not figures:
            # All steps were done by an earlier sitting that was stopped before it could finish.
            run.log.cut_after(run.total_steps - 1, "validation")
            figures = _validate(run, validation, num_workers, run.total_steps - 1)
        run.finish(figures)
        return run.folder


def _make_tokenizer(config: TokenizerTrainingConfig) -> ImageTokenizer:
    """A fresh tokenizer, with the weights of `init_from` where that is given."""
    if config.train_only == "decoder":
        assert config.init_from is not None
        tokenizer = ImageTokenizer.from_pretrained(config.init_from)
        _require_same_options(config, tokenizer)
        tokenizer.freeze_codes()
        return tokenizer
    tokenizer = build_tokenizer(
        config.model,
        config.quantizer,
        image_size=config.data.image_size,
        background=config.data.background,
        interpolation=config.data.interpolation,
    )
    if config.init_from is not None:
        load_matching_weights(tokenizer, ImageTokenizer.from_pretrained(config.init_from), config.init_from)
    return tokenizer


def _require_same_options(config: TokenizerTrainingConfig, tokenizer: ImageTokenizer) -> None:
    """Decoder tuning keeps the saved network; an option that says otherwise is refused instead of ignored."""
    name = tokenizer.config.model_type.removeprefix("tessera-")
    saved: dict[str, dict[str, Any]] = {
        "model": tokenizer.config.options() | {"name": name},
        "quantizer": tokenizer.config.quantizer or {},
        "data": tokenizer.config.preprocessing.to_dict(),
    }
    preprocessing = {name: getattr(config.data, name) for name in ("image_size", "background", "interpolation")}
    asked = {"model": config.model, "quantizer": config.quantizer, "data": preprocessing}
    for block, options in asked.items():
        for option, value in options.items():
            have = saved[block].get(option)
            if option == "image_size":
                value = [value, value] if isinstance(value, int) else value
            if have != value:
                raise ValueError(
                    f"train_only=decoder keeps the tokenizer in {config.init_from}, whose {block}.{option} is "
                    f"{have!r}, but {value!r} was asked for; leave it out, or give {block}.{option}={have}"
                )


def _make_datasets(
    run: TrainingRun,
    config: TokenizerTrainingConfig,
    tokenizer: ImageTokenizer,
    source: ImageSource,
    train_rows: object,
    validation_rows: object,
) -> tuple[ImageDataset, ImageDataset | None]:
    num_classes = len(source.class_names) if source.class_names else None
    found: list[ImageDataset | None] = []
    for rows, augmentation in ((train_rows, config.data), (validation_rows, None)):
        if rows is None:
            found.append(None)
            continue
        dataset = ImageDataset(
            rows,
            tokenizer.config.preprocessing,
            num_classes=num_classes,
            augmentation=augmentation,
            seed=config.seed,
        )
        found.append(prepare_dataset(dataset, config.data, cache_mib=config.data.cache_mib, show=run.is_main))
    assert found[0] is not None
    return found[0], found[1]


@torch.no_grad()
def _initialize(run: TrainingRun, tokenizer: ImageTokenizer, batches: Iterator[ImageBatch]) -> None:
    """Show the quantizer as many latents as it asks for, of all processes, in the order of one process."""
    quantizer, latents, num_vectors = tokenizer.quantizer, [], 0
    while num_vectors < quantizer.num_start_vectors:
        for batch in islice(batches, run.config.accumulation_steps):
            latents.append(gather_rows(tokenizer.encode_latents(batch.images).float()))  # (B, D, *grid)
            num_vectors += latents[-1].numel() // latents[-1].shape[1]
    if latents:
        quantizer.initialize(torch.cat(latents))
    if run.averaged is not None:
        run.averaged.module.load_state_dict(tokenizer.state_dict())


def _validate(run: TrainingRun, validation: ImageDataset | None, num_workers: int, step: int) -> dict[str, float]:
    """Figures over the validation split, logged; none where there is no such split."""
    if validation is None:
        return {}
    figures = evaluate_tokenizer(
        run.evaluated_model,
        validation,
        run.accelerator,
        batch_size=run.config.batch_size,
        num_workers=num_workers,
        max_batches=2 if run.config.dry_run else None,
    )
    run.log.write(step, "validation", run.seconds, figures)
    run.log.print(
        f"PSNR {figures['psnr_db']:.2f} dB, codes in use {figures['codebook_usage']:.1%}, "
        f"perplexity {figures['codebook_perplexity']:.1f}",
        f"step {step + 1}",
    )
    return figures


@torch.no_grad()
def _draw(run: TrainingRun, dataset: ImageDataset, step: int) -> None:
    """Reconstructions of the first images of a split."""
    if not run.is_main:
        return
    model = run.evaluated_model.eval()
    batch = next(iter(image_batches(dataset, in_order(len(dataset), 16)[:1], run.device, 0)))
    with run.accelerator.autocast():
        reconstruction = model(batch.images).reconstruction
    run.log.picture(step, "reconstructions", reconstruction_grid(batch.images, reconstruction.clamp(-1, 1)))
    run.unwrapped.train()
