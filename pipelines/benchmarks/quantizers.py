"""Benchmark cases of the quantizers: a training pass with its update, and with backward where gradients learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pipelines.benchmarks.harness import OURS, Case, Section
from pipelines.benchmarks.quantizer_contestants import (
    Outcome,
    Work,
    reference_ema,
    reference_vq,
    tessera,
    tessera_cvq,
    tessera_kmeans,
)
from pipelines.benchmarks.quantizer_peer import Kind, fits, peer_kmeans, peer_quantizer

PEER = "vector-quantize-pytorch"
SIZES = [(1024, 8), (8192, 8), (8192, 64), (65_536, 8), (262_144, 8)]
"""K and D."""
SMALL_AND_LARGE = [(1024, 8), (8192, 64)]
LEVELS = [8, 5, 5, 5]
DEPTH = 4

Factory = Callable[[], Callable[[], Outcome]]


def _case(
    name: str,
    work: Work,
    ours: Factory,
    *,
    reference: Factory | None = None,
    peer: Factory | None = None,
    **setting: Any,
) -> Case:
    """A case; vectors are its unit. Without a reference there is none to print, without a peer its numbers are null."""
    sizes = {"vectors": work.num_vectors, "vocab_size": work.vocab_size, "dim": work.dim, "dtype": "float32"}
    contestants: dict[str, Factory | None] = {OURS: ours}
    if reference:
        contestants["reference"] = reference
    contestants[PEER] = peer if fits(work) else None
    name = f"{name}-{work.vocab_size}-{work.dim}"
    return Case(name, sizes | {"backward": work.backward} | setting, work.num_vectors, "vectors", contestants)


def _options(name: str, work: Work, **more: Any) -> dict[str, Any]:
    """The YAML block of a codebook without what happens once in many steps."""
    return {"name": name, "vocab_size": work.vocab_size, "revive_after": 0, **more}


def _table(num_images: int) -> list[Case]:
    """The cases of the issue's table, beside the sketch that it names."""
    cases = []
    for size in SIZES:
        work = Work(num_images, *size, backward=False)
        ours, peer = partial(tessera, work, _options("ema", work)), partial(peer_quantizer, work, "ema", {})
        cases.append(_case("ema", work, ours, reference=partial(reference_ema, work), peer=peer))
    for size in SIZES:
        work = Work(num_images, *size)
        ours, peer = partial(tessera, work, _options("vq", work)), partial(peer_quantizer, work, "vq", {})
        cases.append(_case("vq", work, ours, reference=partial(reference_vq, work), peer=peer))
    return cases


def _clustered(num_images: int) -> list[Case]:
    """CVQ beside the sketch of the gradient codebook that it extends."""
    cases = []
    for size in SMALL_AND_LARGE:
        for anchor in ("closest", "random", "probabilistic"):
            for name, all_move in ((f"cvq-{anchor}", False), (f"cvq-{anchor}-start", True)):
                work = Work(num_images, *size)
                ours = partial(tessera_cvq, work, _options("cvq", work, anchor=anchor), all_move=all_move)
                cases.append(_case(name, work, ours, reference=partial(reference_vq, work), all_codes_move=all_move))
    return cases


def _lookup_free(num_images: int) -> list[Case]:
    """Quantizers without a codebook, of 10 bits."""
    finite, binary = Work(num_images, 1000, len(LEVELS)), Work(num_images, 1024, 10)
    peers: dict[Kind, Factory] = {
        # The same softmax over codes as ours.
        "lfq": partial(peer_quantizer, binary, "lfq", {"commitment_loss_weight": 0.25}, {"inv_temperature": 1.0}),
        "bsq": partial(peer_quantizer, binary, "bsq", {"commitment_loss_weight": 0.25}, {"inv_temperature": 10.0}),
    }
    fsq = {"name": "fsq", "levels": LEVELS}
    peer_fsq = partial(peer_quantizer, finite, "fsq", {"levels": LEVELS})
    return [
        # The peer's has no entropy term: the same work is that of the second.
        _case("fsq", finite, partial(tessera, finite, fsq), peer=peer_fsq, levels=LEVELS),
        _case("fsq-paper", finite, partial(tessera, finite, fsq | {"entropy_weight": 0}), peer=peer_fsq, levels=LEVELS),
        *(_case(name, binary, partial(tessera, binary, {"name": name}), peer=peer) for name, peer in peers.items()),
    ]


def cases(num_images: int) -> list[Case]:
    """All cases for latents of 32x32 positions an image, of standard normal entries, as are the codebooks' codes."""
    small, large = (Work(num_images, *size) for size in SMALL_AND_LARGE)
    forward = Work(num_images, *SMALL_AND_LARGE[0], backward=False)
    residual = {"name": "residual", "depth": DEPTH, "quantizer": _options("ema", forward)}
    return [
        *_table(num_images),
        *_clustered(num_images),
        *(_case("ibq", work, partial(tessera, work, _options("ibq", work))) for work in (small, large)),
        _case(
            "simvq",
            large,
            partial(tessera, large, _options("simvq", large)),
            peer=partial(peer_quantizer, large, "simvq", {}),
        ),
        *_lookup_free(num_images),
        _case("gumbel", small, partial(tessera, small, {"name": "gumbel", "vocab_size": small.vocab_size})),
        _case(
            "residual",
            forward,
            partial(tessera, forward, residual),
            peer=partial(peer_quantizer, forward, "residual", {"num_quantizers": DEPTH}),
            depth=DEPTH,
        ),
        _case("kmeans", forward, partial(tessera_kmeans, forward), peer=partial(peer_kmeans, forward)),
    ]


SECTION = Section(cases, num_images=64)
