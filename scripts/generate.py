"""Sample images: scripts/generate.py tokenizer=DIR prior=DIR num_images=... labels=...; --help lists the keys."""

from configs.command_line import run
from configs.generation import GenerationConfig
from pipelines import generate

if __name__ == "__main__":
    run(generate, GenerationConfig)
