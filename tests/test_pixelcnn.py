"""The gated PixelCNN: what each code sees, coarser codes as a condition, and sampling that computes nothing twice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from configs.layout import CodeGrid, CodeLayout
from configs.random_streams import uniform
from prior import Prior, build_prior
from prior.pixelcnn import PixelCNN, PixelCNNConfig, gate
from prior.sampling import draw, filter_logits, guide

SHAPES = [(4, 5), (5, 4), (1, 6), (6, 1), (1, 1)]
TWO_GRIDS = CodeLayout((CodeGrid((1, 2), 2), CodeGrid((2, 2), 3)))
"""Like VQ-VAE-2's: the finer grid is modelled given the coarser one."""
THREE_GRIDS = CodeLayout((CodeGrid((1, 1), 4), CodeGrid((2, 3), 5, 2), CodeGrid((4, 5), 7)))


def tiny(layout: CodeLayout, num_classes: int = 3, **options: object) -> PixelCNN:
    """A prior in eval mode whose weights give uneven probabilities."""
    model = {"name": "pixelcnn", "width": 16, "num_layers": 3, "num_heads": 2, **options}
    prior = build_prior(model, layout, num_classes=num_classes).eval()
    assert isinstance(prior, PixelCNN)
    for parameter in prior.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return prior


def random_codes(layout: CodeLayout, batch_size: int) -> Tensor:
    parts = [torch.randint(0, grid.vocab_size, (batch_size, grid.num_codes)) for grid in layout.grids]
    return torch.cat(parts, dim=1).view(batch_size, *layout.shape)


def receptive_field(prior: PixelCNN, j: int) -> set[int]:
    """The codes whose embedding has a gradient from the logits of code j."""
    embedded: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    handle = prior.code_embedding.register_forward_hook(watch)
    logits = prior.logits(torch.zeros(1, *prior.grid.shape, dtype=torch.int64))
    handle.remove()
    (logits[0, j] * torch.randn(prior.grid.vocab_size)).sum().backward()
    assert embedded[0].grad is not None
    return set(embedded[0].grad.abs().sum(-1).flatten().nonzero().flatten().tolist())


# What a code sees


@pytest.mark.parametrize("attention_every", [0, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_deep_prior_sees_all_earlier_codes_and_no_others(shape, attention_every):
    options = {"num_layers": 8, "first_kernel_size": 3, "attention_every": attention_every}
    prior = tiny(CodeLayout.single(shape, 5), **options).double()
    for j in range(math.prod(shape)):
        assert receptive_field(prior, j) == set(range(j))


def test_one_layer_sees_the_upper_half_of_its_kernel_and_the_codes_to_the_left():
    prior = tiny(CodeLayout.single((6, 9), 5), num_layers=1, first_kernel_size=5)
    above = {row * 9 + column for row in (2, 3) for column in (2, 3, 4, 5, 6)}
    assert receptive_field(prior, 4 * 9 + 4) == above | {4 * 9 + 2, 4 * 9 + 3}


def test_a_second_layer_adds_half_of_its_kernel():
    prior = tiny(CodeLayout.single((6, 9), 5), num_layers=2, first_kernel_size=3, kernel_size=5)
    above = {row * 9 + column for row in (1, 2, 3) for column in range(1, 8)}
    assert receptive_field(prior, 4 * 9 + 4) == above | {4 * 9 + 1, 4 * 9 + 2, 4 * 9 + 3}


def test_a_gate_is_the_tanh_of_the_first_half_by_the_sigmoid_of_the_second():
    x = torch.randn(3, 8)
    torch.testing.assert_close(gate(x), x[:, :4].tanh() * x[:, 4:].sigmoid(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, [])])
def test_attention_stands_after_every_so_many_layers(every, expected):
    prior = tiny(CodeLayout.single((2, 2), 5), num_layers=5, attention_every=every)
    assert [index for index, layer in enumerate(prior.layers) if layer.attention is not None] == expected


@torch.no_grad()
def test_a_class_changes_the_logits_of_every_code():
    layout = CodeLayout.single((3, 4), 5)
    prior, codes = tiny(layout), random_codes(layout, 1)
    logits = [prior.logits(codes, torch.tensor([label])) for label in range(4)]
    for one, other in itertools.combinations(logits, 2):
        assert ((one - other).abs().amax(-1) > 1e-3).all()
    assert torch.equal(prior.logits(codes), logits[3])


def test_dropout_is_at_work_in_training_only():
    layout = CodeLayout.single((3, 4), 5)
    prior, codes = tiny(layout, dropout=0.5, attention_every=1), random_codes(layout, 2)
    assert torch.equal(prior(codes).loss, prior(codes).loss)
    prior.train()
    assert not torch.equal(prior(codes).loss, prior(codes).loss)


def test_training_reaches_the_entropy_of_a_pattern_that_runs_through_the_upper_right():
    # Each code equals the one above on its right; the first row and the last column are free.
    K, side = 4, 4
    prior = build_prior(
        {"name": "pixelcnn", "width": 16, "num_layers": 2, "dropout": 0.0}, CodeLayout.single((4, 4), K)
    )
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    diagonals = torch.arange(side)[:, None] + torch.arange(side)
    losses = []
    for _ in range(200):
        loss = prior(torch.randint(0, K, (32, 2 * side - 1))[:, diagonals]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy = (2 * side - 1) / side**2 * math.log(K)
    assert losses[0] > math.log(K) - 0.1
    assert abs(sum(losses[-20:]) / 20 - entropy) < 0.03


# Coarser codes as a condition


@pytest.mark.parametrize("grid", [0, 1])
@torch.no_grad()
def test_the_probabilities_of_a_grid_sum_to_one_given_the_coarser_codes(grid):
    prior = tiny(TWO_GRIDS, grid=grid)
    (h, w), K = prior.grid.shape, prior.grid.vocab_size
    every = torch.tensor(list(itertools.product(range(K), repeat=h * w))).view(-1, h, w)
    sums, first = [], []
    for coarse in itertools.product(range(2), repeat=2) if grid == 1 else [None]:
        condition = None if coarse is None else torch.tensor(coarse).expand(len(every), 2)
        log_prob = prior.log_prob(every, torch.ones(len(every), dtype=torch.int64), condition=condition)
        sums.append(log_prob.exp().sum())
        first.append(log_prob[0].item())
        loss = prior(every, torch.ones(len(every), dtype=torch.int64), condition=condition).loss
        torch.testing.assert_close(loss, -log_prob.mean() / (h * w), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(sums), torch.ones(len(sums)), rtol=0, atol=1e-5)
    assert len(set(first)) == len(first)


def test_an_images_codes_are_split_into_the_modelled_ones_and_all_coarser_ones():
    codes = random_codes(THREE_GRIDS, 2)
    parts = THREE_GRIDS.split(codes)
    for grid in range(3):
        if THREE_GRIDS.grids[grid].depth == 1:
            modelled, condition = tiny(THREE_GRIDS, grid=grid).split_condition(codes)
            assert torch.equal(modelled, parts[grid])
            assert condition is None if grid == 0 else torch.equal(condition, codes[:, : 1 + 12])
    assert tiny(THREE_GRIDS, grid=2).code_layout == CodeLayout.single((4, 5), 7)
    alone = random_codes(CodeLayout.single((2, 3), 4), 2)
    modelled, condition = tiny(CodeLayout.single((2, 3), 4)).split_condition(alone)
    assert modelled is alone
    assert condition is None


@torch.no_grad()
def test_every_coarser_code_may_change_the_logits_of_every_code():
    # The tables of different depths differ too: equal codes at another depth are another condition.
    prior, (codes, condition) = (p := tiny(THREE_GRIDS, grid=2)), p.split_condition(random_codes(THREE_GRIDS, 1))
    before = prior.logits(codes, condition=condition)
    for i in range(condition.shape[1]):
        changed = condition.clone()
        changed[:, i] = (changed[:, i] + 1) % (4 if i == 0 else 5)
        assert ((prior.logits(codes, condition=changed) - before).abs().amax(-1) > 0).all()
    swapped = condition.clone()
    swapped[:, 1:3] = torch.tensor([3, 4])
    other = swapped.clone()
    other[:, 1:3] = torch.tensor([4, 3])
    assert not torch.equal(prior.logits(codes, condition=swapped), prior.logits(codes, condition=other))


def test_a_missing_or_wrong_condition_is_refused():
    prior = tiny(TWO_GRIDS, grid=1)
    codes = torch.zeros(3, 2, 2, dtype=torch.int64)
    for condition, message in (
        (None, r"^this pixelcnn models \[2x2 of 3\] given the codes of \[1x2 of 2\]; give them as condition \(3, 2\)$"),
        (torch.zeros(3, 1, 2, dtype=torch.int64), r"\[1x2 of 2\], has shape \(3, 2\), got \(3, 1, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\[1x2 of 2\], has shape \(3, 2\), got \(2, 2\)"),
        (torch.full((3, 2), 2), r"the condition's codes of \[1x2 of 2\] are in \[0, 2\), got 2 to 2"),
        (torch.full((3, 2), -1), r"the condition's codes of \[1x2 of 2\] are in \[0, 2\), got -1 to -1"),
    ):
        for verb in (prior, prior.log_prob):
            with pytest.raises(ValueError, match=message):
                verb(codes, condition=condition)
        with pytest.raises(ValueError, match=message):
            prior.sample(3, condition=condition)


@pytest.mark.parametrize(("layout", "grid"), [(TWO_GRIDS, 0), (CodeLayout.single((1, 2), 2), None)], ids=str)
def test_a_condition_where_no_grid_is_coarser_is_refused(layout, grid):
    prior = tiny(layout, grid=grid)
    with pytest.raises(ValueError, match=r"models all of \[1x2 of 2\], but a condition was given"):
        prior(torch.zeros(3, 1, 2, dtype=torch.int64), condition=torch.zeros(3, 2, dtype=torch.int64))


def test_a_training_step_given_a_condition_gives_every_weight_a_gradient():
    prior = tiny(THREE_GRIDS, grid=2, attention_every=2).train()
    codes, condition = prior.split_condition(random_codes(THREE_GRIDS, 4))
    prior(codes, torch.tensor([0, 1, 2, 3]), condition=condition).loss.backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


# Sampling


def logits_one_by_one(prior: PixelCNN, codes: Tensor, labels: Tensor, condition: Tensor | None, known: int) -> Tensor:
    """Logits of the codes from `known` on, which are read one by one after a known beginning."""
    flat = codes.flatten(1)
    steps = prior.code_by_code(labels, prior.check_condition(condition, len(codes)), compiled=False)
    given = [flat[:, :known], *(flat[:, j : j + 1] for j in range(known, flat.shape[1] - 1))]
    return torch.stack([steps.next(part) for part in given], dim=1)


@pytest.mark.parametrize("known", [0, 1, 5, 12, 19])
@pytest.mark.parametrize("attention_every", [0, 1, 2])
@pytest.mark.parametrize(("layout", "grid"), [(CodeLayout.single((4, 5), 7), None), (THREE_GRIDS, 2)], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(layout, grid, attention_every, known):
    prior = tiny(layout, grid=grid, attention_every=attention_every)
    codes, condition = prior.split_condition(random_codes(layout, 3))
    labels = torch.tensor([0, 2, 3])
    expected = prior.logits(codes, labels, condition=condition)
    cached = logits_one_by_one(prior, codes, labels, condition, known)
    assert cached.dtype == torch.float32
    torch.testing.assert_close(cached, expected[:, known:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first_kernel_size", "kernel_size"), [(3, 5), (9, 3)])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones_for_any_shape_and_kernel(shape, first_kernel_size, kernel_size):
    layout = CodeLayout.single(shape, 5)
    prior = tiny(layout, first_kernel_size=first_kernel_size, kernel_size=kernel_size, attention_every=2).double()
    codes, labels = random_codes(layout, 2), torch.tensor([1, 3])
    for known in range(layout.num_codes):
        cached = logits_one_by_one(prior, codes, labels, None, known)
        torch.testing.assert_close(cached, prior.logits(codes, labels)[:, known:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("known", [0, 7])
@torch.no_grad()
def test_keeping_the_first_rows_changes_nothing_for_them(known):
    prior = tiny(THREE_GRIDS, grid=2, attention_every=2)
    codes, condition = prior.split_condition(random_codes(THREE_GRIDS, 4))
    labels, flat = torch.tensor([0, 1, 2, 3]), codes.flatten(1)
    expected = prior.logits(codes, labels, condition=condition)
    for last in range(known, 19):
        steps = prior.code_by_code(labels, condition, compiled=False)
        steps.next(flat[:, :known])
        for j in range(known, last):
            steps.next(flat[:, j : j + 1])
        steps.keep(2)
        rest = [steps.next(flat[:2, j : j + 1]) for j in range(last, 19)]
        torch.testing.assert_close(torch.stack(rest, 1), expected[:2, last + 1 :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@torch.no_grad()
def test_sampling_given_a_condition_equals_recomputing_everything(guidance_scale):
    prior = tiny(THREE_GRIDS, grid=2, attention_every=2).double()
    _, condition = prior.split_condition(random_codes(THREE_GRIDS, 8))
    labels, seeds = torch.tensor([0, 1, 2, 3] * 2), torch.arange(8)
    codes = torch.zeros(8, 20, dtype=torch.int64)
    for j in range(20):
        logits = prior.logits(codes.view(8, 4, 5), labels, condition=condition)[:, j]
        guided = guide(logits, prior.logits(codes.view(8, 4, 5), condition=condition)[:, j], guidance_scale)
        codes[:, j] = draw(filter_logits(guided, temperature=1.0, top_k=None, top_p=None), uniform(seeds, j))
    sampled = prior.sample(8, labels, seeds=seeds, condition=condition, guidance_scale=guidance_scale)
    assert torch.equal(sampled, codes.view(8, 4, 5))


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_cached_logits_in_bfloat16_are_those_of_the_whole_grid_up_to_rounding(autocast):
    prior = tiny(THREE_GRIDS, grid=2, attention_every=2)
    codes, condition = prior.split_condition(random_codes(THREE_GRIDS, 3))
    labels = torch.tensor([0, 2, 3])
    exact = prior.logits(codes, labels, condition=condition)
    prior = prior if autocast else prior.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for known in (0, 12):
            cached = logits_one_by_one(prior, codes, labels, condition, known)
            assert cached.dtype == torch.float32
            assert ((cached - exact[:, known:]).norm() / exact[:, known:].norm()) < 0.05


# Configuration


@pytest.mark.parametrize(
    ("layout", "grid", "message"),
    [
        (
            CodeLayout.single((8, 8), 16384, depth=4),
            None,
            "pixelcnn models one 2-D grid of codes, but the codes are laid out as [8x8 (depth 4) of 16384]; "
            "use the gpt or maskgit prior",
        ),
        (
            CodeLayout.single((32,), 4096),
            None,
            "pixelcnn models one 2-D grid of codes, but the codes are laid out as [32 of 4096]; "
            "use the gpt or maskgit prior",
        ),
        (
            TWO_GRIDS,
            None,
            "pixelcnn models one 2-D grid of codes, but the codes are laid out as [1x2 of 2 + 2x2 of 3]; "
            "give model.grid=, from 0 (the coarsest) to 1, or use the gpt or maskgit prior",
        ),
        (
            TWO_GRIDS,
            2,
            "pixelcnn models one 2-D grid of codes, but the codes are laid out as [1x2 of 2 + 2x2 of 3]; "
            "model.grid=2 should be from 0 (the coarsest) to 1",
        ),
        (
            THREE_GRIDS,
            1,
            "pixelcnn models one 2-D grid of codes, but grid 1 of them is [2x3 (depth 2) of 5]; "
            "use the gpt or maskgit prior",
        ),
        (
            CodeLayout((CodeGrid((4,), 3), CodeGrid((2, 2), 3))),
            1,
            "pixelcnn models one 2-D grid of codes given coarser 2-D grids, but grid 0 of them is [4 of 3]; "
            "use the gpt or maskgit prior",
        ),
    ],
    ids=str,
)
def test_a_layout_that_it_cannot_model_is_refused(layout, grid, message):
    with pytest.raises(ValueError, match=r".") as error:
        build_prior({"name": "pixelcnn", "grid": grid}, layout)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "^kernel_size should be odd, got 4"),
        ({"first_kernel_size": 6}, "^first_kernel_size should be odd, got 6"),
        ({"kernel_size": 1}, "^kernel_size should be .*at least 3.*, got 1"),
        ({"first_kernel_size": 2}, "^first_kernel_size should be .*at least 3.*, got 2"),
        ({"num_layers": 0}, "^num_layers should be .*at least 1.*, got 0"),
        ({"attention_every": -1}, "^attention_every should be .*, got -1"),
        ({"grid": -1}, "^grid should be .*, got -1"),
        ({"dropout": 1.0}, "^dropout should be .*0 to 0.9.*, got 1.0"),
        (
            {"width": 24, "num_heads": 4, "attention_every": 1},
            r"^width=24 does not divide into num_heads=4 heads of a multiple of 4 channels",
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PixelCNNConfig(**options)


def test_heads_matter_only_with_attention():
    assert PixelCNNConfig(width=10, num_heads=4).attention_every == 0


@torch.no_grad()
def test_a_saved_prior_gives_the_same_logits(tmp_path):
    prior = tiny(THREE_GRIDS, grid=2, attention_every=2)
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert isinstance(loaded, PixelCNN)
    codes, condition = loaded.split_condition(random_codes(THREE_GRIDS, 2))
    # Not to the bit: loaded weights are aligned otherwise in memory, and products may sum in another order.
    torch.testing.assert_close(
        loaded.logits(codes, condition=condition), prior.logits(codes, condition=condition), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(dict(loaded.state_dict()), dict(prior.state_dict()), rtol=0, atol=0)
