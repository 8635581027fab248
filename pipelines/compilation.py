"""torch.compile for the parts of trainings, which keep their names."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch
from torch import Tensor, nn

from prior import Prior
from tokenizer import ImageTokenizer


def require_compiler(device: torch.device) -> None:
    """Raise a ValueError where nothing can be compiled."""
    # Where torch looks for one.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true needs a C++ compiler, and there is no {compiler}: install it, or name one in CXX"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compile=true on a GPU needs the package triton: pip install triton")


def compile_blocks(prior: Prior, device: torch.device) -> None:
    """Let each block of a prior be compiled when it is first called; state dicts stay as they are.

    Raises:
        ValueError: where nothing can be compiled.
    """
    require_compiler(device)
    for module in prior.modules():
        if type(module).__name__ in (prior._no_split_modules or ()):
            module.compile()


def compile_tokenizer(tokenizer: ImageTokenizer) -> None:
    """Let encoder and decoder be compiled when they are first called; state dicts stay as they are.

    The decoder's last layer stays out, because the adaptive weight asks for gradients there, and would have to go
    through all that is compiled together with it.
    """
    tokenizer.encoder.compile()
    decoder = tokenizer.decoder
    assert isinstance(decoder, nn.Sequential)
    body = torch.compile(nn.Sequential(*list(decoder)[:-1]))

    def forward(latents: Tensor) -> Tensor:
        return decoder[-1](body(latents))

    decoder.forward = forward  # type: ignore[method-assign]
