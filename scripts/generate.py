"""Sample images: scripts/generate.py tokenizer=DIR prior=DIR num_images=... labels=...; --help lists the keys."""

from configs.command_line import run
from configs.generation import GenerationConfig
from pipelines import generate
from pipelines.devices import leave_process_group

if __name__ == "__main__":
    run(generate, GenerationConfig)
    leave_process_group()
