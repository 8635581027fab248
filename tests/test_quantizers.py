"""The contract of every quantizer in the table: shapes, types, state, random numbers and checkpointing."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_cases import (
    STOCHASTIC,
    VARIANTS,
    assert_same_state,
    decode,
    loss_of,
    state_of,
    tiny_quantizer,
    train_step,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.quantizers import QUANTIZERS, Quantizer, QuantizerOutput

GRIDS = [(7,), (3, 5), (2, 3, 4)]

every_quantizer = pytest.mark.parametrize("name", VARIANTS)
in_both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def assert_same_output(output: QuantizerOutput, expected: QuantizerOutput) -> None:
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.quantized, expected.quantized)
    torch.testing.assert_close(output.losses, expected.losses, rtol=0, atol=0)


def test_every_quantizer_of_the_table_is_among_the_variants():
    assert {block["name"] for block in VARIANTS.values()} == set(QUANTIZERS)


@in_both_modes
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@every_quantizer
def test_codes_are_int64_within_the_vocabulary_and_shaped_by_the_layout(name, grid, training):
    quantizer = tiny_quantizer(name, grid_dims=len(grid)).train(training)
    output = quantizer(torch.randn(3, 4, *grid))
    layout = quantizer.code_layout(grid)
    assert output.codes.dtype == torch.int64
    assert output.codes.shape == (3, *layout.shape)
    assert layout.vocab_size == quantizer.vocab_size == 16
    for part, code_grid in zip(layout.split(output.codes), layout.grids, strict=True):
        assert part.min() >= 0
        assert part.max() < code_grid.vocab_size
    assert output.quantized.shape == (3, 4, *grid)
    scalars = [*output.losses.values(), *output.metrics.values()]
    assert all(scalar.shape == () and scalar.dtype == torch.float32 and scalar.isfinite() for scalar in scalars)
    assert not any(metric.requires_grad for metric in output.metrics.values())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@every_quantizer
def test_decoding_the_codes_gives_the_quantized_latents(name, grid):
    quantizer = tiny_quantizer(name, grid_dims=len(grid)).eval()
    output = quantizer(torch.randn(2, 4, *grid))
    decoded = decode(quantizer, output.codes, *grid)
    assert decoded.dtype == output.quantized.dtype == torch.float32
    torch.testing.assert_close(decoded, output.quantized, rtol=0, atol=1e-6)
    if len(quantizer.code_layout(grid).grids) == 1:
        assert torch.equal(quantizer.decode(output.codes), decoded)


@in_both_modes
@every_quantizer
def test_autocast_to_bfloat16_changes_no_code_no_value_and_no_loss(name, training):
    # Uniform in [-1/K, 1/K]: codes so close together that bfloat16 mistakes most of them.
    quantizer = tiny_quantizer(name, vocab_size=512, codebook_start="uniform").train(training)
    latents, seeds = torch.empty(4, 4, 8, 8).uniform_(-1 / 512, 1 / 512), torch.arange(4)
    expected = quantizer(latents, seeds)
    decoded = decode(quantizer, expected.codes, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(latents, seeds)
        decoded_under_autocast = decode(quantizer, expected.codes, 8, 8)
    assert output.quantized.dtype == torch.float32
    assert_same_output(output, expected)
    assert torch.equal(decoded_under_autocast, decoded)


@every_quantizer
def test_autocast_to_bfloat16_changes_nothing_of_an_update(name):
    quantizer = tiny_quantizer(name, vocab_size=64, revive_after=1, revive_below=0.9)
    other = copy.deepcopy(quantizer)
    latents, seeds = torch.randn(4, 4, 8, 8), torch.arange(4)
    for each, autocast in ((quantizer, False), (other, True)):
        each.anneal(0.5)
        each(latents, seeds)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            each.update(0)
    assert_same_state(other, state_of(quantizer))


@pytest.mark.parametrize("name", ["ibq", "ibq-cosine", "vq-entropy"])
def test_autocast_to_bfloat16_changes_no_gradient_that_the_backward_pass_computes_in_blocks(name):
    quantizer, latents = tiny_quantizer(name, vocab_size=64), torch.randn(4, 4, 8, 8, requires_grad=True)
    gradients = []
    for autocast in (False, True):
        loss = loss_of(quantizer(latents))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(loss, [latents, *quantizer.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@in_both_modes
@every_quantizer
def test_matrix_products_of_medium_precision_change_no_code_no_value_and_no_loss(name, training):
    quantizer = tiny_quantizer(name, vocab_size=512, codebook_start="uniform").train(training)
    latents, seeds = torch.empty(4, 4, 8, 8).uniform_(-1 / 512, 1 / 512), torch.arange(4)
    expected = quantizer(latents, seeds)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same_output(quantizer(latents, seeds), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


SWITCHES = ["mkldnn.matmul", "mkldnn.conv", "cuda.matmul", "cudnn.conv"]


def switch(name: str) -> Any:
    """One of torch's newer switches of precision."""
    return operator.attrgetter(name)(torch.backends)


def precisions() -> list[str]:
    return [switch(name).fp32_precision for name in SWITCHES]


@pytest.fixture
def precision_switches() -> Iterator[None]:
    """Puts back what a test has switched."""
    switches = [torch.backends, torch.backends.mkldnn, torch.backends.cuda, torch.backends.cudnn]
    before = [(s, s.fp32_precision) for s in [*switches, *map(switch, SWITCHES)] if hasattr(s, "fp32_precision")]
    yield
    for each, precision in before:
        each.fp32_precision = precision


@pytest.mark.parametrize("name", SWITCHES)
def test_the_newer_switch_of_an_operator_is_left_and_restored(name, precision_switches):
    quantizer, latents = Identity(4, 2), torch.randn(2, 4, 8)
    quantizer.look = precisions
    switch(name).fp32_precision = "tf32"
    before = precisions()
    assert torch.equal(quantizer(latents).quantized, latents)
    assert set(quantizer.precision) <= {"ieee", "none"}
    assert precisions() == before
    assert "tf32" in before


def test_the_newer_switch_of_all_operators_is_left_and_still_decides_afterwards(precision_switches):
    quantizer, latents = Identity(4, 2), torch.randn(2, 4, 8)
    quantizer.look = precisions
    for name in SWITCHES:
        switch(name).fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    quantizer(latents)
    assert quantizer.precision == ["ieee"] * 4
    assert precisions() == ["tf32"] * 4
    torch.backends.fp32_precision = "ieee"
    assert switch("mkldnn.matmul").fp32_precision == switch("cuda.matmul").fp32_precision == "ieee"


class Identity(Quantizer):
    """The latents themselves, by way of a matrix product, which autocast would round."""

    precision: Any = ""
    look: Any = staticmethod(torch.get_float32_matmul_precision)

    def quantize(self, latents: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        self.precision = self.look()
        product = torch.eye(self.dim) @ latents.flatten(2)
        return QuantizerOutput(product.view_as(latents), latents.new_zeros(len(latents), *latents.shape[2:]).long())

    def embed(self, codes: Tensor) -> Tensor:
        self.precision = torch.get_float32_matmul_precision()
        raise KeyError("no codes")

    def start(self, latents: Tensor) -> None:
        self.precision = torch.get_float32_matmul_precision()


def test_the_base_class_turns_autocast_off_around_quantize():
    latents = torch.randn(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = Identity(4, 2)(latents).quantized
    torch.testing.assert_close(quantized, latents, rtol=0, atol=0)


def test_the_base_class_asks_for_full_precision_and_restores_what_was_set_also_after_an_error():
    quantizer = Identity(4, 2)
    torch.set_float32_matmul_precision("high")
    try:
        quantizer(torch.randn(2, 4, 8))
        assert (quantizer.precision, torch.get_float32_matmul_precision()) == ("highest", "high")
        quantizer.precision = ""
        quantizer.initialize(torch.randn(2, 4, 8))
        assert (quantizer.precision, torch.get_float32_matmul_precision()) == ("highest", "high")
        quantizer.precision = ""
        with pytest.raises(KeyError):
            quantizer.decode(torch.zeros(2, 8, dtype=torch.int64))
        assert (quantizer.precision, torch.get_float32_matmul_precision()) == ("highest", "high")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double], ids=str)
@every_quantizer
def test_a_cast_leaves_every_tensor_as_it_was_and_training_goes_on(name, dtype):
    quantizer = tiny_quantizer(name)
    untouched, before = copy.deepcopy(quantizer), state_of(quantizer)
    whole = nn.Sequential(nn.Linear(2, 2), quantizer)
    {torch.bfloat16: whole.bfloat16, torch.half: whole.half, torch.double: whole.double}[dtype]()
    assert whole[0].weight.dtype == dtype
    whole.to(torch.bfloat16).to("cpu", dtype)
    assert_same_state(quantizer, before)
    latents = torch.randn(2, 4, 6, 6)
    for step in range(2):
        assert torch.equal(quantizer.eval()(latents).codes, untouched.eval()(latents).codes)
        quantized = train_step(quantizer.train(), latents.clone(), step)
        assert torch.equal(quantized, train_step(untouched.train(), latents.clone(), step))
    assert_same_state(quantizer, state_of(untouched))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double], ids=str)
@every_quantizer
def test_latents_of_another_type_have_the_codes_of_the_same_values_in_float32(name, dtype):
    quantizer = tiny_quantizer(name).eval()
    latents = torch.randn(2, 4, 8, 8).to(dtype)
    output = quantizer(latents)
    assert output.quantized.dtype == torch.float32
    assert_same_output(output, quantizer(latents.float()))


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 4), (4,)], ids=str)
@every_quantizer
def test_latents_of_another_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=r"expected latents \(B, 4, \*grid\), got \("):
        tiny_quantizer(name)(torch.randn(shape))


# State


@every_quantizer
def test_save_load_continue_equals_not_having_stopped(name, tmp_path: Path):
    # Revival falls into the second half, and its window reaches into the first. Every other batch has fewer vectors
    # than codes, so that most of a pool of latents stays from the batches before.
    def build() -> Quantizer:
        return tiny_quantizer(name, revive_after=4, revive_below=0.9)

    def train(quantizer: Quantizer, steps: range) -> list[Tensor]:
        quantized = []
        for step in steps:
            shape = (2, 4, 5, 6) if step % 2 else (1, 4, 1, 4)
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            quantized.append(train_step(quantizer, latents, step))
        return quantized

    whole = build()
    train(whole, range(2))
    save_file(state_of(whole), tmp_path / "half.safetensors")
    expected = train(whole, range(2, 6))
    resumed = build()
    resumed.load_state_dict(load_file(tmp_path / "half.safetensors"))
    for quantized, other in zip(train(resumed, range(2, 6)), expected, strict=True):
        assert torch.equal(quantized, other)
    assert_same_state(resumed, state_of(whole))


@every_quantizer
def test_an_evaluation_forward_leaves_all_state_unchanged(name):
    quantizer = tiny_quantizer(name, revive_after=1)
    before = state_of(quantizer)
    quantizer.eval()(torch.randn(2, 4, 6, 6))
    quantizer.update(0)
    assert_same_state(quantizer, before)


@every_quantizer
def test_a_training_forward_without_gradients_counts_as_one_with_gradients_does(name):
    # As in batch norm; reentrant checkpointing runs its first forward pass without gradients.
    quantizer = tiny_quantizer(name, revive_after=1)
    other = copy.deepcopy(quantizer)
    latents, seeds = torch.randn(2, 4, 6, 6), torch.arange(2)
    quantizer(latents.clone().requires_grad_(), seeds)
    with torch.no_grad():
        other(latents, seeds)
    quantizer.update(0)
    other.update(0)
    assert_same_state(other, state_of(quantizer))


@every_quantizer
def test_no_state_moves_before_update_and_a_second_update_does_nothing(name):
    quantizer = tiny_quantizer(name, revive_after=1)
    before = state_of(quantizer)
    quantizer.anneal(0.5)
    quantizer(torch.randn(2, 4, 6, 6))
    assert_same_state(quantizer, before)
    quantizer.update(0)
    after = state_of(quantizer)
    quantizer.update(1)
    assert_same_state(quantizer, after)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_quantizer
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    quantizer = tiny_quantizer(name, revive_after=2, revive_below=0.9)
    repeating = copy.deepcopy(quantizer)

    def run(quantizer: Quantizer, latents: Tensor, seeds: Tensor, repeat: bool) -> list[Tensor]:
        def tensors(latents: Tensor) -> tuple[Tensor, ...]:
            output = quantizer(latents, seeds)
            return output.quantized, output.codes, *output.losses.values()

        found = checkpoint(tensors, latents, use_reentrant=use_reentrant) if repeat else tensors(latents)
        quantized, _, *losses = found
        (quantized.square().mean() + sum(losses)).backward()
        return [*found, latents.grad, *(parameter.grad for parameter in quantizer.parameters())]

    for step in range(2):
        latents, seeds = torch.randn(4, 4, 4, 4), torch.arange(4) + step
        expected = run(quantizer, latents.clone().requires_grad_(), seeds, False)
        found = run(repeating, latents.clone().requires_grad_(), seeds, True)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        quantizer.update(step)
        repeating.update(step)
        assert_same_state(repeating, state_of(quantizer))


# Random numbers


def test_the_quantizers_that_draw_random_numbers_say_so():
    latents = torch.randn(8, 4, 6, 6)
    for name in VARIANTS:
        quantizer = tiny_quantizer(name)
        one, other = (quantizer(latents, torch.arange(8) + first).quantized for first in (0, 8))
        assert torch.equal(one, other) == (name not in STOCHASTIC), name
        assert torch.equal(quantizer.eval()(latents, torch.arange(8)).quantized, quantizer(latents).quantized)


@every_quantizer
def test_an_image_with_its_seed_is_quantized_the_same_among_other_images(name):
    quantizer = tiny_quantizer(name)
    latents, seeds = torch.randn(5, 4, 6, 6), torch.tensor([3, 1 << 61, 7, 3, 0])
    together = quantizer(latents, seeds)
    for i in (1, 3):
        alone = quantizer(latents[i : i + 1], seeds[i : i + 1])
        assert torch.equal(alone.codes[0], together.codes[i])
        torch.testing.assert_close(alone.quantized[0], together.quantized[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_without_seeds_they_come_from_the_generator_of_torch(name):
    quantizer, latents = tiny_quantizer(name), torch.randn(8, 4, 6, 6)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(quantizer(latents).quantized)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_activation_checkpointing_repeats_numbers_that_torch_drew(name, use_reentrant):
    quantizer = tiny_quantizer(name)
    gradients = []
    for repeat in (False, True):
        latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(1)

        def total(latents: Tensor) -> Tensor:
            return loss_of(quantizer(latents))

        loss = checkpoint(total, latents, use_reentrant=use_reentrant) if repeat else total(latents)
        loss.backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
