"""A tokenizer's training step as something to be timed: what `train_tokenizer` does between data and log."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile

import torch
from torch import Tensor

from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks.harness import Run
from pipelines.tokenizer_training import learn, make_tokenizer, prepare_models
from pipelines.training_run import TrainingRun
from tokenizer.objective import TokenizerObjective


def tokenizer_step(config: TokenizerTrainingConfig) -> Run:
    """Set up a fresh tokenizer and a batch of noise; each call is one optimizer step on it, in the middle of training.

    Returns:
        A function without arguments that returns the loss, a detached scalar.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(dataclasses.replace(config, output_dir=folder))
        run.plan(config.batch_size)
        tokenizer = make_tokenizer(config)
        objective = TokenizerObjective(config.objective, tokenizer, run.total_steps)
        prepare_models(run, config, tokenizer, objective)
        assert run.locked is not None
        run.locked.close()
    images = torch.rand((config.batch_size, *tokenizer.image_shape)) * 2 - 1
    images = images.to(run.device, memory_format=torch.channels_last)
    seeds = torch.arange(config.batch_size, device=run.device)
    steps = itertools.count(max(config.quantize_after, objective.adversarial_start))
    tokenizer.train()
    tokenizer.quantizer.anneal(0.5)

    def step() -> Tensor:
        number = next(steps)
        parts = zip(images.chunk(config.accumulation_steps), seeds.chunk(config.accumulation_steps), strict=True)
        losses = [learn(run, config, objective, *part, number)[1]["loss"].detach() for part in parts]
        tokenizer.quantizer.update(number)
        run.update_average()
        return torch.stack(losses).mean()

    if config.compile:
        step()  # what compiling takes belongs to the set-up
    return step
