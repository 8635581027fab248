"""Train a prior: the third of the four verbs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from configs.random_streams import mix
from configs.schema import PriorTrainingConfig
from configs.validation import from_mapping
from pipelines.code_data import CodeInfo, digest, load_code_info, load_code_tensor, load_codes
from pipelines.compilation import compile_blocks
from pipelines.evaluation import evaluate_prior
from pipelines.index_stream import hold_out
from pipelines.open_run import open_run
from pipelines.pictures import picture_grid
from pipelines.sharding import require_fsdp2
from pipelines.training_run import TrainingRun
from pipelines.weights import load_matching_weights
from pipelines.zero import configure_zero
from prior import Prior, build_prior
from tokenizer import ImageTokenizer

Split = tuple[Tensor, Tensor | None]
"""Codes `(N, *layout.shape)` in their stored type, and labels `(N,)` or None."""


def train_prior(config: PriorTrainingConfig) -> Path:
    """Train a prior on a code dataset and return its run folder, which is also the saved model.

    Layout, classes and the tokenizer's fingerprint come from the code dataset. Where the folder holds the same run
    already, it goes on from the newest checkpoint, or returns at once.

    Raises:
        ValueError: for anything wrong with the configuration, the codes or the folder, before training.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    with open_run(config) as run:
        config = run.config  # type: ignore[assignment]
        require_fsdp2(run.accelerator)
        configure_zero(run.accelerator, config, run.checkpoint)
        info = load_code_info(config.codes)
        prior = _make_prior(config, info)
        train, validation = _load_splits(config, prior.config.num_classes > 0)
        digests = {"training codes": digest(*train)} | ({"validation codes": digest(*validation)} if validation else {})
        run.require_same_data({"the codes' tokenizer": info.fingerprint} | digests)
        if run.plan(len(train[0])):
            return run.folder
        tokenizer, why_no_pictures = _find_tokenizer(config, info)
        if prior.code_layout != info.layout:
            tokenizer, why_no_pictures = None, f"none: the prior models [{prior.code_layout}] alone"
        classes = f"{prior.config.num_classes} classes" if prior.config.num_classes else "no classes"
        run.announce(
            prior,
            {
                "codes": f"{info.layout}, {info.layout.bits:,.0f} bits an image, {classes}",
                "images": f"{len(train[0]):,} of {config.codes}",
                "validation": "none: give validation= to measure" if validation is None else f"{len(validation[0]):,}",
                "pictures": why_no_pictures or f"every {config.sample_every or run.total_steps} steps",
            },
            len(train[0]),
        )
        if config.compile:
            compile_blocks(prior, run.device)
        run.prepare(prior)
        if tokenizer is not None:
            tokenizer.to(run.device)
        batches = _code_batches(run, train, config)
        figures: dict[str, float] = {}

        prior.train()
        for step in run.steps():
            for codes, labels, seeds in islice(batches, config.accumulation_steps):
                with run.accelerator.accumulate(run.model):
                    modelled, condition = prior.split_condition(codes)
                    output = run.model(modelled, labels, condition=condition, seeds=seeds)
                    run.accelerator.backward(output.loss)
                    run.optimizer_step()
                    run.log.add({"loss": output.loss, **output.metrics})
            run.update_average()
            if run.due(config.log_every, step):
                run.log_means(step)
            if run.due(config.validate_every, step):
                figures = _validate(run, validation, info, step)
            if tokenizer is not None and run.due(config.sample_every, step):
                _draw(run, tokenizer, config, step)
            if run.due(config.checkpoint_every, step):
                run.save_checkpoint(step)
        if not figures:
            # All steps were done by an earlier sitting that was stopped before it could finish.
            run.log.cut_after(run.total_steps - 1, "validation")
            figures = _validate(run, validation, info, run.total_steps - 1)
        run.finish(figures)
        return run.folder


def _make_prior(config: PriorTrainingConfig, info: CodeInfo) -> Prior:
    class_names = info.class_names if config.class_conditional else None
    prior = build_prior(
        config.model,
        info.layout,
        fingerprint=info.fingerprint,
        num_classes=len(class_names or []),
        class_names=class_names,
    )
    if config.init_from is not None:
        load_matching_weights(prior, Prior.from_pretrained(config.init_from), config.init_from)
    try:
        prior.check_sampling(bool(class_names), from_mapping(prior.sampling_options, config.sampling, "sampling."))
    except ValueError as error:
        raise ValueError(f"the pictures cannot be drawn with sampling={config.sampling}: {error}") from error
    if config.activation_checkpointing:
        prior.checkpoint_activations()
    return prior


def _load_splits(config: PriorTrainingConfig, conditional: bool) -> tuple[Split, Split | None]:
    """Training and validation codes, the latter None where there are none."""

    def load(split: str) -> Split:
        codes, labels = load_code_tensor(config.codes, split)
        return codes, labels if conditional else None

    train = load(config.split)
    if len(train[0]) == 0:
        raise ValueError(f"{config.codes} split {config.split} holds no images")
    if conditional and train[1] is None:
        raise ValueError(f"{config.codes} split {config.split} has no labels; give class_conditional=false")
    if isinstance(config.validation, str):
        return train, load(config.validation)
    if config.validation is None:
        names = load_codes(config.codes).keys()
        others = [n for n in ("validation", "valid", "val", "test") if n in names and n != config.split]
        return train, load(others[0]) if others else None
    if config.validation == 0:
        return train, None
    parts = [torch.from_numpy(index) for index in hold_out(len(train[0]), config.validation, config.seed)]
    kept, held_out = [(train[0][i], None if train[1] is None else train[1][i]) for i in parts]
    return kept, held_out


def _find_tokenizer(config: PriorTrainingConfig, info: CodeInfo) -> tuple[ImageTokenizer | None, str]:
    """The tokenizer that draws pictures, and why there is none."""
    place = config.tokenizer or info.tokenizer
    if place is None:
        return None, "none: the codes name no tokenizer; give tokenizer=DIR to draw some"
    try:
        tokenizer = ImageTokenizer.from_pretrained(place)
    except (ValueError, OSError):
        if config.tokenizer is not None:
            raise
        return None, f"none: the tokenizer recorded beside the codes, {place}, cannot be read; give tokenizer=DIR"
    if tokenizer.fingerprint != info.fingerprint:
        raise ValueError(
            f"the tokenizer in {place} is not the one that made {config.codes}: their fingerprints differ; encode the "
            "dataset again, or give tokenizer=DIR of the right one"
        )
    return tokenizer.eval(), ""


def _code_batches(
    run: TrainingRun, split: Split, config: PriorTrainingConfig
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Endless micro-batches of codes, labels and seeds on the device."""
    codes, labels = split
    for items in run.stream(len(codes)):
        index, positions = torch.tensor(items).T
        yield (
            codes[index].long().to(run.device, non_blocking=True),
            None if labels is None else labels[index].to(run.device, non_blocking=True),
            mix(config.seed, positions).to(run.device, non_blocking=True),
        )


@torch.compiler.set_stance("force_eager")  # other batch sizes and modes would be compiled anew
def _validate(run: TrainingRun, validation: Split | None, info: CodeInfo, step: int) -> dict[str, float]:
    """Figures over the validation split, logged; none where there is no such split."""
    if validation is None:
        return {}
    with run.evaluated() as prior:
        figures = evaluate_prior(
            prior,
            *validation,
            run.accelerator,
            batch_size=run.config.batch_size,
            image_shape=info.image_shape,
            max_batches=2 if run.config.dry_run else None,
        )
    run.log.write(step, "validation", run.seconds, figures)
    bits, what = figures.get("bits_per_code"), "bits per code"
    if bits is None:
        bits, what = figures["bits_per_code_bound"], "bits per code at most (a bound)"
    run.log.print(f"{bits:.3f} {what}; histogram: {figures['first_order_bits_per_code']:.3f}", f"step {step + 1}")
    return figures


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def _draw(run: TrainingRun, tokenizer: ImageTokenizer, config: PriorTrainingConfig, step: int) -> None:
    """A grid of samples, the same seeds every time; classes in turn. All processes draw: a sharded model needs them."""
    index = torch.arange(config.num_samples, device=run.device)
    with run.evaluated() as prior, run.accelerator.autocast():
        num_classes = prior.config.num_classes
        labels = index % num_classes if num_classes else None
        codes = prior.sample(len(index), labels, seeds=mix(index, config.seed), **config.sampling)
    if not run.is_main:
        return
    columns = min(len(index), num_classes or round(len(index) ** 0.5), 16)
    run.log.picture(step, "samples", picture_grid(tokenizer.decode(codes), max(1, columns)))
