"""Compiled training of priors: the blocks are compiled, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_RUN, metrics, weights
from torch import nn

from configs.loading import load_config
from configs.schema import PriorTrainingConfig
from pipelines import train_prior

Train = Callable[..., Path]

MODELS = {
    "gpt": ["model.name=gpt", "model.width=16", "model.num_layers=2", "model.num_heads=2"],
    "maskgit": ["model.name=maskgit", "model.width=16", "model.num_layers=2", "model.num_heads=2", "sampling.steps=3"],
    "pixelcnn": ["model.name=pixelcnn", "model.width=16", "model.num_layers=2", "model.attention_every=2"],
}


@pytest.fixture
def train(tmp_path: Path, code_folder: Path) -> Train:
    def run(name: str, *overrides: str) -> Path:
        given = [*TINY_RUN, "steps=4", "mixed_precision=no", f"codes={code_folder}", "model.dropout=0", "num_samples=2"]
        return train_prior(
            load_config(PriorTrainingConfig, None, [*given, f"output_dir={tmp_path / name}", *overrides])
        )

    return run


def require_same(compiled: Path, eager: Path) -> None:
    mine, theirs = weights(compiled), weights(eager)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(metrics(compiled), metrics(eager), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_block_of_a_prior_is_compiled_and_trains_as_before(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plainly, compiled = nn.Module.compile, []

    def compile_with_backend(module: nn.Module) -> None:
        compiled.append(module)
        plainly(module, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_with_backend)
    torch._dynamo.reset()
    run = train("compiled", *MODELS[name], "compile=true")
    assert len(compiled) == 2
    assert graphs
    require_same(run, train("eager", *MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["activation_checkpointing=true"]], ids=["plain", "checkpointing"])
def test_a_prior_trains_compiled_with_the_real_compiler(train: Train, options: list[str]) -> None:
    torch._dynamo.reset()
    require_same(train("compiled", *MODELS["gpt"], "compile=true", *options), train("eager", *MODELS["gpt"], *options))


def test_without_a_compiler_a_compiled_training_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler, and there is no no-such-compiler"):
        train("run", *MODELS["gpt"], "compile=true")
