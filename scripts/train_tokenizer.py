"""Train a tokenizer: scripts/train_tokenizer.py --config FILE.yaml key=value ...; --help lists the keys."""

from configs.command_line import run
from configs.loading import Choices
from configs.schema import TokenizerTrainingConfig
from pipelines import train_tokenizer
from pipelines.devices import leave_process_group
from tokenizer import TOKENIZER_CONFIGS
from tokenizer.discriminator import DISCRIMINATORS
from tokenizer.quantizers import QUANTIZERS

if __name__ == "__main__":
    choices: Choices = {"model": TOKENIZER_CONFIGS, "quantizer": QUANTIZERS, "discriminator": DISCRIMINATORS}
    run(train_tokenizer, TokenizerTrainingConfig, choices)
    leave_process_group()
