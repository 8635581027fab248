"""Encode images: scripts/encode_dataset.py tokenizer=DIR data.dataset=... output_dir=...; --help lists the keys."""

from configs.command_line import run
from configs.schema import EncodingConfig
from pipelines import encode_dataset
from pipelines.devices import leave_process_group

if __name__ == "__main__":
    run(encode_dataset, EncodingConfig)
    leave_process_group()
