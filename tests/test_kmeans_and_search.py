"""The nearest-code search and k-means: right within rounding, and never an N x K matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantizer_cases import loss_of, tiny_quantizer
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenizer.quantizers.kmeans import kmeans
from tokenizer.quantizers.search import BLOCK_ELEMENTS, block_rows, largest_products, nearest_codes

# Of group sizes 2 to 512, with last groups full and not; the last three search in several blocks.
SIZES = [
    (50, 8, 2),
    (50, 8, 3),
    (50, 3, 37),
    (300, 16, 131),
    (500, 5, 256),
    (2100, 5, 1000),
    (40, 4, 65_536),
    (40, 4, 70_000),
]


def assert_nearest(vectors: Tensor, codebook: Tensor) -> None:
    """Every chosen squared distance is within 1e-5 (|x|^2 + |e|^2) of the smallest, in float64."""
    codes = nearest_codes(vectors, codebook)
    assert codes.dtype == torch.int64
    x, e = vectors.double(), codebook.double()
    squared = x.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * x @ e.t()
    chosen = squared.gather(1, codes[:, None]).squeeze(1)
    bound = 1e-5 * (x.square().sum(1) + e[codes].square().sum(1))
    assert ((chosen - squared.amin(1)) <= bound).all()


@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), SIZES)
def test_the_chosen_code_is_nearest_up_to_float32_rounding(num_vectors, dim, vocab_size):
    for scale in (1e-3, 1.0, 1e3):
        assert_nearest(scale * torch.randn(num_vectors, dim), scale * torch.randn(vocab_size, dim))
    assert_nearest(torch.randn(num_vectors, dim), 1e-4 * torch.randn(vocab_size, dim))
    assert_nearest(1e-4 * torch.randn(num_vectors, dim), 100 + torch.randn(vocab_size, dim))


@pytest.mark.parametrize("vocab_size", [2, 3, 5, 16, 17, 100, 1000, 2**16, 70_000])
def test_every_code_is_found_from_its_own_vector(vocab_size):
    codebook = torch.nn.functional.normalize(torch.randn(vocab_size, 8))
    codes = torch.cat([torch.arange(min(vocab_size, 40)), torch.arange(vocab_size)[-40:], torch.tensor([0])])
    assert torch.equal(nearest_codes(codebook[codes], codebook), codes)
    assert torch.equal(largest_products(codebook[codes], codebook), codes)


@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), [(64, 3, 17), (300, 16, 131), (1200, 7, 1013)])
def test_exact_duplicates_go_to_the_lowest_index(num_vectors, dim, vocab_size):
    distinct = torch.randn(12, dim)
    codebook = distinct[torch.randint(0, 12, (vocab_size,))]
    codes = nearest_codes(torch.randn(num_vectors, dim), codebook)
    first = (codebook[codes][:, None] == codebook).all(2).int().argmax(1)
    assert torch.equal(codes, first)


@pytest.mark.parametrize("dim", [1, 7, 33, 100])
@pytest.mark.parametrize("vocab_size", [2, 3, 5, 16])
def test_duplicates_go_to_the_lowest_index_for_a_lone_vector_as_well(dim, vocab_size):
    for seed in range(200):
        vectors, codebook = torch.randn(2, 1, dim, generator=torch.Generator().manual_seed(seed))
        assert nearest_codes(vectors, codebook.repeat(vocab_size, 1)).tolist() == [0]


def test_exact_duplicates_go_to_the_lowest_index_with_several_threads_as_well():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for vocab_size in range(2, 140):
            codes = nearest_codes(torch.randn(100, 33), torch.randn(1, 33).repeat(vocab_size, 1))
            assert not codes.any(), vocab_size
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize(("num_vectors", "dim", "vocab_size"), SIZES)
def test_the_largest_product_is_found_up_to_float32_rounding(num_vectors, dim, vocab_size):
    vectors, codebook = torch.randn(num_vectors, dim), torch.randn(vocab_size, dim)
    products = vectors.double() @ codebook.double().t()
    chosen = products.gather(1, largest_products(vectors, codebook)[:, None]).squeeze(1)
    assert (products.amax(1) - chosen).max() < 1e-4


@pytest.mark.parametrize("vocab_size", [2, 3, 37, 1000, 70_000])
def test_vectors_that_are_not_finite_give_codes_in_range(vocab_size):
    vectors = torch.randn(30, 4)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        vectors[i::6, i] = value
    codebook = torch.randn(vocab_size, 4)
    for search in (nearest_codes, largest_products):
        codes = search(vectors, codebook)
        assert codes.min() >= 0
        assert codes.max() < vocab_size
        finite = vectors.isfinite().all(1)
        assert torch.equal(codes[finite], search(vectors[finite], codebook))


# Memory


class LargestAllocation(TorchDispatchMode):
    """Remembers the most bytes that one tensor took, in forward and backward passes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return output


class Allocations(TorchDispatchMode):
    """Remembers the bytes of every tensor's memory that an operation takes anew, and which of it still exists."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given, taken = (
            {StorageWeakRef(leaf.untyped_storage()): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), output)
        )
        self.num_bytes |= {ref: leaf.untyped_storage().nbytes() for ref, leaf in taken.items() if ref not in given}
        self.most = max(self.most, self.held)
        return output

    @property
    def held(self) -> int:
        """The sum of what still exists."""
        return sum(size for ref, size in self.num_bytes.items() if not ref.expired())


LARGE = {"vocab_size": 8192, "num_bits": 13, "levels": [8, 8, 8, 4, 4], "decay": 0.5}
SHARED_TERMS = {name: {"entropy_weight": 0.1} for name in ("cvq", "ema", "simvq", "vq")}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name",
    ["bsq", "cvq", "cvq-probabilistic", "cvq-random", "ema", "fsq", "ibq", "lfq", "product", "residual", "simvq", "vq"],
)
def test_no_tensor_of_vectors_times_codes_is_ever_held(name, training):
    quantizer = tiny_quantizer(name, **LARGE, **SHARED_TERMS.get(name, {})).train(training)
    latents = torch.randn(2, 4, 1024, requires_grad=training)
    with LargestAllocation() as largest:
        output = quantizer(latents)
        if training:
            loss_of(output).backward()
            quantizer.update(0)
    assert quantizer.vocab_size == 8192
    assert largest.num_bytes < 2048 * 8192  # a fourth of what the float32 matrix takes
    if training:
        assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["ema", "ibq", "vq"])
def test_no_more_than_the_codebook_and_a_block_is_held_with_262144_codes(name):
    quantizer = tiny_quantizer(name, vocab_size=1 << 18, entropy_weight=0.1)
    latents = torch.randn(2, 4, 16, requires_grad=True)
    with LargestAllocation() as largest:
        loss_of(quantizer(latents)).backward()
        quantizer.update(0)
    assert largest.num_bytes <= 16 * 4 * 2**18  # 16 rows of scores; the codebook of 4 channels takes a fourth


def test_scores_held_at_once_on_a_cpu_take_at_most_32_mib_and_are_one_row_at_least():
    for vocab_size in (size for i in range(12, 23) for size in (2**i, 2**i - 1, 3 * 2**i // 4)):
        num_rows = block_rows(torch.empty(1, 4), vocab_size)
        assert num_rows >= 1
        assert 4 * num_rows * vocab_size <= 32 << 20


@pytest.mark.parametrize("find", [nearest_codes, largest_products])
def test_a_search_of_many_blocks_holds_its_scores_in_one_buffer(find, monkeypatch):
    monkeypatch.setattr("tokenizer.quantizers.search.BLOCK_ELEMENTS", 1)  # blocks of 16 rows, the last one not full
    with Allocations() as taken:
        find(torch.randn(500, 4), torch.randn(1024, 4))
    assert list(taken.num_bytes.values()).count(4 * 16 * 1024) == 1


@pytest.mark.parametrize("name", ["ibq", "vq"])
def test_the_blocks_of_a_soft_assignment_are_not_kept_for_the_backward_pass(name, monkeypatch):
    monkeypatch.setattr("tokenizer.quantizers.search.BLOCK_ELEMENTS", 1)  # blocks of 16 rows
    quantizer = tiny_quantizer(name, vocab_size=512, entropy_weight=0.1)
    latents = torch.randn(1, 4, 256, requires_grad=True)
    matrix = 4 * 256 * 512
    with Allocations() as taken:
        loss = loss_of(quantizer(latents))
        assert taken.held < matrix / 4
        loss.backward()
    assert taken.most < matrix / 2


@pytest.mark.parametrize("name", ["cvq", "vq"])
def test_the_backward_pass_makes_one_gradient_of_the_size_of_the_codebook(name):
    quantizer = tiny_quantizer(name, vocab_size=1000)
    loss = loss_of(quantizer(torch.randn(2, 4, 16, requires_grad=True)))
    with Allocations() as taken:
        loss.backward()
    assert list(taken.num_bytes.values()).count(4 * 1000 * 4) == 1


def test_the_measure_of_memory_sees_a_matrix_in_forward_and_in_backward():
    vectors, codebook = torch.randn(512, 4, requires_grad=True), torch.randn(1024, 4)
    with LargestAllocation() as forward:
        distances = torch.cdist(vectors, codebook)
    assert forward.num_bytes >= 4 * 512 * 1024
    loss = distances.square().sum()
    with LargestAllocation() as backward:
        loss.backward()
    assert backward.num_bytes >= 4 * 512 * 1024


def test_the_sum_of_memory_counts_what_is_taken_anew_and_still_exists():
    given = torch.randn(1000)
    with Allocations() as taken:
        kept = [given + i for i in range(3)]
        view = kept[0].view(10, 100).add_(1)
        (given + 1).sum()
    assert (taken.held, taken.most) == (3 * 4000, 4 * 4000 + 4)
    del kept
    assert taken.held == 4000
    assert view[0, 0] == given[0] + 1


def test_a_multiscale_forward_holds_no_matrix_either():
    quantizer = tiny_quantizer("multiscale", vocab_size=8192)
    with LargestAllocation() as largest:
        loss_of(quantizer(torch.randn(2, 4, 32, 32))).backward()
    assert largest.num_bytes < 2048 * 8192


def test_kmeans_holds_no_matrix_of_vectors_times_clusters():
    with LargestAllocation() as largest:
        kmeans(torch.randn(8192, 4), 2048, num_iterations=2)
    assert largest.num_bytes < 8192 * 2048
    assert BLOCK_ELEMENTS * 4 < 8192 * 2048


# k-means


def separated_clusters(num_clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vectors `(12 K, 3)` close to K points far apart, in any order, and the K means of those near each point."""
    cells = torch.randperm(5**3, generator=generator)[:num_clusters]
    points = 20.0 * torch.stack([cells // 25, cells // 5 % 5, cells % 5], dim=1)
    noise = 0.1 * torch.randn(num_clusters, 12, 3, generator=generator)
    vectors = points[:, None] + noise
    shuffled = vectors.flatten(0, 1)[torch.randperm(12 * num_clusters, generator=generator)]
    return shuffled, vectors.mean(1)


@pytest.mark.parametrize("num_clusters", [2, 5, 16, 64])
def test_kmeans_finds_the_centres_of_separated_clusters(num_clusters):
    for seed in range(5):
        vectors, expected = separated_clusters(num_clusters, torch.Generator().manual_seed(seed))
        centres = kmeans(vectors, num_clusters)
        nearest = torch.cdist(expected, centres).argmin(1)
        assert nearest.unique().numel() == num_clusters
        torch.testing.assert_close(centres[nearest], expected, rtol=1e-5, atol=1e-4)


def test_kmeans_gives_the_same_centres_whatever_torch_s_generator_holds():
    vectors = torch.randn(300, 4)
    torch.manual_seed(1)
    expected = kmeans(vectors, 20)
    torch.manual_seed(2)
    assert torch.equal(kmeans(vectors, 20), expected)


def test_more_iterations_of_kmeans_lower_the_error():
    vectors = torch.randn(1000, 4)
    errors = [torch.cdist(vectors, kmeans(vectors, 80, n)).amin(1).square().mean() for n in (1, 3, 10)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("num_clusters", [3, 8, 100])
def test_kmeans_of_vectors_that_are_all_equal_gives_that_vector(num_clusters):
    for vectors in (torch.full((20, 4), 3.0), torch.zeros(20, 4)):
        centres = kmeans(vectors, num_clusters)
        torch.testing.assert_close(centres, vectors[:1].expand(num_clusters, 4), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_clusters", [4, 10, 70])
def test_kmeans_of_four_vectors_many_times_over_holds_each_of_them(num_clusters):
    four = torch.randn(4, 3)
    centres = kmeans(four.repeat(25, 1), num_clusters)
    assert centres.isfinite().all()
    differences = (centres[:, None] - four).abs().amax(2)  # (K, 4)
    assert differences.amin(0).max() < 1e-5
    assert differences.amin(1).max() < 1e-5


@pytest.mark.parametrize(
    ("num_vectors", "dim", "num_clusters"), [(3, 4, 16), (1, 4, 8), (1, 1, 4), (7, 2, 8), (70, 3, 300)]
)
def test_kmeans_with_fewer_vectors_than_clusters_gives_finite_distinct_centres(num_vectors, dim, num_clusters):
    vectors = torch.randn(num_vectors, dim)
    centres = kmeans(vectors, num_clusters)
    assert centres.isfinite().all()
    assert len(centres.unique(dim=0)) == num_clusters
    assert torch.cdist(vectors, centres).amin(1).max() < 1e-2
