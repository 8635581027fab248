"""A tokenizer's training step as something to be timed: what `train_tokenizer` does between data and log."""

from __future__ import annotations

import itertools

import torch

from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks.harness import Run
from pipelines.devices import make_accelerator
from pipelines.optimization import make_optimizer
from tokenizer import build_tokenizer
from tokenizer.objective import reconstruction_losses


def tokenizer_step(config: TokenizerTrainingConfig) -> Run:
    """Set up a fresh tokenizer and a batch of noise; each call is one optimizer step on it.

    Returns:
        A function without arguments that returns the loss, a detached scalar.
    """
    accelerator = make_accelerator(config.mixed_precision)
    tokenizer = build_tokenizer(config.model, config.quantizer, image_size=config.data.image_size)
    torch.nn.Module.to(tokenizer, memory_format=torch.channels_last)
    tokenizer.to(accelerator.device)
    model, optimizer = accelerator.prepare(tokenizer, make_optimizer(config, tokenizer))
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, *tokenizer.image_shape)
    images = torch.rand(shape, generator=generator).mul_(2).sub_(1)
    images = images.to(accelerator.device, memory_format=torch.channels_last)
    seeds = torch.arange(config.batch_size, device=accelerator.device)
    steps = itertools.count()
    tokenizer.train()

    def run() -> torch.Tensor:
        step = next(steps)
        tokenizer.quantizer.anneal(0.5)
        output = model(images, seeds)
        losses = reconstruction_losses(config.objective, images, output.reconstruction) | output.losses
        loss = torch.stack(list(losses.values())).sum()
        accelerator.backward(loss)
        if config.max_grad_norm:
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.quantizer.update(step)
        return loss.detach()

    return run
