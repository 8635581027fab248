"""Declarations without torch: the contract between the stages, run schemas and YAML presets."""

import os

# Before the libraries are imported: they would report to a server that they are used, which nobody asked for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

from configs.evaluation import EvaluationConfig
from configs.generation import GenerationConfig
from configs.loading import load_config
from configs.schema import (
    DataConfig,
    EncodingConfig,
    ObjectiveConfig,
    PriorTrainingConfig,
    SourceConfig,
    TokenizerTrainingConfig,
)

__all__ = [
    "DataConfig",
    "EncodingConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "ObjectiveConfig",
    "PriorTrainingConfig",
    "SourceConfig",
    "TokenizerTrainingConfig",
    "load_config",
]
