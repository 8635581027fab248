"""The transformer and options of large GPTs: positions, grouped queries, norms of queries and keys, compiled steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from prior_cases import DEEP, GRIDS, IMAGE, LAYOUTS, random_codes, tiny_prior, vocab_sizes
from torch import nn
from torch._dynamo.testing import CompileCounter

from prior.gpt import CachedSteps
from prior.transformer import Transformer
from tokenizer import ImageTokenizer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1},
    {"qk_norm": True},
    {"num_kv_heads": 2, "qk_norm": True, "dropout": 0.3, "code_corruption": 0.5},
]
FOUR_HEADS = {"width": 16, "num_heads": 4}


@pytest.mark.parametrize(
    ("layout", "tables"), [(DEEP, [0, 1] * 6), (GRIDS, [0] * 2 + [1, 2] * 4), (IMAGE, [0] * 16)], ids=str
)
def test_each_grid_and_depth_reads_its_own_rows_of_the_embedding(layout, tables):
    offsets, _ = tiny_prior("gpt", layout).tables()
    assert offsets.tolist() == [table * layout.vocab_size for table in tables]


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
@torch.no_grad()
def test_dropout_is_of_the_embeddings_and_of_both_branches_of_every_block_in_training_only(name):
    prior, codes = tiny_prior(name, IMAGE, dropout=0.5, num_layers=2), random_codes(IMAGE, 64)
    shares: list[float] = []
    for module in prior.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, __, output: shares.append((output == 0).float().mean().item()))
    for training, share in ((True, 0.5), (False, 0.0)):
        shares.clear()
        prior.train(training)(codes, seeds=torch.arange(64))
        assert shares == pytest.approx([share] * 5, abs=0.02)


def test_fewer_heads_of_keys_make_the_cache_smaller():
    transformer = Transformer(32, 2, 4, num_kv_heads=1)
    layers = transformer.new_cache(3, 10, torch.float32, torch.device("cpu"))
    assert [layer.keys.shape for layer in layers] == [(3, 1, 10, 8)] * 2


@pytest.mark.parametrize("num_kv_heads", [3, 8])
@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_heads_that_do_not_divide_into_groups_are_refused(name, num_kv_heads):
    with pytest.raises(ValueError, match=f"num_heads=4 does not divide into num_kv_heads={num_kv_heads} groups"):
        tiny_prior(name, IMAGE, **FOUR_HEADS, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", [IMAGE, GRIDS, DEEP], ids=str)
@torch.no_grad()
def test_logits_code_by_code_equal_those_of_all_codes_at_once(layout, options, first):
    prior = tiny_prior("gpt", layout, num_classes=2, **(FOUR_HEADS | options))
    codes, labels = random_codes(layout, 5), torch.tensor([0, 1, 2, 0, 1])
    expected, flat = prior.logits(codes, labels), codes.flatten(1)
    following = prior.code_by_code(labels, None, compiled=False)
    given = flat[:, :first]
    for j in range(first, layout.num_codes):
        if j == first + 2:
            # From here on, only some rows are of interest.
            following.keep(3)
            expected, given = expected[:3], given[:3]
        logits = prior.hide_foreign_codes(following.next(given)[:, None], slice(j, j + 1))
        torch.testing.assert_close(logits, expected[:, j : j + 1], rtol=1e-4, atol=1e-4)
        given = flat[: len(expected), j : j + 1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", [IMAGE, GRIDS, DEEP], ids=str)
@torch.no_grad()
def test_steps_of_fixed_shapes_equal_the_logits_of_all_codes_at_once(layout, options):
    prior = tiny_prior("gpt", layout, num_classes=2, **(FOUR_HEADS | options))
    codes, labels = random_codes(layout, 3), torch.tensor([0, 1, 2])
    expected, flat = prior.logits(codes, labels), codes.flatten(1)
    following = CachedSteps(prior, labels, prior._step)  # what `compile_sampling` compiles
    for j in range(layout.num_codes):
        logits = following.next(flat[:, max(j - 1, 0) : j])
        logits = prior.hide_foreign_codes(logits[:, None], slice(j, j + 1))
        torch.testing.assert_close(logits, expected[:, j : j + 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_is_allocated_once_for_the_codes_of_the_layout_in_the_type_of_the_products():
    prior, labels = tiny_prior("gpt", GRIDS, num_classes=2), torch.tensor([0, 1, 2, 2])
    following = prior.code_by_code(labels, None, compiled=False)
    tensors = [tensor for layer in following.cache for tensor in (layer.keys, layer.values)]
    assert [tensor.shape for tensor in tensors] == [(4, 2, GRIDS.num_codes, 8)] * 4
    for j in range(GRIDS.num_codes):
        following.next(torch.zeros(len(following.places), min(j, 1), dtype=torch.int64))
        if j == 5:
            following.keep(2)
    kept = [tensor for layer in following.cache for tensor in (layer.keys, layer.values)]
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in tensors]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        following = prior.code_by_code(labels, None, compiled=False)
    assert following.cache[0].keys.dtype == following.cache[0].values.dtype == torch.bfloat16


def test_a_step_is_compiled_once_for_each_number_of_rows(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    prior, labels = tiny_prior("gpt", GRIDS, num_classes=2, num_layers=1).double(), torch.tensor([0, 1, 0, 1])
    known, half = random_codes(GRIDS, 4), {"guidance_scale": 2.0, "guidance_interval": [0.0, 0.6]}
    cases = [{}, half, *({"known": known, "known_mask": torch.arange(10).expand(4, -1) < n} for n in (3, 7))]
    expected = [prior.sample(4, labels, seeds=torch.arange(4), **options) for options in cases]
    prior.compile_sampling()
    counts = []
    for _ in range(2):
        for options, codes in zip(cases, expected, strict=True):
            assert torch.equal(prior.sample(4, labels, seeds=torch.arange(4), **options), codes)
            counts.append(counter.frame_count)
    # Guidance adds steps of eight rows.
    assert counts == [1, *[2] * 7]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_a_step_trains_every_parameter_and_lowers_the_loss(name, options):
    if name == "maskgit":
        options = {key: value for key, value in options.items() if key != "code_corruption"}
    prior = tiny_prior(name, IMAGE, num_classes=2, **(FOUR_HEADS | options | {"dropout": 0.0})).train()
    codes, labels, seeds = random_codes(IMAGE, 16), torch.tensor([0, 1] * 8), torch.arange(16)
    before = prior(codes, labels, seeds=seeds).loss
    before.backward()
    assert all(parameter.grad.any() for parameter in prior.parameters())
    torch.optim.SGD(prior.parameters(), lr=1e-3).step()
    assert prior(codes, labels, seeds=seeds).loss < before


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
def test_corruption_changes_its_share_of_the_codes_that_are_seen(rate):
    prior, n = tiny_prior("gpt", GRIDS, code_corruption=rate).train(), 4000
    codes = random_codes(GRIDS, n)
    for seeds in (torch.arange(n), None):
        changed = (prior.seen(codes, seeds) != codes).float().mean(0)
        # A random code is the old one with a probability of 1 / K.
        expected = torch.tensor([rate * (1 - 1 / K) for K in vocab_sizes(GRIDS)])
        assert ((changed - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_corrupted_codes_are_all_those_of_their_own_grid():
    prior = tiny_prior("gpt", GRIDS, code_corruption=1.0).train()
    seen = prior.seen(torch.zeros(500, GRIDS.num_codes, dtype=torch.int64), torch.arange(500))
    for j, K in enumerate(vocab_sizes(GRIDS)):
        assert seen[:, j].unique().tolist() == list(range(K))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_under_full_corruption_a_given_code_matters_as_a_target_only(layout):
    prior, L = tiny_prior("gpt", layout, code_corruption=1.0).train(), layout.num_codes
    codes, seeds = random_codes(layout, 4), torch.arange(4)
    other = ((codes.flatten(1) + 1) % torch.tensor(vocab_sizes(layout))).view_as(codes)
    before = prior(codes, seeds=seeds).loss
    # The loss is a sum over codes, each with a prediction that no given code changes.
    sum_of_changes = torch.tensor(0.0)
    for j in range(L):
        changed = codes.clone()
        changed.view(4, L)[:, j] = other.view(4, L)[:, j]
        sum_of_changes += prior(changed, seeds=seeds).loss - before
    torch.testing.assert_close(prior(other, seeds=seeds).loss - before, sum_of_changes, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_targets_are_the_given_codes_under_corruption():
    prior, codes = tiny_prior("gpt", IMAGE, code_corruption=0.5).train(), random_codes(IMAGE, 8)
    seeds = torch.arange(8)
    log_p = prior.logits(prior.seen(codes, seeds)).log_softmax(-1)
    expected = -log_p.gather(-1, codes.flatten(1)[..., None]).mean()
    torch.testing.assert_close(prior(codes, seeds=seeds).loss, expected, rtol=1e-5, atol=1e-6)


def test_corruption_belongs_to_an_image():
    prior, codes = tiny_prior("gpt", IMAGE, code_corruption=0.5).train(), random_codes(IMAGE, 8)
    seeds = torch.arange(8)
    seen = prior.seen(codes, seeds)
    assert torch.equal(prior.seen(codes[3:5], seeds[3:5]), seen[3:5])
    assert not torch.equal(prior.seen(codes, seeds + 8), seen)
    assert len((prior.seen(codes[:1].expand(8, -1, -1), seeds) != codes[:1]).flatten(1).unique(dim=0)) == 8


@torch.no_grad()
def test_evaluation_corrupts_nothing():
    prior, codes = tiny_prior("gpt", IMAGE, code_corruption=1.0), random_codes(IMAGE, 8)
    assert torch.equal(prior.seen(codes, torch.arange(8)), codes)
    expected = -prior.log_prob(codes).mean() / IMAGE.num_codes
    torch.testing.assert_close(prior(codes, seeds=torch.arange(8)).loss, expected, rtol=1e-5, atol=1e-5)
    prior.train()
    assert not torch.equal(prior.seen(codes, torch.arange(8)), codes)


@pytest.mark.parametrize("layout", [IMAGE, GRIDS], ids=str)
@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(name, layout):
    prior = tiny_prior(name, layout, num_classes=2).train()
    codes, labels, seeds = random_codes(layout, 4), torch.tensor([0, 1, 0, 1]), torch.arange(4)
    found, passes = [], []
    prior.transformer.blocks[0].attention.register_forward_pre_hook(lambda *_: passes.append(len(found)))
    for checkpointed in (False, True):
        if checkpointed:
            prior.checkpoint_activations()
        prior.zero_grad()
        loss = prior(codes, labels, seeds=seeds).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in prior.named_parameters()} | {"loss": loss.detach()})
    # The block is computed once, and with checkpoints once more in the backward pass.
    assert passes == [0, 1, 1]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt", "maskgit"])
def test_sampling_is_the_same_with_activation_checkpointing(name):
    prior = tiny_prior(name, IMAGE).train()
    expected = prior.sample(4, seeds=torch.arange(4))
    prior.checkpoint_activations()
    assert torch.equal(prior.sample(4, seeds=torch.arange(4)), expected)


def test_activation_checkpointing_is_refused_by_the_name_of_a_model_without_blocks(tiny_tokenizer: ImageTokenizer):
    with pytest.raises(ValueError, match=r"needs a tokenizer with blocks to checkpoint \(vqgan\); vqvae has none"):
        tiny_tokenizer.checkpoint_activations()
