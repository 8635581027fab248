"""Attention against a softmax head by head, and the products that train it in bfloat16 against torch's kernel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior import attention_products
from prior.attention import Attention
from prior.attention_products import attention_by_products, products_are_faster
from prior.rotary import as_argument, rotary_table, rotated_heads


def attention(num_heads: int, num_kv_heads: int, qk_norm: bool = False) -> Attention:
    """Attention of heads of 8 channels with weights that give uneven weights to positions."""
    module = Attention(8 * num_heads, num_heads, num_kv_heads, qk_norm)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def rotary(length: int) -> Tensor:
    positions = torch.stack([torch.arange(length) // 3, torch.arange(length) % 3], dim=1)
    return as_argument(rotary_table(positions.float(), 8))


@torch.no_grad()
def reference(module: Attention, x: Tensor, table: Tensor, causal: bool) -> Tensor:
    """Softmax attention, head by head, in which head h reads the keys of head h * num_kv_heads // num_heads."""
    B, L, width = x.shape
    d, heads = module.head_dim, module.num_heads
    weights = module.queries_keys_values.weight.split([d] * (heads + 2 * module.num_kv_heads))
    outputs = []
    for h in range(heads):
        group = h * module.num_kv_heads // heads
        q, k, v = (x @ weights[i].T for i in (h, heads + group, heads + module.num_kv_heads + group))
        if isinstance(module.query_norm, nn.RMSNorm):
            q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.query_norm.weight
            k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.key_norm.weight
        q, k, _ = rotated_heads(torch.stack([q, k, v], dim=2), table, 1, 1)
        scores = (q @ k.transpose(-1, -2))[:, 0] / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1).view(B, L, width) @ module.out.weight.T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@torch.no_grad()
def test_grouped_attention_equals_a_softmax_head_by_head(num_kv_heads, qk_norm, causal):
    module, x, table = attention(6, num_kv_heads, qk_norm), torch.randn(2, 9, 48), rotary(9)
    expected = reference(module, x, table, causal)
    torch.testing.assert_close(module(x, table, causal=causal), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@torch.no_grad()
def test_grouped_attention_is_full_attention_with_repeated_keys_and_values(num_kv_heads):
    grouped, full = attention(6, num_kv_heads), attention(6, 6)
    q, k, v = grouped.queries_keys_values.weight.view(-1, 8, 48).split([6, num_kv_heads, num_kv_heads])
    repeated = [part.repeat_interleave(6 // num_kv_heads, dim=0) for part in (k, v)]
    full.queries_keys_values.weight.copy_(torch.cat([q, *repeated]).flatten(0, 1))
    full.out.weight.copy_(grouped.out.weight)
    x, table = torch.randn(2, 9, 48), rotary(9)
    torch.testing.assert_close(grouped(x, table, causal=True), full(x, table, causal=True), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_norms_the_scale_of_queries_and_keys_does_not_matter():
    x, table = torch.randn(2, 9, 32), rotary(9)
    for qk_norm in (True, False):
        module = attention(4, 2, qk_norm)
        before = module(x, table)
        module.queries_keys_values.weight[: 6 * 8] *= 10  # four heads of queries, two of keys
        assert torch.allclose(module(x, table), before, rtol=1e-3, atol=1e-3) == qk_norm


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_products_and_their_gradients_are_those_of_torch_s_kernel(length, causal, monkeypatch):
    monkeypatch.setattr(attention_products, "BLOCK", 4)  # so that several blocks, and a shorter one, are seen
    inputs = [torch.randn(2, length, 3, 6, dtype=torch.float64).transpose(1, 2) for _ in range(3)]
    grad = torch.randn(2, 3, length, 6, dtype=torch.float64)
    found = []
    for attend in (
        attention_by_products,
        lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, None, 0, causal),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = attend(*leaves, causal=causal)
        output.backward(grad)
        found.append([output, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # scores are float32


@pytest.mark.parametrize("autocast", [False, True])
def test_products_are_about_as_exact_as_torch_s_kernel(autocast):
    rounded = [(torch.randn(8, 4, 64, 32) * scale).bfloat16() for scale in (2, 2, 1)]
    exact = F.scaled_dot_product_attention(*(x.float() for x in rounded), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = F.scaled_dot_product_attention(*rounded, is_causal=True).float()
        products = attention_by_products(*rounded, causal=True).float()
    assert (products - exact).norm() < 1.5 * (fused - exact).norm()


def test_products_train_bfloat16_on_a_cpu_and_nothing_else():
    q = torch.zeros(1, 1, 512, 4, dtype=torch.bfloat16)
    assert products_are_faster(q)
    assert not products_are_faster(q.float())
    assert not products_are_faster(q.to("meta"))
    assert not products_are_faster(torch.cat([q, q], dim=2))
    with torch.no_grad():
        assert not products_are_faster(q)


@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_trained_in_bfloat16_stays_near_float32(num_kv_heads, causal):
    module, x, table = attention(4, num_kv_heads), torch.randn(2, 9, 32), rotary(9)
    outputs, gradients = [], []
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(module(x, table, causal=causal).float())
        outputs[-1].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for mine, exact in [outputs, *zip(*gradients, strict=True)]:
        assert (mine - exact).norm() < 0.05 * exact.norm()
