"""residual, product and multiscale: what they do with the quantizer inside, against transcripts in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.loading import options_of
from tokenizer.quantizers import QUANTIZERS, Quantizer, build_quantizer
from tokenizer.quantizers.composite import level_seeds
from tokenizer.quantizers.gradients import rotation_trick

DIM = 4
INNER = ["ema", "vq", "cvq", "simvq", "ibq", "gumbel", "fsq", "lfq", "bsq"]


def inner_options(name: str, **options: Any) -> dict[str, Any]:
    """A tiny quantizer of 4 channels with 16 codes or a few more, a random codebook and no revival."""
    tiny = {"vocab_size": 16, "codebook_start": "normal", "revive_after": 0, "levels": [3, 4, 6, 5], "num_bits": DIM}
    known = options_of(QUANTIZERS[name])
    return {"name": name, **{key: value for key, value in (tiny | options).items() if key in known}}


def wrapped(wrapper: str, name: str, *, dim: int = DIM, inner: dict[str, Any] | None = None, **options: Any) -> Any:
    return build_quantizer({"name": wrapper, "quantizer": inner_options(name, **(inner or {})), **options}, dim)


def train_step(quantizer: Quantizer, latents: Tensor, grad: Tensor, seeds: Tensor) -> dict[str, Any]:
    """All that one step of SGD computes, with the gradient `grad` on what is quantized."""
    latents = latents.clone().requires_grad_()
    output = quantizer(latents, seeds)
    sum([*output.losses.values(), (output.quantized * grad).sum()]).backward()
    parameters = list(quantizer.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    if parameters:
        torch.optim.SGD(parameters, lr=0.1).step()
    quantizer.update(0)
    state = [tensor.clone() for tensor in quantizer.state_dict().values()]
    return {
        "codes": output.codes,
        "quantized": output.quantized.detach(),
        "losses": output.losses,
        "metrics": output.metrics,
        "latents": latents.grad,
        "parameters": gradients,
        "state": state,
    }


def rows(latents: Tensor) -> Tensor:
    """`(B, D, *grid)` as `(N, D)` float64."""
    return latents.detach().movedim(1, -1).flatten(0, -2).double()


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The code `(N,)` at the smallest Euclidean distance, from all distances."""
    return (vectors[:, None] - codebook).square().sum(2).argmin(1)


def assert_near(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("name", INNER)
def test_residual_depth_one_equals_its_inner_quantizer(name, gradient):
    options = {} if name == "ibq" else {"gradient": gradient}
    plain = build_quantizer(inner_options(name, **options), DIM)
    residual = wrapped("residual", name, inner=options, depth=1)
    residual.inner[0].load_state_dict(plain.state_dict())
    latents, grad = torch.randn(3, DIM, 2, 5), torch.randn(3, DIM, 2, 5)
    seeds = torch.tensor([3, 1, 4])
    expected = train_step(plain, latents, grad, level_seeds(seeds, 0))
    actual = train_step(residual, latents, grad, seeds)
    assert torch.equal(actual["codes"], expected["codes"])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert actual["latents"].abs().max() > 0


@pytest.mark.parametrize("shared", [False, True], ids=["own codebooks", "shared codebook"])
@pytest.mark.parametrize("name", ["ema", "vq", "cvq", "ibq"])
def test_residual_codes_are_the_greedy_assignment_of_what_is_left_over(name, shared):
    quantizer = wrapped("residual", name, depth=3, shared=shared)
    assert len(quantizer.inner) == (1 if shared else 3)
    latents = torch.randn(2, DIM, 3, 5)
    output = quantizer(latents)
    rest, total = rows(latents), torch.zeros(30, DIM, dtype=torch.float64)
    for level in range(3):
        codebook = quantizer.inner[0 if shared else level].codebook.detach().double()
        codes = nearest(rest, codebook)
        assert torch.equal(output.codes[..., level].flatten(), codes)
        rest, total = rest - codebook[codes], total + codebook[codes]
    assert_near(rows(output.quantized), total)
    assert_near(quantizer.decode(output.codes), output.quantized)


def test_residual_codes_of_ibq_by_products_are_the_largest_ones_of_what_is_left_over():
    quantizer = wrapped("residual", "ibq", inner={"distance": "dot"}, depth=3)
    latents = torch.randn(2, DIM, 9)
    output = quantizer(latents)
    rest = rows(latents)
    for level in range(3):
        codebook = quantizer.inner[level].codebook.detach().double()
        codes = (rest @ codebook.t()).argmax(1)
        assert torch.equal(output.codes[..., level].flatten(), codes)
        rest = rest - codebook[codes]
    assert_near(rows(output.quantized), rows(latents) - rest)


@pytest.mark.parametrize("name", ["ema", "vq", "cvq", "simvq", "lfq"])
def test_the_latent_gradient_of_a_straight_through_residual_is_exactly_the_identity(name):
    quantizer = wrapped("residual", name, depth=3)
    latents, grad = torch.randn(2, DIM, 9, requires_grad=True), torch.randn(2, DIM, 9)
    quantizer(latents).quantized.backward(grad)
    assert torch.equal(latents.grad, grad)


@pytest.mark.parametrize("options", [{"depth": 3}, {"scales": [1, 2, 3, 4]}], ids=["residual", "multiscale"])
@pytest.mark.parametrize("name", ["ema", "vq", "cvq", "simvq", "lfq"])
def test_the_rotation_trick_inside_a_sum_of_levels_turns_the_gradient_once_from_the_sum_to_the_latents(name, options):
    wrapper = "residual" if "depth" in options else "multiscale"
    quantizer = wrapped(wrapper, name, inner={"gradient": "rotation"}, **options)
    latents, grad = torch.randn(2, DIM, 4, 4, requires_grad=True), torch.randn(2, DIM, 4, 4)
    output = quantizer(latents)
    output.quantized.backward(grad)
    z = rows(latents).requires_grad_()
    rotation_trick(z, rows(output.quantized)).backward(rows(grad))
    assert_near(rows(latents.grad), z.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["own codebooks", "shared codebook"])
def test_the_terms_of_a_residual_act_at_each_level_as_means_over_levels(shared):
    quantizer = wrapped("residual", "vq", inner={"commitment_weight": 0.4}, depth=3, shared=shared)
    latents = torch.randn(2, DIM, 9, requires_grad=True)
    losses = quantizer(latents).losses
    z = rows(latents).requires_grad_()
    codebooks = [inner.codebook.detach().double().requires_grad_() for inner in quantizer.inner]
    expected = {"commitment": 0.0, "codebook": 0.0}
    taken = torch.zeros_like(z)
    for level in range(3):
        codebook = codebooks[0 if shared else level]
        chosen = codebook[nearest(z - taken, codebook)]
        expected["commitment"] = expected["commitment"] + 0.4 * (z - taken - chosen.detach()).square().mean() / 3
        expected["codebook"] = expected["codebook"] + (z.detach() - taken - chosen).square().mean() / 3
        taken = taken + chosen.detach()
    assert losses.keys() == expected.keys()
    for term, loss in expected.items():
        assert_near(losses[term], loss)
    (to_latents,) = torch.autograd.grad(losses["commitment"], latents, retain_graph=True)
    assert_near(rows(to_latents), torch.autograd.grad(expected["commitment"], z)[0])
    mine = torch.autograd.grad(losses["codebook"], [inner.codebook for inner in quantizer.inner])
    for to_codebook, theirs in zip(mine, torch.autograd.grad(expected["codebook"], codebooks), strict=True):
        assert_near(to_codebook, theirs)
        assert theirs.any()


def test_a_shared_moving_average_learns_from_the_vectors_of_all_levels():
    quantizer = wrapped("residual", "ema", inner={"decay": 0.8, "epsilon": 1e-12}, depth=3, shared=True)
    latents = torch.randn(2, DIM, 9)
    e = quantizer.inner[0].codebook.double()
    N, m = torch.full((16,), 0.8, dtype=torch.float64), 0.8 * e
    rest = rows(latents)
    for _ in range(3):
        codes = nearest(rest, e)
        N += 0.2 * codes.bincount(minlength=16)
        m = m.index_add(0, codes, 0.2 * rest)
        rest = rest - e[codes]
    quantizer(latents)
    quantizer.update(0)
    assert_near(quantizer.inner[0].cluster_size, N)
    assert_near(quantizer.inner[0].codebook, m / N[:, None])


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_levels_of_signs_work_on_half_the_scale_of_the_one_before(name):
    scale = 0.5
    quantizer = wrapped("residual", name, depth=3)
    plain = build_quantizer(inner_options(name), DIM)
    latents = torch.randn(2, DIM, 9)
    output = quantizer(latents)
    rest, total = latents, torch.zeros_like(latents)
    for level in range(3):
        inner = plain(rest / scale**level)
        assert torch.equal(output.codes[..., level], inner.codes)
        rest, total = rest - inner.quantized * scale**level, total + inner.quantized * scale**level
    assert_near(output.quantized, total)
    assert_near(quantizer.decode(output.codes), total)


@pytest.mark.parametrize("levels", [[8, 5], [4, 3], [7, 16]], ids=str)
def test_each_level_of_residual_fsq_divides_the_cells_of_the_one_before(levels):
    depth = 3
    quantizer = build_quantizer({"name": "residual", "depth": depth, "quantizer": {"name": "fsq", "levels": levels}}, 2)
    latents = torch.randn(1, 2, 200_000) * 2
    output = quantizer(latents)
    L = torch.tensor(levels).double()
    edge = (L / (L - 1)).view(1, 2, 1)  # of the outermost cells, in the first level's unit
    bounded = (latents.double() / edge).tanh() * edge
    for n in range(1, depth + 1):
        error = (quantizer.decode(output.codes[..., :n]).double() - bounded).abs().amax((0, 2))
        half_a_cell = edge.flatten() / L**n
        assert (error < half_a_cell * (1 + 1e-3) + 1e-6).all()
        assert (error > half_a_cell * 0.9).all()
    for channel, size in enumerate(levels):
        digits = output.codes // math.prod(levels[:channel]) % size
        assert len(digits[0, :, :2].unique(dim=0)) == size**2  # every combination of two levels occurs


def test_residual_fsq_passes_gradients_through_the_bound_once():
    quantizer = build_quantizer({"name": "residual", "depth": 3, "quantizer": {"name": "fsq", "levels": [5, 8]}}, 2)
    latents = torch.randn(2, 2, 9, requires_grad=True)
    upstream = torch.randn(2, 2, 9)
    quantizer.eval()(latents).quantized.backward(upstream)
    edge = torch.tensor([5 / 4, 8 / 7]).view(1, 2, 1)
    assert_near(latents.grad, upstream * (1 - (latents / edge).tanh() ** 2).detach())


@pytest.mark.parametrize("name", ["vq", "ema", "cvq", "simvq", "ibq"])
def test_residual_of_cosine_codes_is_refused(name):
    with pytest.raises(ValueError, match=r"cannot add up to a finer and finer sum: residual needs .*euclidean"):
        wrapped("residual", name, inner={"distance": "cosine"}, depth=2)
    wrapped("residual", name, inner={"distance": "cosine"}, depth=1)


@pytest.mark.parametrize("wrapper", ["residual", "product", "multiscale"])
@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_projections_onto_signs_start_as_principal_components_in_wrappers_as_well(wrapper, name):
    more = {"scales": [1, 2, 3, 4]} if wrapper == "multiscale" else {"depth": 2}
    quantizer = build_quantizer({"name": wrapper, "quantizer": {"name": name, "num_bits": 3}, **more}, 24)
    assert quantizer.num_start_vectors > 0
    latents = torch.randn(64, 24, 4, 4) * torch.logspace(0, -2, 24).view(-1, 1, 1) + 3
    quantizer.initialize(latents)
    projected = rows(quantizer.project_in(latents.movedim(1, -1)).movedim(-1, 1))
    assert_near(projected.mean(0), torch.zeros(projected.shape[1]), atol=1e-4)
    assert_near(projected.t() @ projected / len(projected), torch.eye(projected.shape[1]), atol=1e-3)
    before = latents.var()
    assert (quantizer.project_out(projected.float()) - rows(latents)).square().mean() < before


@pytest.mark.parametrize("name", ["vq", "fsq", "lfq"])
def test_a_prefix_of_the_levels_decodes_to_the_coarse_part(name):
    quantizer = wrapped("residual", name, depth=4).eval()
    codes = quantizer(torch.randn(2, DIM, 3, 5)).codes
    assert codes.shape == (2, 3, 5, 4)
    total = torch.zeros(2, DIM, 3, 5)
    for level in range(4):
        total = total + quantizer.inner[level].decode(codes[..., level]) * quantizer.scale(level, 4)
        assert_near(quantizer.decode(codes[..., : level + 1]), total)


def kept_levels(quantizer: Quantizer, latents: Tensor, seeds: Tensor | None = None) -> Tensor:
    """From how many levels each image is decoded, `(B,)`, by comparison with every prefix of its codes."""
    output = quantizer(latents, seeds)
    prefixes = [quantizer.decode(output.codes[..., :n]) for n in range(1, output.codes.shape[-1] + 1)]
    errors = torch.stack([(output.quantized - prefix).abs().flatten(1).amax(1) for prefix in prefixes])
    assert (errors.amin(0) < 1e-5).all()
    assert ((errors < 1e-3).sum(0) == 1).all()
    return errors.argmin(0) + 1


@pytest.mark.parametrize("name", ["vq", "fsq", "gumbel"])
def test_quantizer_dropout_decodes_its_share_of_images_from_a_random_number_of_levels(name):
    quantizer = wrapped("residual", name, depth=4, quantizer_dropout=0.6)
    kept = kept_levels(quantizer, 2 * torch.randn(4000, DIM, 3), torch.arange(4000))
    # Dropped images keep 1, 2, 3 or 4 levels alike: 600 each of 4000. A standard deviation is at most 32.
    assert_near(kept.bincount(minlength=5), torch.tensor([0, 600, 600, 600, 2200]), rtol=0, atol=120)


def test_quantizer_dropout_is_decided_by_the_seed_of_each_image():
    quantizer = wrapped("residual", "vq", depth=4, quantizer_dropout=0.6)
    latents, seeds = torch.randn(50, DIM, 3), torch.arange(50)
    kept = kept_levels(quantizer, latents, seeds)
    assert len(kept.unique()) == 4
    assert torch.equal(kept_levels(quantizer, latents, seeds), kept)
    order = torch.randperm(50)
    assert torch.equal(kept_levels(quantizer, latents, seeds[order]), kept[order])
    for i in range(8):
        assert kept_levels(quantizer, latents[i : i + 1], seeds[i : i + 1]).item() == kept[i]
    assert not torch.equal(kept_levels(quantizer, latents, seeds + 50), kept)


def test_quantizer_dropout_changes_neither_codes_nor_losses_and_never_acts_in_evaluation():
    dropping, keeping = (wrapped("residual", "vq", depth=4, quantizer_dropout=share) for share in (1.0, 0.0))
    keeping.load_state_dict(dropping.state_dict())
    latents = torch.randn(50, DIM, 3)
    output, expected = dropping(latents), keeping(latents)
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.losses, expected.losses, rtol=0, atol=0)
    assert not torch.equal(output.quantized, expected.quantized)
    assert torch.equal(dropping.eval()(latents).quantized, keeping.eval()(latents).quantized)
    assert (kept_levels(dropping, latents) == 4).all()


@pytest.mark.parametrize("name", ["cvq", "ibq"])
def test_product_codes_are_the_nearest_of_each_group_of_channels(name):
    quantizer = wrapped("product", name, dim=3 * DIM, depth=3)
    latents = torch.randn(2, 3 * DIM, 9)
    output = quantizer(latents)
    for i, group in enumerate(rows(latents).split(DIM, dim=1)):
        codes = nearest(group, quantizer.inner[i].codebook.detach().double())
        assert torch.equal(output.codes[..., i].flatten(), codes)


@pytest.mark.parametrize("name", ["cvq", "ema", "vq", "simvq", "ibq", "gumbel"])
def test_product_equals_quantizers_of_its_groups_of_channels(name):
    quantizer = wrapped("product", name, dim=3 * DIM, depth=3)
    plain = [build_quantizer(inner_options(name), DIM) for _ in range(3)]
    for one, inner in zip(plain, quantizer.inner, strict=True):
        one.load_state_dict(inner.state_dict())
    latents, grad, seeds = torch.randn(2, 3 * DIM, 9), torch.randn(2, 3 * DIM, 9), torch.tensor([3, 1])
    actual = train_step(quantizer, latents, grad, seeds)
    # A loss is a mean over groups: its gradients are a third of a group's own.
    parts, outputs = latents.clone().requires_grad_(), []
    for i, one in enumerate(plain):
        outputs.append(one(parts[:, DIM * i : DIM * (i + 1)], level_seeds(seeds, i)))
    quantized = torch.cat([output.quantized for output in outputs], 1)
    means = {term: sum(output.losses[term] for output in outputs) / 3 for term in outputs[0].losses}
    sum([*means.values(), (quantized * grad).sum()]).backward()
    assert torch.equal(actual["codes"], torch.stack([output.codes for output in outputs], -1))
    torch.testing.assert_close(actual["quantized"], quantized.detach(), rtol=0, atol=0)
    torch.testing.assert_close(actual["losses"], means)
    torch.testing.assert_close(actual["latents"], parts.grad)
    gradients = [parameter.grad for one in plain for parameter in one.parameters()]
    torch.testing.assert_close(actual["parameters"], gradients)
    for one in plain:
        if parameters := list(one.parameters()):
            torch.optim.SGD(parameters, lr=0.1).step()
        one.update(0)
    state = [tensor for one in plain for tensor in one.state_dict().values()]
    torch.testing.assert_close(actual["state"], state)


@pytest.mark.parametrize(("name", "code_dim"), [("fsq", 4), ("lfq", 3), ("bsq", 3)])
def test_a_product_of_finite_quantizers_equals_them_behind_one_projection(name, code_dim):
    quantizer = wrapped("product", name, dim=7, inner={"num_bits": 3}, depth=2)
    plain = build_quantizer(inner_options(name, num_bits=3), code_dim)
    latents = torch.randn(2, 7, 9)
    projected = quantizer.project_in(latents.movedim(1, -1)).movedim(-1, 1)
    assert projected.shape == (2, 2 * code_dim, 9)
    outputs = [plain(projected[:, :code_dim]), plain(projected[:, code_dim:])]
    output = quantizer(latents)
    assert torch.equal(output.codes, torch.stack([part.codes for part in outputs], -1))
    joined = torch.cat([part.quantized for part in outputs], 1)
    assert_near(output.quantized, quantizer.project_out(joined.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize(("dim", "depth"), [(5, 2), (8, 3), (2, 4)])
def test_a_product_of_groups_that_do_not_divide_the_channels_is_refused(dim, depth):
    message = f"the latents' {dim} channels do not divide into depth={depth} groups; choose a divisor"
    with pytest.raises(ValueError, match=message):
        wrapped("product", "vq", dim=dim, depth=depth)


def literal_var(
    f: Tensor,
    grids: list[tuple[int, int]],
    codebook: Tensor,
    convolutions: list[tuple[Tensor, Tensor]],
    beta: float,
    r: float,
) -> dict[str, Any]:
    """Algorithm 1 of Tian et al. 2024 with the quantizer of its published code."""
    S, n = len(grids), len(convolutions)
    ticks = np.linspace(1 / 3 / n, 1 - 1 / 3 / n, n)
    f_no_grad = f.detach()
    f_rest, f_hat = f_no_grad.clone(), torch.zeros_like(f)
    codes, losses, used = [], {"commitment": 0.0, "codebook": 0.0}, []
    for k, grid in enumerate(grids):
        small = f_rest if k == S - 1 else F.interpolate(f_rest, size=grid, mode="area")
        code = nearest(small.movedim(1, -1).flatten(0, 2), codebook.detach()).view(len(f), *grid)
        h = F.embedding(code, codebook).movedim(-1, 1)
        if k < S - 1:
            h = F.interpolate(h, size=grids[-1], mode="bicubic")
        used.append(int(np.argmin(np.abs(ticks - k / (S - 1)))))
        weight, bias = convolutions[used[-1]]
        h = h * (1 - r) + F.conv2d(h, weight, bias, padding=1) * r
        f_hat = f_hat + h
        f_rest = f_rest - h.detach()
        losses["commitment"] = losses["commitment"] + beta * F.mse_loss(f_hat.detach(), f) / S
        losses["codebook"] = losses["codebook"] + F.mse_loss(f_hat, f_no_grad) / S
        codes.append(code.flatten(1))
    return {
        "codes": torch.cat(codes, 1),
        "losses": losses,
        "quantized": (f_hat.detach() - f_no_grad) + f,
        "convolutions": used,
    }


@pytest.mark.parametrize(
    ("scales", "grid", "num_convolutions", "used"),
    [
        ([1, 2, 3, 4], (4, 4), 4, [0, 1, 2, 3]),
        ([1, 2, 3, 4, 6, 8], (8, 8), 4, [0, 0, 1, 2, 3, 3]),
        ([1, 3, 6], (6, 4), 2, None),
        ([1, 2, 3, 4, 5, 6], (3, 6), 1, [0] * 6),
        ([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], (16, 16), 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
    ],
    ids=str,
)
def test_multiscale_equals_the_algorithm_of_var(scales, grid, num_convolutions, used):
    quantizer = wrapped(
        "multiscale",
        "vq",
        inner={"commitment_weight": 0.3, "vocab_size": 32},
        scales=scales,
        num_convolutions=num_convolutions,
        residual_ratio=0.4,
    )
    f = torch.randn(2, DIM, *grid, requires_grad=True)
    output = quantizer(f)
    f64 = f.detach().double().requires_grad_()
    leaves = [parameter.detach().double().requires_grad_() for parameter in quantizer.parameters()]
    named = dict(zip([name for name, _ in quantizer.named_parameters()], leaves, strict=True))
    convolutions = [
        (named[f"convolutions.{i}.weight"], named[f"convolutions.{i}.bias"]) for i in range(num_convolutions)
    ]
    grids = [tuple(math.ceil(side * scale / max(grid)) for side in grid) for scale in scales]
    expected = literal_var(f64, grids, named["inner.0.codebook"], convolutions, 0.3, 0.4)
    if used:
        assert expected["convolutions"] == used
    assert quantizer.grids(grid) == grids
    assert torch.equal(output.codes, expected["codes"])
    assert_near(output.quantized, expected["quantized"], atol=1e-5)
    assert output.losses.keys() == expected["losses"].keys()
    grad = torch.randn(f.shape)
    pairs = [((output.quantized * grad).sum(), (expected["quantized"] * grad).sum())]
    pairs += [(output.losses[term], loss) for term, loss in expected["losses"].items()]
    for mine, theirs in pairs:
        assert_near(mine, theirs, atol=1e-5)
        inputs = [f, *quantizer.parameters()]
        gradients = torch.autograd.grad(mine, inputs, retain_graph=True, materialize_grads=True)
        references = torch.autograd.grad(theirs, [f64, *leaves], retain_graph=True, materialize_grads=True)
        for gradient, reference in zip(gradients, references, strict=True):
            assert_near(gradient, reference, rtol=1e-4, atol=1e-6)
    parts = quantizer.code_layout(grid).split(output.codes)
    assert_near(quantizer.decode(parts), output.quantized, atol=1e-5)


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq"])
def test_multiscale_divides_a_scale_by_the_level_scale_to_the_power_of_its_place_in_the_pyramid(name):
    quantizer = wrapped("multiscale", name, scales=[1, 2, 3, 5])
    inner, grids = quantizer.inner[0], quantizer.grids((5, 5))
    base = 1 / torch.tensor([3.0, 4.0, 6.0, 5.0]).view(DIM, 1, 1) if name == "fsq" else 0.5
    latents = torch.randn(2, DIM, 5, 5)
    output = quantizer(latents)
    parts = quantizer.code_layout((5, 5)).split(output.codes)
    rest = bounded = inner.squeeze(latents)
    for k, (codes, grid) in enumerate(zip(parts, grids, strict=True)):
        scale = base ** (k / 3)
        plain = inner.quantize(F.interpolate(rest, size=grid, mode="area") / scale, None)
        assert torch.equal(codes, plain.codes)
        rest = rest - quantizer._contribution(plain.quantized * scale, k, grids)
    assert_near(output.quantized, bounded - rest)
    assert_near(quantizer.decode(parts), bounded - rest)


def test_the_entropy_term_acts_on_what_is_left_over_at_each_scale_as_if_coarser_scales_were_constant():
    inner = {"entropy_weight": 0.5}
    quantizer, plain = wrapped("multiscale", "vq", inner=inner), build_quantizer(inner_options("vq", **inner), DIM)
    plain.load_state_dict(quantizer.inner[0].state_dict())
    f = torch.randn(2, DIM, 4, 4, requires_grad=True)
    mine = quantizer(f).losses["entropy"]
    grids = quantizer.grids((4, 4))
    terms, taken = [], torch.zeros(f.shape)
    for k, grid in enumerate(grids):
        output = plain(F.interpolate(f - taken, size=grid, mode="area"))
        terms.append(output.losses["entropy"])
        taken = taken + quantizer._contribution(plain.decode(output.codes), k, grids).detach()
    theirs = sum(terms) / len(terms)
    assert_near(mine, theirs)
    convolutions = list(quantizer.convolutions.parameters())
    to_f, to_codebook, *to_convolutions = torch.autograd.grad(
        mine, [f, quantizer.inner[0].codebook, *convolutions], materialize_grads=True
    )
    expected_to_f, expected_to_codebook = torch.autograd.grad(theirs, [f, plain.codebook])
    assert expected_to_f.any()
    assert_near(to_f, expected_to_f)
    assert_near(to_codebook, expected_to_codebook)
    assert not any(gradient.any() for gradient in to_convolutions)


@pytest.mark.parametrize("num_scales", range(4, 11))
@pytest.mark.parametrize("num", [1, 3, 4])
def test_each_scale_uses_the_convolution_that_the_published_code_gives_it(num_scales, num):
    # Convolution i adds i: what a scale contributes names the one that it used.
    scales = list(range(1, num_scales + 1))
    quantizer = wrapped("multiscale", "vq", scales=scales, num_convolutions=num, residual_ratio=1.0)
    with torch.no_grad():
        for i, convolution in enumerate(quantizer.convolutions):
            convolution.weight.zero_()
            convolution.bias.fill_(i)
    grids = quantizer.grids((num_scales, num_scales))
    margin = 1 / 3 / num if num == 4 else 1 / 2 / num
    ticks = np.linspace(margin, 1 - margin, num)
    for k, grid in enumerate(grids):
        contribution = quantizer._contribution(torch.zeros(1, DIM, *grid), k, grids)
        expected = int(np.argmin(np.abs(ticks - k / (num_scales - 1))))
        assert contribution.unique().tolist() == [expected]


@pytest.mark.parametrize("scales", [None, [1, 3, 7]], ids=str)
@pytest.mark.parametrize("grid", [(7,), (7, 7), (4, 7), (7, 1), (2, 7, 3)], ids=str)
def test_grids_rise_and_end_at_the_grid_of_the_latents(grid, scales):
    quantizer = wrapped("multiscale", "vq", scales=scales, grid_dims=len(grid), num_convolutions=2)
    grids = quantizer.grids(grid)
    assert grids[0] == (1,) * len(grid)
    assert grids[-1] == grid
    for coarse, fine in pairwise(grids):
        assert all(a <= b for a, b in zip(coarse, fine, strict=True))
        assert coarse != fine
    output = quantizer(torch.randn(2, DIM, *grid))
    assert output.codes.shape == (2, sum(map(math.prod, grids)))


@pytest.mark.parametrize(("scales", "grid"), [([4], (4, 4)), (None, (1, 1))], ids=str)
def test_multiscale_with_a_single_grid_keeps_its_shape(scales, grid):
    quantizer = wrapped("multiscale", "vq", scales=scales, num_convolutions=1)
    layout = quantizer.code_layout(grid)
    output = quantizer(torch.randn(2, DIM, *grid))
    assert output.codes.shape == (2, *layout.shape)
    assert_near(quantizer.decode(layout.split(output.codes)), output.quantized)


@pytest.mark.parametrize("grid", [(6,), (4, 6), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("name", INNER)
def test_every_inner_quantizer_trains_on_any_number_of_grid_axes_with_finite_gradients(name, grid):
    quantizer = wrapped("multiscale", name, grid_dims=len(grid))
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    latents, grad = torch.randn(2, DIM, *grid), torch.randn(2, DIM, *grid)
    step = train_step(quantizer, latents, grad, torch.tensor([3, 1]))
    assert step["latents"].isfinite().all()
    assert step["latents"].any()
    assert all(gradient.isfinite().all() for gradient in step["parameters"])
    after = quantizer.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert (after["convolutions.0.weight"] != before["convolutions.0.weight"]).any()
    learned = [key for key in after if key.startswith("inner.0") and (after[key] != before[key]).any()]
    assert bool(learned) == (name not in ("fsq", "lfq", "bsq"))
    parts = quantizer.eval().code_layout(grid).split(step["codes"])
    assert [tuple(part.shape[1:]) for part in parts] == quantizer.grids(grid)
    output = quantizer(latents)
    assert_near(quantizer.decode(quantizer.code_layout(grid).split(output.codes)), output.quantized, atol=1e-5)
