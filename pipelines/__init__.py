"""Everything that moves data through models: train a tokenizer, encode, train a prior, sample, measure."""

from pipelines.code_data import load_code_tensor, load_codes
from pipelines.encoding import encode_dataset
from pipelines.evaluation import evaluate
from pipelines.generation import generate
from pipelines.image_generation import ImageGenerationPipeline
from pipelines.pipeline_base import GenerationOutput
from pipelines.prior_training import train_prior
from pipelines.tokenizer_training import train_tokenizer

__all__ = [
    "GenerationOutput",
    "ImageGenerationPipeline",
    "encode_dataset",
    "evaluate",
    "generate",
    "load_code_tensor",
    "load_codes",
    "train_prior",
    "train_tokenizer",
]
