"""Turn a dataset of images into a dataset of codes: the second of the four verbs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from configs.schema import EncodingConfig
from pipelines.code_data import CodeInfo, code_dtype, is_code_dataset, load_codes, make_split
from pipelines.devices import explain_out_of_memory, make_accelerator
from pipelines.image_data import ImageDataset, default_num_workers, image_batches, in_order, prepare_dataset
from pipelines.image_sources import load_source, resolve_dataset_name
from pipelines.run_folder import whole_folder
from tokenizer import ImageTokenizer


def encode_dataset(config: EncodingConfig) -> Path:
    """Encode every split of an image dataset, each image once and in source order; return the code dataset's folder.

    The folder appears when it is whole. Where it holds the same codes already, nothing is done.

    Raises:
        ValueError: where a folder is missing or of the wrong kind, or `output_dir` holds something else.
    """
    accelerator = make_accelerator(config.mixed_precision)
    tokenizer = ImageTokenizer.from_pretrained(config.tokenizer).to(accelerator.device).eval()
    tokenizer.to(memory_format=torch.channels_last)
    origin = {
        "dataset": resolve_dataset_name(config.data.dataset),
        "name": config.data.name,
        "image_column": config.data.image_column,
        "label_column": config.data.label_column,
        "skip_broken": config.data.skip_broken,
        "mixed_precision": accelerator.mixed_precision,
    }
    output = Path(config.output_dir)
    if _is_done(output, tokenizer.fingerprint, origin):
        if accelerator.is_main_process:
            print(f"{output} holds these codes already: {_count(output)}")
        return output
    source = load_source(config.data)
    folder = Path(config.tokenizer)
    info = CodeInfo(
        layout=tokenizer.code_layout,
        fingerprint=tokenizer.fingerprint,
        class_names=source.class_names,
        tokenizer=str(folder.resolve()) if folder.exists() else config.tokenizer,
        image_shape=tokenizer.image_shape,
        origin=origin,
    )
    # Every process writes the codes of its own block of each split; the main process joins the blocks.
    scratch = output.parent / f".{output.name}.encoding"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    accelerator.wait_for_everyone()
    labels: dict[str, np.ndarray | None] = {}
    for name, rows in source.splits.items():
        dataset = ImageDataset(
            rows, tokenizer.config.preprocessing, num_classes=len(source.class_names) if source.class_names else None
        )
        prepare_dataset(dataset, config.data, cache_mib=0)
        if dataset.num_skipped and accelerator.is_main_process:
            print(f"{name}: skipped {dataset.num_skipped} broken images")
        labels[name] = dataset.labels.numpy() if dataset.labelled else None
        with explain_out_of_memory(f"lower batch_size={config.batch_size}"):
            codes = _encode_block(tokenizer, dataset, accelerator, config, name)
        np.save(scratch / f"{name}-{accelerator.process_index}.npy", codes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        splits = {}
        for name in source.splits:
            parts = [np.load(scratch / f"{name}-{i}.npy", mmap_mode="r") for i in range(accelerator.num_processes)]
            splits[name] = make_split(np.concatenate(parts), labels[name], info)
        with whole_folder(output) as partial:
            datasets.disable_progress_bars()
            datasets.DatasetDict(splits).save_to_disk(str(partial))
            info.write(partial)
        shutil.rmtree(scratch)
        print(f"{output}: {_count(output)}, codes {info.layout}, {info.layout.bits:,.0f} bits an image")
    accelerator.wait_for_everyone()
    return output


@torch.no_grad()
def _encode_block(
    tokenizer: ImageTokenizer,
    dataset: ImageDataset,
    accelerator: Accelerator,
    config: EncodingConfig,
    name: str,
) -> np.ndarray:
    """The codes `(n, num_codes)` of this process's contiguous block of a split, in the smallest type."""
    layout = tokenizer.code_layout
    batches = in_order(len(dataset), config.batch_size)
    size = -(-len(batches) // accelerator.num_processes)
    mine = batches[accelerator.process_index * size : (accelerator.process_index + 1) * size]
    codes = [np.empty((0, layout.num_codes), code_dtype(layout.vocab_size))]
    bar = tqdm(
        total=sum(map(len, mine)),
        desc=f"encoding {name}",
        unit="img",
        disable=None if accelerator.is_main_process else True,
    )
    with bar:
        for batch in image_batches(dataset, mine, accelerator.device, default_num_workers(config.data)):
            with accelerator.autocast():
                found = tokenizer.encode(batch.images)
            codes.append(found.flatten(1).cpu().numpy().astype(codes[0].dtype))
            bar.update(len(found))
    return np.concatenate(codes)


def _count(folder: Path) -> str:
    return ", ".join(f"{len(rows):,} {name}" for name, rows in load_codes(folder).items())


def _is_done(output: Path, fingerprint: str, origin: dict[str, Any]) -> bool:
    """Whether these very codes stand in `output`.

    Raises:
        ValueError: where something else does.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file; choose another output_dir")
    if not output.exists() or not any(output.iterdir()):
        return False
    if not is_code_dataset(output):
        found = ", ".join(sorted(p.name for p in output.iterdir())[:6])
        raise ValueError(f"{output} is not empty and holds no codes ({found}); choose another output_dir")
    info = CodeInfo.read(output)
    if info.fingerprint != fingerprint:
        raise ValueError(f"{output} holds codes of another tokenizer ({info.tokenizer}); choose another output_dir")
    differing = [f"{k}: {info.origin.get(k)!r} there, {v!r} now" for k, v in origin.items() if info.origin.get(k) != v]
    if differing:
        raise ValueError(f"{output} holds other codes: {'; '.join(differing)}; choose another output_dir")
    return True
