"""Quantizers: latents to integer codes. One paper a file, one line in the table."""

from collections.abc import Mapping
from typing import Any

from configs.loading import check_options
from tokenizer.quantizers.base import Quantizer, QuantizerOutput
from tokenizer.quantizers.bsq import BSQ
from tokenizer.quantizers.cvq import CVQ
from tokenizer.quantizers.ema import EMAQuantizer
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.gumbel import GumbelQuantizer
from tokenizer.quantizers.ibq import IBQ
from tokenizer.quantizers.lfq import LFQ
from tokenizer.quantizers.multiscale import MultiscaleQuantizer
from tokenizer.quantizers.product import ProductQuantizer
from tokenizer.quantizers.residual import ResidualQuantizer
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "bsq": BSQ,
    "cvq": CVQ,
    "ema": EMAQuantizer,
    "fsq": FSQ,
    "gumbel": GumbelQuantizer,
    "ibq": IBQ,
    "lfq": LFQ,
    "multiscale": MultiscaleQuantizer,
    "product": ProductQuantizer,
    "residual": ResidualQuantizer,
    "simvq": SimVQ,
    "vq": VectorQuantizer,
}


def build_quantizer(options: Mapping[str, Any], dim: int) -> Quantizer:
    """The quantizer that a YAML block `{name: ..., option: value}` describes, for latents with `dim` channels.

    Raises:
        ValueError: for an unknown name or option, or a value out of range.
    """
    check_options("quantizer", options, QUANTIZERS)
    arguments = {key: value for key, value in options.items() if key != "name"}
    try:
        return QUANTIZERS[options["name"]](dim, **arguments)
    except TypeError as error:
        raise ValueError(f"quantizer {options['name']} cannot take {arguments}: {error}") from error


__all__ = ["QUANTIZERS", "Quantizer", "QuantizerOutput", "build_quantizer"]
