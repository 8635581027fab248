"""Train a prior: scripts/train_prior.py --config configs/prior/X.yaml codes=DIR key=value; --help lists the keys."""

from configs.command_line import run
from configs.schema import PriorTrainingConfig
from pipelines import train_prior
from pipelines.devices import leave_process_group
from prior import PRIOR_CONFIGS

if __name__ == "__main__":
    run(train_prior, PriorTrainingConfig, {"model": PRIOR_CONFIGS})
    leave_process_group()
