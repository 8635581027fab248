"""Train a tokenizer: the first of the four verbs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import TokenizerTrainingConfig
from pipelines.code_use import CodeUse
from pipelines.compilation import compile_tokenizer, require_compiler
from pipelines.evaluation import evaluate_tokenizer
from pipelines.image_data import ImageBatch, ImageDataset, default_num_workers, image_batches, in_order, prepare_dataset
from pipelines.image_sources import ImageSource, training_splits
from pipelines.open_run import open_run
from pipelines.pictures import reconstruction_grid
from pipelines.sharding import require_whole_models
from pipelines.training_run import TrainingRun
from pipelines.weights import load_matching_weights
from tokenizer import ImageTokenizer, build_tokenizer
from tokenizer.collectives import gather_rows
from tokenizer.objective import TokenizerObjective


def train_tokenizer(config: TokenizerTrainingConfig) -> Path:
    """Train a tokenizer on images and return its run folder, which is also the saved model.

    Where the folder holds the same run already, it goes on from the newest checkpoint, or returns at once.

    Raises:
        ValueError: for anything wrong with the configuration, the data or the folder; before training where possible.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    with open_run(config) as run:
        require_whole_models(run.accelerator)
        config = run.config  # type: ignore[assignment]
        if config.dry_run:  # what comes later in a training is tried as well
            objective_now = dataclasses.replace(config.objective, adversarial_start=0)
            config = dataclasses.replace(config, quantize_after=min(config.quantize_after, 1), objective=objective_now)
        tokenizer = make_tokenizer(config)
        source, train_rows, validation_rows = training_splits(config.data, config.seed)
        if run.plan(len(train_rows)):
            return run.folder
        train, validation = _make_datasets(run, config, tokenizer, source, train_rows, validation_rows)
        if run.plan(len(train)):  # broken images that were skipped make an epoch shorter
            return run.folder
        digests = {"training images": train.digest()}
        run.require_same_data(digests | ({"validation images": validation.digest()} if validation else {}))
        if config.quantize_after >= run.total_steps:
            raise ValueError(
                f"quantize_after={config.quantize_after} leaves none of {run.total_steps} steps to quantize"
            )
        with run.accelerator.main_process_first():  # which downloads what is missing
            objective = TokenizerObjective(config.objective, tokenizer, run.total_steps)
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
        prepare_models(run, config, tokenizer, objective)
        stream = run.stream(len(train))
        batches = image_batches(train, stream, run.device, num_workers)
        code_use = CodeUse(tokenizer.quantizer, run.accelerator)
        figures: dict[str, float] = {}

        tokenizer.train()
        for step in run.steps():
            tokenizer.quantizer.anneal((step + 1) / run.total_steps)
            if step == config.quantize_after and (step or config.init_from is None):
                first = run.stream(len(train), start_step=0)
                _initialize(run, tokenizer, image_batches(train, first, run.device, 0))
            for batch in islice(batches, config.accumulation_steps):
                codes, logged = learn(run, config, objective, batch.images, batch.seeds, step)
                run.log.add(logged)
                code_use.add(codes)
            tokenizer.quantizer.update(step, config.seed)
            run.update_average()
            if run.due(config.log_every, step):
                figures_of_codes, warning = code_use.take()
                run.log_means(step, **figures_of_codes)
                if step >= config.warmup_steps:
                    run.log.warn_once(warning)
            if run.due(config.validate_every, step):
                figures = _validate(run, config, validation, num_workers, step)
            if run.due(config.sample_every, step):
                _draw(run, config, validation or train, step)
            if run.due(config.checkpoint_every, step):
                run.save_checkpoint(step)
        if not figures:
            # All steps were done by an earlier sitting that was stopped before it could finish.
            run.log.cut_after(run.total_steps - 1, "validation")
            figures = _validate(run, config, validation, num_workers, run.total_steps - 1)
        run.finish(figures)
        return run.folder


def prepare_models(
    run: TrainingRun, config: TokenizerTrainingConfig, tokenizer: ImageTokenizer, objective: TokenizerObjective
) -> None:
    """Put what is trained on the device, in the memory order and with the options that make it fast or small."""
    if config.activation_checkpointing:
        tokenizer.checkpoint_activations()
    if config.compile:
        require_compiler(run.device)
    if objective.perceptual is not None:
        objective.perceptual.to(run.device)
    for module in (tokenizer, objective.perceptual, objective.adversary):
        if module is not None:
            torch.nn.Module.to(module, memory_format=torch.channels_last)
    rate = config.objective.discriminator_learning_rate
    run.prepare(tokenizer, objective.adversary, (rate or config.learning_rate) / config.learning_rate)
    objective.resume()
    if config.compile:
        compile_tokenizer(tokenizer)
        if objective.perceptual is not None:
            objective.perceptual.compile()
        if objective.adversary is not None and not config.objective.r1_weight:  # R1 differentiates twice
            objective.adversary.discriminator.compile()


def learn(
    run: TrainingRun,
    config: TokenizerTrainingConfig,
    objective: TokenizerObjective,
    images: Tensor,
    seeds: Tensor,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch of an optimizer step; returns its codes, and what to log of it."""
    with run.accelerator.accumulate(*run.models):
        output = run.model(images, seeds, quantize=step >= config.quantize_after)
        with run.accelerator.autocast():
            losses, metrics = objective.tokenizer_losses(images, output, step)
        losses |= output.losses
        loss = torch.stack(list(losses.values())).sum()
        run.accelerator.backward(loss)
        logged = {"loss": loss, **losses, **metrics, **output.metrics}
        if objective.is_adversarial(step):
            assert run.second is not None
            with run.accelerator.autocast():
                losses, metrics = objective.discriminator_losses(run.second, images, output.reconstruction, step)
            run.accelerator.backward(torch.stack(list(losses.values())).sum())
            logged |= losses | metrics
        run.optimizer_step()
    return output.codes, logged


def make_tokenizer(config: TokenizerTrainingConfig) -> ImageTokenizer:
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
        decoder_output=config.objective.decoder_output,
    )
    if config.init_from is not None:
        load_matching_weights(tokenizer, ImageTokenizer.from_pretrained(config.init_from), config.init_from)
    return tokenizer


def _require_same_options(config: TokenizerTrainingConfig, tokenizer: ImageTokenizer) -> None:
    """Decoder tuning keeps the saved network: a configuration of another one is refused instead of ignored."""
    name = tokenizer.config.model_type.removeprefix("tessera-")
    saved: dict[str, dict[str, Any]] = {
        "model": tokenizer.config.options() | {"name": name},
        "quantizer": tokenizer.config.quantizer or {},
        "data": tokenizer.config.preprocessing.to_dict(),
    }
    if tokenizer.config.decoder_output != config.objective.decoder_output:
        raise ValueError(
            f"the decoder of {config.init_from} gives {tokenizer.config.decoder_output}, which does not go with "
            f"objective.reconstruction={config.objective.reconstruction}"
        )
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
                    f"{have!r}, but it is {value!r} here; start from that run's configuration "
                    f"(--config {config.init_from}/config.yaml), or give {block}.{option}={have}"
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


@torch.compiler.set_stance("force_eager")
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
    if run.trained.average is not None:
        run.trained.average.restart()


@torch.compiler.set_stance("force_eager")  # other batch sizes and modes would be compiled anew
def _validate(
    run: TrainingRun, config: TokenizerTrainingConfig, validation: ImageDataset | None, num_workers: int, step: int
) -> dict[str, float]:
    """Figures over the validation split, logged; none where there is no such split."""
    if validation is None:
        return {}
    with run.evaluated() as tokenizer:
        figures = evaluate_tokenizer(
            tokenizer,
            validation,
            run.accelerator,
            batch_size=run.config.batch_size,
            num_workers=num_workers,
            max_batches=2 if run.config.dry_run else None,
            quantize=step >= config.quantize_after,
        )
    run.log.write(step, "validation", run.seconds, figures)
    codes = "not quantized yet"
    if step >= config.quantize_after:
        codes = f"codes in use {figures['codebook_usage']:.1%}, perplexity {figures['codebook_perplexity']:.1f}"
    run.log.print(f"PSNR {figures['psnr_db']:.2f} dB, {codes}", f"step {step + 1}")
    return figures


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def _draw(run: TrainingRun, config: TokenizerTrainingConfig, dataset: ImageDataset, step: int) -> None:
    """Reconstructions of the first images of a split."""
    if not run.is_main:
        return
    batch = next(iter(image_batches(dataset, in_order(len(dataset), 16)[:1], run.device, 0)))
    with run.evaluated() as tokenizer, run.accelerator.autocast():
        reconstruction = tokenizer.eval()(batch.images, quantize=step >= config.quantize_after).reconstruction
    tokenizer.train()
    run.log.picture(step, "reconstructions", reconstruction_grid(batch.images, reconstruction.clamp(-1, 1)))
