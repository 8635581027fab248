"""Measure a tokenizer on images, a prior on codes, or both: scripts/evaluate.py tokenizer=DIR data.dataset=..."""

from configs.command_line import run
from configs.evaluation import EvaluationConfig
from pipelines import evaluate
from pipelines.devices import leave_process_group

if __name__ == "__main__":
    run(evaluate, EvaluationConfig)
    leave_process_group()
