"""Declarations without torch: the contract between the stages, run schemas and YAML presets."""

from configs.loading import load_config
from configs.schema import (
    DataConfig,
    EncodingConfig,
    EvaluationConfig,
    GenerationConfig,
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
