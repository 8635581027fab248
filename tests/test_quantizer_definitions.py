"""The published equations of the quantizers that have a codebook, against transcripts in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer.quantizers.entropy
from configs.loading import options_of
from tokenizer.quantizers import QUANTIZERS, Quantizer, build_quantizer
from tokenizer.quantizers.entropy import assignment_entropies, entropy
from tokenizer.quantizers.gradients import GRADIENTS, rotation_trick, straight_through
from tokenizer.quantizers.gumbel import _gumbel_noise

NEAREST = ["vq", "ema", "cvq", "simvq"]


def quantizer_of(name: str, dim: int = 4, **options: object) -> Quantizer:
    """A quantizer with a random codebook of 16 and no revival, with those of the options that it has."""
    defaults = {"vocab_size": 16, "codebook_start": "normal", "revive_after": 0, "num_bits": dim}
    known = options_of(QUANTIZERS[name])
    return build_quantizer({"name": name, **{k: v for k, v in (defaults | options).items() if k in known}}, dim)


def rows(latents: Tensor) -> Tensor:
    """`(B, D, *grid)` as `(N, D)` float64."""
    return latents.detach().movedim(1, -1).flatten(0, -2).double()


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The code `(N,)` at the smallest Euclidean distance, from all distances."""
    return (vectors[:, None] - codebook).square().sum(2).argmin(1)


def assert_near(actual: Tensor | None, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradient to each input, zeros where there is none; the graph stays for more."""
    return torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)


def to_closest(vectors: Tensor, others: Tensor) -> Tensor:
    """The largest distance from a vector to the closest of the others, by the largest coordinate."""
    return (vectors[:, None] - others).detach().abs().amax(2).amin(1).max()


def rotation_and_scale(e: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """R = I - 2 r r^T + 2 q_hat e_hat^T and lambda = |q| / |e| of one vector (Fifty et al. 2024, section 4.2)."""
    e_hat, q_hat = e / e.norm(), q / q.norm()
    r = (e_hat + q_hat) / (e_hat + q_hat).norm()
    return torch.eye(len(e), dtype=e.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(q_hat, e_hat), q.norm() / e.norm()


def jacobian(e: Tensor, q: Tensor) -> Tensor:
    """The matrix `(D, D)` by which the rotation trick says that the code moves with the latent."""
    return torch.autograd.functional.jacobian(lambda vector: rotation_trick(vector, q), e)


@pytest.mark.parametrize("estimator", GRADIENTS.values(), ids=GRADIENTS)
def test_an_estimator_has_exactly_the_value_of_the_code_and_no_gradient_to_it(estimator):
    vectors, chosen = torch.randn(3, 5, requires_grad=True), (1e6 * torch.randn(3, 5)).requires_grad_()
    quantized = estimator(vectors, chosen)
    assert torch.equal(quantized, chosen)
    quantized.sum().backward()
    assert vectors.grad is not None
    assert chosen.grad is None


def test_the_straight_through_gradient_is_the_identity():
    vectors, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    straight_through(vectors, torch.randn(3, 5)).backward(grad)
    assert torch.equal(vectors.grad, grad)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_rotation_trick_moves_gradients_by_the_explicit_matrix(dim):
    e = torch.randn(6, dim, dtype=torch.float64, requires_grad=True)
    q, grad = torch.randn(6, dim, dtype=torch.float64), torch.randn(6, dim, dtype=torch.float64)
    rotation_trick(e, q).backward(grad)
    for i in range(6):
        R, scale = rotation_and_scale(e[i].detach(), q[i])
        assert_near(R @ e[i] / e[i].norm(), q[i] / q[i].norm(), atol=1e-12)
        assert_near(R @ R.t(), torch.eye(dim), atol=1e-12)
        assert_near(e.grad[i], (scale * R).t() @ grad[i], atol=1e-12)
        assert_near(e.grad[i].norm(), scale * grad[i].norm(), atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5])
def test_the_rotation_trick_maps_a_latent_onto_a_code_on_the_same_line(factor):
    e = torch.randn(5, dtype=torch.float64)
    matrix = jacobian(e, factor * e)
    assert_near(matrix @ e, factor * e, atol=1e-12)
    assert_near(matrix @ matrix.t(), factor**2 * torch.eye(5), atol=1e-12)
    if factor > 0:
        assert_near(matrix, factor * torch.eye(5), atol=1e-12)


@pytest.mark.parametrize(("size", "code_size"), [(0, 1), (1, 0), (0, 0), (1e-20, 1), (1, 1e-20)], ids=str)
def test_the_rotation_trick_is_finite_at_zero_vectors(size, code_size):
    matrix = jacobian(size * torch.randn(4), code_size * torch.randn(4))
    assert matrix.isfinite().all()


@pytest.mark.parametrize("name", [*NEAREST, "lfq"])
def test_a_straight_through_quantizer_returns_exactly_its_code_and_passes_gradients_on(name):
    quantizer = quantizer_of(name)
    latents, grad = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    output = quantizer(latents)
    output.quantized.backward(grad)
    assert torch.equal(output.quantized, quantizer.decode(output.codes))
    assert torch.equal(latents.grad, grad)


@pytest.mark.parametrize("name", [*NEAREST, "lfq", "bsq"])
def test_the_rotation_option_changes_the_gradient_of_the_latents_and_nothing_else(name):
    straight, rotation = quantizer_of(name), quantizer_of(name, gradient="rotation")
    rotation.load_state_dict(straight.state_dict())
    latents, grad = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    of_quantized, of_losses, outputs = [], [], []
    for quantizer in (straight, rotation):
        inputs = [latents.clone().requires_grad_(), *quantizer.parameters()]
        output = quantizer(inputs[0])
        of_quantized.append(gradients((output.quantized * grad).sum(), inputs))
        of_losses.append(gradients(sum(output.losses.values()), inputs))
        outputs.append((output.quantized.detach(), output.codes, output.losses, output.metrics))
        quantizer.update(0)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(of_losses[0], of_losses[1], rtol=0, atol=0)
    torch.testing.assert_close(of_quantized[0][1:], of_quantized[1][1:], rtol=0, atol=0)
    torch.testing.assert_close(straight.state_dict(), rotation.state_dict(), rtol=0, atol=0)
    if name == "bsq":  # the gradient goes on through the normalisation of z
        z = rows(latents).requires_grad_()
        vectors = F.normalize(z, dim=-1)
    else:
        z = vectors = rows(latents).requires_grad_()
    turned = []
    for e, q, g in zip(vectors.detach(), rows(outputs[1][0]), rows(grad), strict=True):
        R, scale = rotation_and_scale(e, q)
        turned.append((scale * R).t() @ g)
    (expected,) = torch.autograd.grad(vectors, z, torch.stack(turned))
    assert_near(rows(of_quantized[1][0]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(of_quantized[0][0], of_quantized[1][0])


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("name", ["vq", "cvq"])
def test_beta_is_on_the_commitment_term_alone(name, beta):
    quantizer = quantizer_of(name, commitment_weight=beta)
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    output = quantizer(latents)
    z, e = rows(latents).requires_grad_(), quantizer.codebook.detach().double().requires_grad_()
    codes = nearest(z, e)
    assert torch.equal(output.codes.flatten(), codes)
    expected = {
        "codebook": (z.detach() - e[codes]).square().sum() / z.numel(),
        "commitment": beta * (z - e[codes].detach()).square().sum() / z.numel(),
    }
    assert output.losses.keys() == expected.keys()
    for term, loss in expected.items():
        assert_near(output.losses[term], loss)
        to_latents, to_codebook = gradients(output.losses[term], [latents, quantizer.codebook])
        expected_to_latents, expected_to_codebook = gradients(loss, [z, e])
        assert_near(rows(to_latents), expected_to_latents)
        assert_near(to_codebook, expected_to_codebook)
        assert bool(to_codebook.any()) == (term == "codebook")
        assert bool(to_latents.any()) == (term == "commitment" and beta > 0)


def test_cosine_codes_are_those_of_the_largest_cosine_and_have_length_one():
    quantizer = quantizer_of("vq", distance="cosine")
    latents = 3 * torch.randn(2, 4, 9)
    output = quantizer(latents)
    cosine = F.normalize(rows(latents), dim=1) @ F.normalize(quantizer.codebook.double(), dim=1).t()
    assert torch.equal(output.codes.flatten(), cosine.argmax(1))
    assert_near(rows(output.quantized), F.normalize(quantizer.codebook, dim=1)[output.codes.flatten()])


def test_the_moving_average_follows_the_published_update_over_several_steps():
    K, decay, epsilon = 16, 0.8, 1e-3
    quantizer = quantizer_of("ema", decay=decay, epsilon=epsilon)
    N, m, e = torch.ones(K, dtype=torch.float64), quantizer.codebook.double(), quantizer.codebook.double()
    for step in range(6):
        latents = torch.randn(3, 4, 7)
        z = rows(latents)
        codes = nearest(z, e)
        assert torch.equal(quantizer(latents).codes.flatten(), codes)
        quantizer.update(step)
        for i in range(K):
            N[i] = N[i] * decay + (codes == i).sum() * (1 - decay)
            m[i] = m[i] * decay + z[codes == i].sum(0) * (1 - decay)
        smoothed = (N + epsilon) / (N.sum() + K * epsilon) * N.sum()
        e = m / smoothed[:, None]
        assert_near(quantizer.codebook, e)
        assert_near(quantizer.cluster_size, N)


def test_a_moving_average_that_keeps_nothing_puts_each_code_on_the_mean_of_its_latents():
    quantizer = quantizer_of("ema", decay=0.0, epsilon=1e-12)
    latents = torch.randn(8, 4, 9)
    codes = quantizer(latents).codes.flatten()
    quantizer.update(0)
    for i in codes.unique():
        assert_near(quantizer.codebook[i], rows(latents)[codes == i].mean(0))


@pytest.mark.parametrize("block_elements", [1 << 19, 1], ids=["one block", "several blocks"])
def test_the_entropy_term_and_its_gradient_equal_the_enumeration(monkeypatch, block_elements):
    monkeypatch.setattr(tokenizer.quantizers.search, "BLOCK_ELEMENTS", block_elements)
    quantizer = quantizer_of("vq", entropy_weight=0.3, entropy_temperature=0.7)
    latents = torch.randn(5, 4, 9, requires_grad=True)
    loss = quantizer(latents).losses["entropy"]
    mine = gradients(loss, [latents, quantizer.codebook])
    z, e = rows(latents).requires_grad_(), quantizer.codebook.detach().double().requires_grad_()
    squared = (z[:, None] - e).square().sum(2)
    p = (-squared / (0.7 * squared.detach().amin(1).mean())).softmax(1)
    expected = 0.3 * (-(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum())
    theirs = gradients(expected, [z, e])
    assert_near(loss, expected)
    assert_near(rows(mine[0]), theirs[0], rtol=1e-4)
    assert_near(mine[1], theirs[1], rtol=1e-4)


def test_a_code_with_probability_zero_has_a_finite_entropy_gradient():
    probabilities = torch.tensor([0.0, 0.25, 0.75], requires_grad=True)
    entropy(probabilities).backward()
    assert_near(entropy(probabilities), torch.tensor(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))
    assert probabilities.grad.isfinite().all()


def test_the_entropies_have_finite_gradients_where_a_far_code_underflows():
    # exp(-|x - e|^2) of the far code is 0 in float32, for every vector.
    vectors = torch.randn(6, 2, requires_grad=True)
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]], requires_grad=True)
    sample, batch = assignment_entropies(vectors, codebook, torch.tensor(1.0))
    (sample - batch).backward()
    assert vectors.grad.isfinite().all()
    assert codebook.grad.isfinite().all()


def test_the_entropies_among_equal_codes_are_the_logarithm_of_their_number():
    sample, batch = assignment_entropies(torch.randn(7, 3), torch.randn(3).expand(5, 3).contiguous(), 0.7)
    assert_near(sample, torch.tensor(math.log(5)))
    assert_near(batch, torch.tensor(math.log(5)))


def dead_share() -> float:
    """alpha of a code that nobody ever chose (Zheng & Vedaldi 2023, equation 5)."""
    return math.exp(-1e-3)


def test_closest_anchors_follow_the_published_update_over_several_steps():
    K, decay = 16, 0.9
    quantizer = quantizer_of("cvq", decay=decay)
    usage, e = torch.zeros(K, dtype=torch.float64), quantizer.codebook.detach().double()
    partly = 0
    for step in range(4):
        latents = torch.randn(2, 4, 150)
        z = rows(latents)
        counts = nearest(z, e).bincount(minlength=K)
        quantizer(latents)
        quantizer.update(step)
        usage = decay * usage + (1 - decay) * counts / len(z)
        alpha = torch.exp(-usage * K * 10 / (1 - decay) - 1e-3)
        for k in range(K):
            anchor = z[(z - e[k]).square().sum(1).argmin()]
            e[k] = (1 - alpha[k]) * e[k] + alpha[k] * anchor
        partly += int(((alpha > 0.01) & (alpha < 0.9)).sum())
        assert_near(quantizer.usage, usage)
        assert_near(quantizer.codebook, e)
    assert partly  # some codes went a part of the way


def test_random_anchors_come_from_a_pool_that_a_large_batch_refills_whole():
    quantizer = quantizer_of("cvq", anchor="random", decay=0.9)
    assert torch.equal(quantizer.pool, quantizer.codebook)
    drawn = torch.zeros(20, dtype=torch.int64)
    for step in range(300):
        before = quantizer.codebook.detach().clone()
        latents = torch.randn(1, 4, 20)
        quantizer(latents)
        quantizer.update(step)
        slot, latent = (quantizer.pool[:, None] == latents[0].t()).all(2).nonzero().t()
        assert slot.tolist() == list(range(16))  # every slot holds a latent of this batch
        drawn += latent.bincount(minlength=20)
        alpha = torch.exp(-quantizer.usage.double() * 16 * 10 / 0.1 - 1e-3)[:, None]
        assert_near(quantizer.codebook, (1 - alpha) * before + alpha * quantizer.pool)
    # 4800 draws, 240 of each position: within 5 standard deviations.
    assert ((drawn - 240).abs() < 5 * math.sqrt(240 * 0.95)).all()


def test_random_anchors_come_from_a_pool_that_a_small_batch_refills_in_part():
    quantizer = quantizer_of("cvq", anchor="random", decay=0.9)
    replaced = torch.zeros(16, dtype=torch.int64)
    for step in range(300):
        pool, codebook = quantizer.pool.clone(), quantizer.codebook.detach().clone()
        latents = torch.randn(1, 4, 5)
        quantizer(latents)
        quantizer.update(step)
        changed = (quantizer.pool != pool).any(1)
        assert changed.sum() == 5
        assert_near(quantizer.pool[changed].sort(0).values, latents[0].t().sort(0).values, rtol=0, atol=0)
        replaced += changed
        alpha = torch.exp(-quantizer.usage.double() * 16 * 10 / 0.1 - 1e-3)[:, None]
        assert_near(quantizer.codebook, (1 - alpha) * codebook + alpha * quantizer.pool)
    assert ((replaced - 300 * 5 / 16).abs() < 5 * math.sqrt(300 * 5 / 16 * 11 / 16)).all()


def test_probabilistic_anchors_are_latents_drawn_by_the_softmax_of_their_distance():
    # All codes are one and the same vector: the first takes all latents, so the other 63 are dead and draw anchors.
    quantizer = quantizer_of("cvq", dim=2, vocab_size=64, anchor="probabilistic")
    e = torch.tensor([0.3, -0.2])
    latents = torch.tensor([[0.3, 0.1], [1.0, 0.5], [-0.5, -1.0], [1.5, -1.2], [-1.0, 0.4], [2.5, 1.0]])
    drawn, steps = torch.zeros(6), 100
    for step in range(steps):
        with torch.no_grad():
            quantizer.codebook.copy_(e.expand(64, 2))
            quantizer.usage.zero_()
        assert not quantizer(latents.t()[None]).codes.any()
        quantizer.update(step)
        anchors = e + (quantizer.codebook[1:] - e) / dead_share()
        difference = (anchors[:, None] - latents).abs().amax(2)
        assert (difference.amin(1) < 1e-5).all()
        drawn += difference.argmin(1).bincount(minlength=6)
    expected = (-(latents - e).square().sum(1)).softmax(0)
    assert drawn.sum() == 63 * steps
    # 6300 draws: a standard deviation is at most 0.0063.
    assert_near(drawn / drawn.sum(), expected, rtol=0, atol=0.025)


def test_probabilistic_anchors_of_a_batch_above_the_sample_size_are_its_latents():
    quantizer = quantizer_of("cvq", dim=2, vocab_size=64, anchor="probabilistic")
    with torch.no_grad():
        quantizer.codebook.copy_(torch.zeros(64, 2))
    latents = 0.1 * torch.randn(1, 2, 6000)
    quantizer(latents)
    quantizer.update(0)
    anchors = quantizer.codebook[1:] / dead_share()
    assert to_closest(anchors, latents[0].t()) < 1e-5
    assert len(anchors.unique(dim=0)) > 32


def test_probabilistic_anchors_are_drawn_from_a_sample_of_at_most_4096(monkeypatch):
    from tokenizer.quantizers import cvq

    assert cvq.SAMPLE_SIZE == 4096
    monkeypatch.setattr(cvq, "SAMPLE_SIZE", 3)
    quantizer = quantizer_of("cvq", dim=2, vocab_size=64, anchor="probabilistic")
    with torch.no_grad():
        quantizer.codebook.copy_(torch.zeros(64, 2))
    quantizer(0.1 * torch.randn(1, 2, 6000))
    quantizer.update(0)
    anchors = (1e4 * quantizer.codebook[1:] / dead_share()).round()
    assert 1 < len(anchors.unique(dim=0)) <= 3


@pytest.mark.parametrize("anchor", ["closest", "random", "probabilistic"])
def test_a_dead_code_is_put_onto_its_anchor_and_codes_in_full_use_stay(anchor):
    quantizer = quantizer_of("cvq", anchor=anchor, decay=0.9)
    dead = quantizer.codebook[15].detach() + 100
    with torch.no_grad():
        quantizer.codebook[15] = dead
    in_use = quantizer.codebook[:15].detach().clone()
    for step in range(10):  # the running share of a code in full use approaches 1 / 15
        latents = (in_use + 1e-3 * torch.randn(15, 4)).t()[None]
        with torch.no_grad():
            quantizer.codebook[15] = dead
        before = quantizer.codebook.detach().clone()
        assert quantizer(latents).codes.tolist() == [list(range(15))]
        quantizer.update(step)
    assert torch.equal(quantizer.codebook[:15], before[:15])
    moved = dead + (quantizer.codebook[15] - dead) / dead_share()
    anchors = quantizer.pool if anchor == "random" else latents[0].t()
    assert to_closest(moved[None], anchors) < 1e-4


def bent_simvq(**options: object) -> Quantizer:
    """A SimVQ whose projection is not the identity."""
    quantizer = quantizer_of("simvq", **options)
    torch.nn.init.normal_(quantizer.projection.weight)
    return quantizer


def test_simvq_chooses_among_the_frozen_codebook_times_the_projection():
    quantizer = bent_simvq()
    latents = torch.randn(2, 4, 9)
    output = quantizer(latents)
    e = quantizer.codebook.double() @ quantizer.projection.weight.double().t()
    codes = nearest(rows(latents), e)
    assert torch.equal(output.codes.flatten(), codes)
    assert_near(rows(output.quantized), e[codes])


def test_the_codebook_term_of_simvq_moves_all_codes_by_the_projection_alone():
    quantizer = bent_simvq(commitment_weight=0.5)
    C, W = quantizer.codebook.clone(), quantizer.projection.weight
    latents = torch.randn(2, 4, 9, requires_grad=True)
    output = quantizer(latents)
    assert [name for name, _ in quantizer.named_parameters()] == ["projection.weight"]
    z, c = rows(latents), C[output.codes.flatten()].double()
    difference = c @ W.detach().double().t() - z
    to_latents, to_projection = gradients(output.losses["codebook"], [latents, W])
    assert not to_latents.any()
    assert_near(to_projection, 2 * difference.t() @ c / z.numel())
    to_latents, to_projection = gradients(output.losses["commitment"], [latents, W])
    assert not to_projection.any()
    assert_near(rows(to_latents), -0.5 * 2 * difference / z.numel())
    before = quantizer.decode(torch.arange(16)[None]).detach()
    sum(quantizer(latents).losses.values()).backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.5).step()
    quantizer.update(0)
    assert torch.equal(quantizer.codebook, C)
    assert (quantizer.decode(torch.arange(16)[None]) != before).any(1).all()


def test_simvq_puts_its_effective_codes_onto_given_vectors():
    quantizer = bent_simvq()
    before = quantizer.decode(torch.arange(16)[None])[0].t()
    vectors = torch.randn(3, 4)
    quantizer.set_codes(torch.tensor([2, 7, 11]), vectors)
    after = quantizer.decode(torch.arange(16)[None])[0].t()
    assert_near(after[[2, 7, 11]], vectors, rtol=1e-4, atol=1e-5)
    others = [i for i in range(16) if i not in (2, 7, 11)]
    assert torch.equal(after[others], before[others])


def test_revival_puts_effective_codes_of_simvq_onto_latents():
    quantizer = bent_simvq(revive_after=1, revive_below=0.0)
    # 64 latents, four a code on average, all near the effective codes 0 to 3.
    latents = quantizer.decode(torch.arange(4).repeat(16)[None]).detach() + 1e-3 * torch.randn(1, 4, 64)
    unused = sorted(set(range(16)) - set(quantizer(latents).codes.flatten().tolist()))
    quantizer.update(0)
    revived = quantizer.decode(torch.tensor([unused]))[0].t()
    assert len(unused) == 12
    assert to_closest(revived, latents[0].t()) < 1e-4


def test_gumbel_evaluation_takes_the_code_with_the_largest_logit():
    quantizer = quantizer_of("gumbel").eval()
    latents = torch.randn(2, 4, 9)
    logits = rows(latents) @ quantizer.to_logits.weight.double().t() + quantizer.to_logits.bias.double()
    output = quantizer(latents)
    assert torch.equal(output.codes.flatten(), logits.argmax(1))
    assert_near(rows(output.quantized), quantizer.codebook[logits.argmax(1)], rtol=0, atol=0)


def twin_gumbels(**options: object) -> tuple[Quantizer, Quantizer]:
    """A straight-through and a relaxed quantizer with the same weights."""
    straight, relaxed = (quantizer_of("gumbel", straight_through=value, **options) for value in (True, False))
    relaxed.load_state_dict(straight.state_dict())
    return straight, relaxed


def test_straight_through_gumbel_has_the_value_of_a_code_and_relaxed_gumbel_that_of_the_softmax_mix():
    straight, relaxed = twin_gumbels(temperature=0.7)
    latents, seeds = torch.randn(3, 4, 5), torch.tensor([5, 7, -11])
    output, mixed = straight(latents, seeds), relaxed(latents, seeds)
    logits = latents.movedim(1, -1).double() @ straight.to_logits.weight.double().t() + straight.to_logits.bias.double()
    noise = _gumbel_noise(seeds, torch.empty(3, 5, 16)).double()
    p = ((logits + noise) / 0.7).softmax(-1)
    assert torch.equal(output.codes, p.argmax(-1))
    assert torch.equal(mixed.codes, output.codes)
    assert torch.equal(output.quantized, straight.decode(output.codes))
    assert_near(mixed.quantized.movedim(1, -1), p @ straight.codebook.double())


def test_straight_through_gumbel_has_the_logits_gradient_of_the_mix_and_the_codebook_gradient_of_the_code():
    straight, relaxed = twin_gumbels(temperature=0.7)
    latents, seeds, grad = torch.randn(3, 4, 5), torch.tensor([5, 7, -11]), torch.randn(3, 4, 5)
    gradients, codes = [], None
    for quantizer in (straight, relaxed):
        x = latents.clone().requires_grad_()
        output = quantizer(x, seeds)
        codes = output.codes
        gradients.append(torch.autograd.grad(output.quantized, [x, *quantizer.to_logits.parameters()], grad))
        quantizer(x, seeds).quantized.backward(grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert gradients[0][0].abs().max() > 1e-3
    one_hot = F.one_hot(codes.flatten(), 16).double()
    assert_near(straight.codebook.grad, one_hot.t() @ rows(grad))
    assert not torch.allclose(straight.codebook.grad, relaxed.codebook.grad)


def test_the_noise_is_gumbel_distributed():
    noise = _gumbel_noise(torch.arange(10), torch.empty(10, 100, 100)).flatten().double()
    n = len(noise)
    assert noise.isfinite().all()
    # The standard errors are pi / sqrt(6 n) = 0.004 and, with a kurtosis of 5.4, pi^2 / 6 * sqrt(4.4 / n) = 0.011.
    assert abs(noise.mean().item() - 0.5772156649) < 0.02
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.06
    distribution = torch.exp(-torch.exp(-noise.sort().values))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (distribution - uniform).abs().max() < 2 / math.sqrt(n)  # Kolmogorov-Smirnov, exceeded once in 1500


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_gumbel_codes_are_drawn_with_the_probabilities_of_the_logits_at_any_temperature(temperature):
    quantizer = quantizer_of("gumbel", vocab_size=5, temperature=temperature)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    with torch.no_grad():
        quantizer.to_logits.weight.zero_()
        quantizer.to_logits.bias.copy_(logits)
        codes = quantizer(torch.randn(40, 4, 500)).codes
    frequencies = codes.flatten().bincount(minlength=5) / codes.numel()
    # 20,000 draws: a standard deviation is at most 0.0035.
    assert_near(frequencies, logits.softmax(0), rtol=0, atol=0.015)


def test_gumbels_terms_are_the_divergences_from_uniform_of_each_position_and_of_their_mean():
    quantizer = quantizer_of("gumbel", kl_weight=0.3, entropy_weight=0.7)
    latents = torch.randn(2, 4, 9)
    logits = rows(latents) @ quantizer.to_logits.weight.double().t() + quantizer.to_logits.bias.double()
    p = logits.softmax(1)
    expected = (math.log(16) + (p * p.log()).sum(1)).mean()
    output = quantizer(latents)
    assert_near(output.losses["kl"], 0.3 * expected)
    assert_near(output.metrics["kl_to_uniform"], expected)
    mean = p.mean(0)
    assert_near(output.losses["entropy"], 0.7 * (math.log(16) + (mean * mean.log()).sum()))


def test_the_temperature_falls_along_a_cosine_from_the_first_to_the_final_one():
    quantizer = quantizer_of("gumbel", temperature=2.0, final_temperature=0.5)
    for progress, expected in ((0, 2.0), (0.25, 1.25 + 0.75 * math.cos(math.pi / 4)), (0.5, 1.25), (1, 0.5)):
        quantizer.anneal(progress)
        assert quantizer.temperature == pytest.approx(expected, abs=1e-12)
        temperature = quantizer(torch.randn(1, 4, 2)).metrics["gumbel_temperature"]
        assert temperature.item() == pytest.approx(expected, abs=1e-6)


def literal_ibq(z: Tensor, e: Tensor, distance: str, temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes, z_q = (h + p - sg(p)) C and unweighted terms, with all matrices (Shi et al. 2024, equations 5 to 8)."""
    if distance == "cosine":
        z, e = z / z.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
    logits = z @ e.t()
    if distance == "euclidean":
        logits = -(z[:, None] - e).square().sum(2) / 2
    p = logits.softmax(1)
    h = F.one_hot(p.argmax(1), len(e)).to(p)
    quantized = (h + p - p.detach()) @ e
    q = (logits / temperature).softmax(1)
    return (
        p.argmax(1),
        quantized,
        {
            "double_quantization": (quantized - z).square().mean(),
            "commitment": (z - (h @ e).detach()).square().mean(),
            "codebook": (z.detach() - h @ e).square().mean(),
            "entropy": -(q * q.log()).sum(1).mean() + (q.mean(0) * q.mean(0).log()).sum(),
        },
    )


@pytest.mark.parametrize("block_elements", [1 << 19, 1], ids=["one block", "several blocks"])
@pytest.mark.parametrize("distance", ["dot", "euclidean", "cosine"])
def test_ibq_and_all_its_gradients_equal_autograd_on_the_published_formula(monkeypatch, distance, block_elements):
    monkeypatch.setattr(tokenizer.quantizers.search, "BLOCK_ELEMENTS", block_elements)
    weights = {"double_quantization": 0.7, "commitment": 0.5, "codebook": 0.3, "entropy": 0.2}
    options = {f"{term}_weight": weight for term, weight in weights.items()}
    quantizer = quantizer_of("ibq", distance=distance, entropy_temperature=0.6, **options)
    latents, grad = torch.randn(3, 4, 15, requires_grad=True), torch.randn(3, 4, 15)
    output = quantizer(latents)
    z, e = rows(latents).requires_grad_(), quantizer.codebook.detach().double().requires_grad_()
    codes, quantized, terms = literal_ibq(z, e, distance, 0.6)
    assert torch.equal(output.codes.flatten(), codes)
    assert_near(rows(output.quantized), quantized)
    assert torch.equal(output.quantized, quantizer.decode(output.codes))
    assert output.losses.keys() == weights.keys()
    pairs = [((output.quantized * grad).sum(), (quantized * rows(grad)).sum())]
    pairs += [(output.losses[term], weights[term] * loss) for term, loss in terms.items()]
    for mine, theirs in pairs:
        assert_near(mine, theirs)
        to_latents, to_codebook = gradients(mine, [latents, quantizer.codebook])
        expected = gradients(theirs, [z, e])
        assert_near(rows(to_latents), expected[0], rtol=1e-4, atol=1e-5)
        assert_near(to_codebook, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["dot", "euclidean", "cosine"])
def test_ibq_passes_a_gradient_to_codes_that_nobody_chose(distance):
    quantizer = quantizer_of("ibq", distance=distance)
    output = quantizer(torch.randn(1, 4, 3))
    (output.quantized * torch.randn(1, 4, 3)).sum().backward()
    assert output.codes.unique().numel() < 16
    assert (quantizer.codebook.grad != 0).any(1).all()


def test_ibq_outside_training_returns_the_code_itself():
    quantizer = quantizer_of("ibq", distance="dot").eval()
    latents = torch.randn(2, 4, 9)
    output = quantizer(latents)
    codes = (rows(latents) @ quantizer.codebook.double().t()).argmax(1)
    assert torch.equal(output.codes.flatten(), codes)
    assert_near(rows(output.quantized), quantizer.codebook[codes], rtol=0, atol=0)
