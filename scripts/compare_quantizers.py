"""Train a tokenizer with each quantizer and print a table: scripts/compare_quantizers.py dataset=... key=value ..."""

from configs.command_line import run
from pipelines.benchmarks.quantizer_comparison import ComparisonConfig, compare_quantizers

if __name__ == "__main__":
    run(compare_quantizers, ComparisonConfig)
