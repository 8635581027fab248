"""Priors: distributions over codes, built from their layout alone. One file and one line in the table each."""

from collections.abc import Mapping
from typing import Any

from configs.layout import CodeLayout
from configs.loading import check_options
from prior.base import Prior, PriorConfig, PriorOutput
from prior.gpt import GPT
from prior.maskgit import MaskGIT
from prior.pixelcnn import PixelCNN

PRIORS: dict[str, type[Prior]] = {
    "gpt": GPT,
    "maskgit": MaskGIT,
    "pixelcnn": PixelCNN,
}

PRIOR_CONFIGS: dict[str, type[PriorConfig]] = {name: cls.config_class for name, cls in PRIORS.items()}


def build_prior(model: Mapping[str, Any], layout: CodeLayout, **written: Any) -> Prior:
    """A fresh prior from the YAML block `model`, a code layout, and what the training writes into its config.

    Raises:
        ValueError: for an unknown name or option, a value out of range, or a layout that the prior cannot model.
    """
    check_options("model", model, PRIOR_CONFIGS)
    options = {key: value for key, value in model.items() if key != "name"}
    return PRIORS[model["name"]](PRIOR_CONFIGS[model["name"]](**options, layout=layout.to_list(), **written))


__all__ = ["PRIORS", "PRIOR_CONFIGS", "Prior", "PriorConfig", "PriorOutput", "build_prior"]
