"""Passes over a validation or test split that measure a tokenizer or a prior, the same on any number of processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.evaluation import EvaluationConfig
from configs.random_streams import mix
from pipelines import metrics
from pipelines.code_data import load_code_info, load_code_tensor
from pipelines.code_use import CodeUse
from pipelines.devices import describe_hardware, explain_out_of_memory, make_accelerator
from pipelines.image_data import ImageDataset, default_num_workers, image_batches, in_order, prepare_dataset
from pipelines.image_sources import load_source
from pipelines.sampling_figures import measure_sampling
from prior import Prior
from tokenizer import ImageTokenizer


def share_of_process(batches: list[Any], accelerator: Accelerator) -> list[Any]:
    """Every N-th batch: the part of this process."""
    return batches[accelerator.process_index :: accelerator.num_processes]


def _precise(device: torch.device) -> torch.dtype:
    """The type of sums over a split: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    dataset: ImageDataset,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int = 0,
    max_batches: int | None = None,
    quantize: bool = True,
) -> dict[str, float]:
    """Figures over a split, each image once over all processes.

    Returns:
        psnr_db (mean over images), mean absolute error `l1` and mean squared error `l2` in [-1, 1] units, sharpness
        (the reconstructions' Laplacian energy, in units of the originals'), codebook_usage (share of codes that occur)
        and codebook_perplexity, over the codebooks of all levels; without `quantize` there are no codes.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    code_use = CodeUse(tokenizer.quantizer, accelerator)
    # psnr, l1, l2, Laplacian energies of reconstructions and of originals, images
    sums = torch.zeros(6, dtype=_precise(accelerator.device), device=accelerator.device)
    batches = share_of_process(in_order(len(dataset), batch_size)[:max_batches], accelerator)
    for batch in image_batches(dataset, batches, accelerator.device, num_workers):
        with accelerator.autocast():
            output = tokenizer(batch.images, quantize=quantize)
        error = batch.images - output.reconstruction.float()
        values = [
            metrics.psnr(batch.images, output.reconstruction).sum(),
            error.abs().flatten(1).mean(1).sum(),
            error.square().flatten(1).mean(1).sum(),
            metrics.laplacian_energy(output.reconstruction.float().clamp(-1, 1)).sum(),
            metrics.laplacian_energy(batch.images).sum(),
            torch.tensor(len(batch.images), device=accelerator.device),
        ]
        sums += torch.stack([value.to(sums.dtype) for value in values])
        code_use.add(output.codes)
    tokenizer.train(was_training)
    psnr, l1, l2, sharp, originally, num_images = accelerator.reduce(sums, "sum").tolist()
    figures_of_codes, _ = code_use.take()
    return {
        "psnr_db": psnr / num_images,
        "l1": l1 / num_images,
        "l2": l2 / num_images,
        "sharpness": sharp / originally if originally else 1.0,
        **figures_of_codes,
    }


@torch.no_grad()
def evaluate_prior(
    prior: Prior,
    codes: Tensor,
    labels: Tensor | None,
    accelerator: Accelerator,
    *,
    batch_size: int,
    image_shape: tuple[int, int, int],
    max_batches: int | None = None,
) -> dict[str, float]:
    """Figures over a split of codes `(N, *layout.shape)`, each image once over all processes.

    Returns:
        loss (nats per code), bits_per_code, bits_per_pixel (over height times width), perplexity (per code), all four
        with the ending `_bound` where the prior has no `log_prob` but an upper bound; beside them two entropies of the
        split's own codes: first_order_bits_per_code of their histogram, per_position_bits_per_code of a histogram at
        each place.
    """
    was_training = prior.training
    prior.eval()
    sums = torch.zeros(2, dtype=_precise(accelerator.device), device=accelerator.device)  # nats, codes
    starts = list(range(0, len(codes), batch_size))[:max_batches]
    for start in share_of_process(starts, accelerator):
        here = slice(start, start + batch_size)
        batch, condition = prior.split_condition(codes[here].to(accelerator.device).long())
        classes = None if labels is None else labels[here].to(accelerator.device)
        # Where the figure is an estimate, an image has the same masks in every evaluation.
        seeds = mix(torch.arange(start, start + len(batch), device=accelerator.device), 0)
        with accelerator.autocast():
            loss = prior(batch, classes, condition=condition, seeds=seeds).loss
        sums += torch.stack([loss * batch.numel(), loss.new_tensor(batch.numel())]).to(sums.dtype)
    prior.train(was_training)
    nats, num_codes = accelerator.reduce(sums, "sum").tolist()
    bits = metrics.to_bits(nats / num_codes)
    _, height, width = image_shape
    L, K = prior.code_layout.num_codes, prior.code_layout.vocab_size
    modelled = prior.split_condition(codes)[0].long()
    figures = {
        "loss": nats / num_codes,
        "bits_per_code": bits,
        "bits_per_pixel": bits * L / (height * width),
        "perplexity": 2**bits,
    }
    if not prior.has_log_prob:
        figures = {f"{name}_bound": value for name, value in figures.items()}
    return figures | {
        "first_order_bits_per_code": metrics.to_bits(metrics.entropy(metrics.count_codes(modelled, K))),
        "per_position_bits_per_code": metrics.to_bits(metrics.entropy(metrics.count_codes(modelled.flatten(1), K, L))),
    }


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measure a saved tokenizer on images, a saved prior on codes, or both; print the figures, and save them if asked.

    Raises:
        ValueError: where a folder, split or column does not exist, or codes are of another layout.
    """
    accelerator = make_accelerator(config.mixed_precision)
    device = accelerator.device
    figures: dict[str, Any] = {}
    with explain_out_of_memory(f"lower batch_size={config.batch_size}"):
        if config.tokenizer is not None:
            tokenizer = ImageTokenizer.from_pretrained(config.tokenizer).to(device)
            source = load_source(config.data)
            num_classes = len(source.class_names) if source.class_names else None
            dataset = ImageDataset(source.split(config.split), tokenizer.config.preprocessing, num_classes=num_classes)
            prepare_dataset(dataset, config.data, cache_mib=0, show=accelerator.is_main_process)
            figures |= evaluate_tokenizer(
                tokenizer,
                dataset,
                accelerator,
                batch_size=config.batch_size,
                num_workers=default_num_workers(config.data),
            )
            figures |= {"num_images": len(dataset), "num_skipped": dataset.num_skipped}
        if config.prior is not None:
            prior = Prior.from_pretrained(config.prior).to(device)
            info = load_code_info(config.codes)
            prior.require_codes(info.layout, info.fingerprint, f"codes={config.codes}")
            codes, labels = load_code_tensor(config.codes, config.split)
            found = evaluate_prior(
                prior,
                codes,
                labels if prior.config.num_classes else None,
                accelerator,
                batch_size=config.batch_size,
                image_shape=info.image_shape,
            )
            figures |= found | {"num_coded_images": len(codes)}
            if config.num_samples:
                _, condition = prior.split_condition(codes[: config.num_samples].to(device).long())
                figures |= measure_sampling(prior, config.num_samples, accelerator, condition, compiled=config.compile)
    figures |= {"hardware": describe_hardware(device), "mixed_precision": accelerator.mixed_precision}
    if accelerator.is_main_process:
        for name, value in figures.items():
            print(f"{name:>28}  {value:.4f}" if isinstance(value, float) else f"{name:>28}  {value}")
        if config.output_file is not None:
            Path(config.output_file).parent.mkdir(parents=True, exist_ok=True)
            Path(config.output_file).write_text(json.dumps(figures | {"config": asdict(config)}, indent=2) + "\n")
    return figures
