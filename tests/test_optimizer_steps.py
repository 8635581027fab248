"""Optimizer steps in float16: one scale for all losses and all optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ADVERSARIAL, TINY_MODEL, TINY_QUANTIZER, TINY_RUN, weights
from torch import nn

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from pipelines import train_tokenizer, training_run
from pipelines.optimization import step_optimizers


def trained(steps: int, scaler: Any, *, overflow_at: int | None = None, max_grad_norm: float = 0.0) -> list[nn.Module]:
    """Two models that share a loss, after some steps; the gradient of one of them overflows at a step."""
    torch.manual_seed(0)
    models: list[nn.Module] = [nn.Linear(3, 2), nn.Linear(2, 1)]
    optimizers: dict[str, torch.optim.Optimizer] = {
        str(i): torch.optim.SGD(model.parameters(), lr=0.1) for i, model in enumerate(models)
    }
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    for optimizer in optimizers.values():
        accelerator.prepare(optimizer)
    for step in range(steps):
        loss = models[1](models[0](torch.full((4, 3), float(step)))).square().mean()
        accelerator.backward(loss)
        if step == overflow_at:
            models[1].weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        step_optimizers(accelerator, models, optimizers, max_grad_norm)
    return models


def same(mine: list[nn.Module], theirs: list[nn.Module]) -> bool:
    pairs = zip(mine, theirs, strict=True)
    return all(torch.equal(a, b) for m, t in pairs for a, b in zip(m.parameters(), t.parameters(), strict=True))


def scaler(growth_interval: int = 1000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth_interval)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("growth_interval", [1, 2, 1000])
def test_a_scale_that_grows_between_steps_changes_nothing(growth_interval: int, max_grad_norm: float) -> None:
    scaled = scaler(growth_interval)
    mine = trained(6, scaled, max_grad_norm=max_grad_norm)
    assert same(mine, trained(6, None, max_grad_norm=max_grad_norm))
    assert scaled.get_scale() == 2.0 ** (10 + 6 // growth_interval)


def test_where_one_gradient_overflows_that_model_stays_and_the_scale_falls_once() -> None:
    scaled = scaler()
    before = trained(3, None)
    after = trained(4, scaled, overflow_at=3)
    assert same(after[1:], before[1:])
    assert scaled.get_scale() == 2.0**9


def test_an_optimizer_without_gradients_waits() -> None:
    models: list[nn.Module] = [nn.Linear(2, 1), nn.Linear(2, 1)]
    optimizers: dict[str, torch.optim.Optimizer] = {
        str(i): torch.optim.SGD(model.parameters(), lr=0.1) for i, model in enumerate(models)
    }
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()
    before = models[1].weight.detach().clone()
    accelerator.backward(models[0](torch.ones(1, 2)).sum())
    step_optimizers(accelerator, models, optimizers, 0.0)
    assert torch.equal(models[1].weight, before)


def test_a_tokenizer_with_a_discriminator_trains_the_same_under_a_scale(
    image_folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str) -> dict[str, torch.Tensor]:
        given = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, *ADVERSARIAL, "steps=5", "mixed_precision=no"]
        given += ["data.image_size=16", f"data.dataset={image_folder}", f"output_dir={tmp_path / name}"]
        return weights(train_tokenizer(load_config(TokenizerTrainingConfig, None, given)))

    plain = train("plain")

    def with_scaler(*args: Any, **kwargs: Any) -> Accelerator:
        accelerator = make(*args, **kwargs)
        accelerator.scaler = scaler(2)
        return accelerator

    make = training_run.make_run_accelerator
    monkeypatch.setattr(training_run, "make_run_accelerator", with_scaler)
    torch.testing.assert_close(train("scaled"), plain, rtol=1e-5, atol=1e-6)
