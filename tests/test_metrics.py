"""Metrics against closed forms, and PSNR against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio

from pipelines import metrics


def test_psnr_of_a_constant_error_is_its_closed_form():
    images = torch.zeros(3, 3, 8, 8)
    offsets = torch.tensor([0.5, 0.02, 1.0])
    expected = 10 * torch.log10(4 / offsets**2)  # peak 2
    torch.testing.assert_close(metrics.psnr(images, images + offsets.view(3, 1, 1, 1)), expected, rtol=1e-5, atol=1e-4)


def test_psnr_of_equal_images_is_100_and_of_opposite_images_is_0():
    white = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(metrics.psnr(white, white), torch.tensor([100.0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(metrics.psnr(white, -white), torch.tensor([0.0]), rtol=0, atol=1e-5)


def test_psnr_clamps_the_reconstruction():
    white = torch.ones(1, 1, 4, 4)
    torch.testing.assert_close(metrics.psnr(white, 3 * white), torch.tensor([100.0]), rtol=0, atol=1e-4)


def test_psnr_equals_that_of_torchmetrics():
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    reconstruction = images + 0.3 * torch.randn(4, 3, 8, 8)
    reference = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(
        metrics.psnr(images, reconstruction), reference(reconstruction, images), rtol=1e-5, atol=1e-4
    )


def test_codes_are_counted_over_all_positions():
    codes = torch.tensor([[[0, 2], [2, 3]], [[2, 0], [0, 0]]])
    assert metrics.count_codes(codes, 6).tolist() == [[4, 0, 3, 1, 0, 0]]


def test_codes_of_several_codebooks_are_counted_apart():
    codes = torch.tensor([[[0, 2], [2, 3]], [[2, 0], [0, 0]]])
    assert metrics.count_codes(codes, 4, num_codebooks=2).tolist() == [[2, 0, 2, 0], [2, 0, 1, 1]]
    codes = torch.randint(0, 5, (3, 4, 2, 3))
    expected = [[(codes[..., i] == code).sum().item() for code in range(5)] for i in range(3)]
    assert metrics.count_codes(codes, 5, num_codebooks=3).tolist() == expected


def test_usage_and_perplexity_of_several_codebooks_are_means():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0]])
    assert metrics.usage(counts) == (1 + 1 / 4) / 2
    assert metrics.entropy(counts) == pytest.approx(math.log(4) / 2, rel=1e-12)
    assert metrics.perplexity(counts) == pytest.approx(math.sqrt(4 * 1), rel=1e-12)


def test_codes_that_never_occur_have_usage_0_and_perplexity_1():
    counts = torch.zeros(2, 4, dtype=torch.int64)
    assert metrics.usage(counts) == 0
    assert metrics.perplexity(counts) == 1


def test_usage_is_the_share_of_codes_that_occur():
    assert metrics.usage(torch.tensor([4, 0, 3, 1, 0, 0])) == 0.5
    assert metrics.usage(torch.tensor([1, 1])) == 1.0
    assert metrics.usage(torch.zeros(4, dtype=torch.int64)) == 0.0


def test_the_perplexity_of_n_equally_frequent_codes_is_n():
    counts = torch.zeros(100, dtype=torch.int64)
    counts[:7] = 13
    assert metrics.perplexity(counts) == pytest.approx(7, rel=1e-12)
    assert metrics.entropy(counts) == pytest.approx(math.log(7), rel=1e-12)


def test_the_perplexity_of_one_code_is_one():
    assert metrics.perplexity(torch.tensor([0, 5, 0])) == pytest.approx(1, rel=1e-12)


def test_the_entropy_of_a_histogram_is_its_definition():
    counts = [5, 1, 0, 4]
    expected = -sum(c / 10 * math.log(c / 10) for c in counts if c)
    assert metrics.entropy(torch.tensor(counts)) == pytest.approx(expected, rel=1e-12)


def test_a_nat_is_one_over_log_two_bits():
    assert metrics.to_bits(math.log(8)) == pytest.approx(3, rel=1e-12)


@pytest.mark.parametrize("n", [5, 60])
def test_the_nearest_distance_is_the_smallest_root_mean_square_difference(n):
    images, others = torch.randn(n, 3, 4, 4), torch.randn(2 * n, 3, 4, 4)
    differences = images.double()[:, None] - others.double()
    expected = differences.square().flatten(2).mean(2).sqrt().amin(1)
    torch.testing.assert_close(metrics.nearest_distances(images, others).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [5, 60])
def test_the_nearest_distance_to_a_set_with_the_image_itself_is_zero(n):
    images = torch.rand(n, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(metrics.nearest_distances(images, images.flip(0)), torch.zeros(n), rtol=0, atol=1e-3)


def test_the_mean_pairwise_distance_is_over_pairs_of_different_images():
    images = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert metrics.mean_pairwise_distance(images) == pytest.approx((1 + 3 + 2) / 3, rel=1e-6)


def test_the_laplacian_energy_is_that_of_the_definition_and_zero_for_ramps():
    images = torch.rand(2, 3, 5, 6)
    expected = []
    for image in images:
        inner = image[:, 1:-1, 1:-1]
        around = image[:, :-2, 1:-1] + image[:, 2:, 1:-1] + image[:, 1:-1, :-2] + image[:, 1:-1, 2:]
        expected.append((around - 4 * inner).square().mean())
    torch.testing.assert_close(metrics.laplacian_energy(images), torch.stack(expected))
    ramp = torch.arange(30.0).view(1, 1, 5, 6) / 30
    assert metrics.laplacian_energy(ramp).item() < 1e-10
