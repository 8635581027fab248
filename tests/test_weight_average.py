"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.weight_average import WeightAverage, averaged


def some_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_the_average_is_the_recurrence_with_a_decay_that_rises_to_the_given_one():
    model = some_model()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    average = WeightAverage(model, 0.5)
    for step in range(12):
        move(model, step)
        average.update()
        decay = min(0.5, step / (9 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    torch.testing.assert_close(average.parameters, expected, rtol=1e-6, atol=1e-6)
    assert {min(0.5, step / (9 + step)) for step in range(12)} > {0.0, 0.1, 0.5}


def test_the_model_has_the_averaged_weights_inside_and_its_own_to_the_bit_after_it_and_after_an_error():
    model = some_model()
    average = WeightAverage(model, 0.9)
    move(model, 0)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with averaged(average):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, average.parameters[name])
            assert not torch.equal(parameter, own[name])
    with pytest.raises(OSError, match="gone"), averaged(average):
        raise OSError("gone")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_without_an_average_nothing_changes():
    with averaged(None):
        pass


def test_a_restart_takes_the_weights_as_they_are():
    model = some_model()
    average = WeightAverage(model, 0.9)
    for step in range(30):
        move(model, step)
        average.update()
    average.restart()
    assert average.num_updates == 0
    assert all(torch.equal(average.parameters[name], parameter) for name, parameter in model.named_parameters())
    # The parameters that are averaged are not those that are trained.
    move(model, 99)
    assert not any(torch.equal(average.parameters[name], parameter) for name, parameter in model.named_parameters())
