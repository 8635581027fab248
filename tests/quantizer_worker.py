"""What two processes run for test_quantizer_processes.py: every case, its outcome saved as `<folder>/<case>.<rank>.pt`.

The cases are quantizers, and LeCAM.

Each case has a process group of its own, so that one that fails or hangs takes no other with it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tokenizer.collectives import gather_rows
from tokenizer.discriminator import LeCAM
from tokenizer.quantizers import Quantizer, QuantizerOutput, build_quantizer

TIMEOUT = timedelta(seconds=10)
"""For one collective: a case that hangs fails."""

DIM = 4
NUM_IMAGES = 8
"""Of a micro-batch over all processes."""

POINTS = torch.cat([3 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3), torch.zeros(8, 1)], 1)
"""Eight vectors far apart, `(8, D)`."""


def scattered(index: int, grid: tuple[int, ...] = (2, 3)) -> Tensor:
    """Latents of one micro-batch without any structure."""
    return torch.randn(NUM_IMAGES, DIM, *grid, generator=torch.Generator().manual_seed(100 + index))


def choosing(first: list[int], second: list[int], second_noise: float = 0.1) -> Callable[[int], Tensor]:
    """Latents whose first half is near these of POINTS in turn, and whose second half is near those."""

    def latents(index: int) -> Tensor:
        half = NUM_IMAGES // 2 * 6
        order = torch.arange(half)
        points = torch.cat([POINTS[torch.tensor(codes)[order % len(codes)]] for codes in (first, second)])
        noise = torch.randn(2 * half, DIM, generator=torch.Generator().manual_seed(100 + index))
        noise *= torch.tensor([0.1, second_noise]).repeat_interleave(half).unsqueeze(1)
        return (points + noise).view(NUM_IMAGES, 2, 3, DIM).movedim(-1, 1)

    return latents


@dataclass(frozen=True)
class Case:
    """A quantizer, and the latents that it is trained on or starts from."""

    options: dict[str, Any]
    latents: Callable[[int], Tensor] = scattered
    """The micro-batch `(NUM_IMAGES, D, *grid)` of this index, of all processes."""
    steps: int = 4
    micro_batches: int = 1
    at_points: bool = False
    """Whether the codebook starts at POINTS."""
    checkpointed: bool = False
    """Whether the backward pass computes the forward pass again."""


TINY = {"vocab_size": 8, "codebook_start": "normal", "revive_after": 0}
EMA, VQ = {"name": "ema", **TINY}, {"name": "vq", **TINY}

# Short memories, so that a few steps show whatever would differ.
CODEBOOKS: dict[str, dict[str, Any]] = {
    "ema": EMA | {"decay": 0.8},
    "vq": VQ,
    "simvq": {"name": "simvq", **TINY},
    "cvq-closest": {"name": "cvq", "anchor": "closest", "decay": 0.9, **TINY},
    "cvq-random": {"name": "cvq", "anchor": "random", "decay": 0.9, **TINY},
    "cvq-probabilistic": {"name": "cvq", "anchor": "probabilistic", "decay": 0.9, **TINY},
    "ibq": {"name": "ibq", **TINY, "entropy_weight": 1.0},
}


def composites(**inner: Any) -> dict[str, dict[str, Any]]:
    ema, vq = EMA | {"decay": 0.8} | inner, VQ | inner
    return {
        "residual-ema": {"name": "residual", "depth": 3, "quantizer": ema},
        "residual-vq-shared": {"name": "residual", "depth": 3, "shared": True, "quantizer": vq},
        "residual-vq-dropout": {"name": "residual", "depth": 3, "quantizer_dropout": 0.8, "quantizer": vq},
        "product-ema": {"name": "product", "depth": 2, "quantizer": ema},
        "multiscale-vq": {"name": "multiscale", "quantizer": vq},
        "multiscale-ema": {"name": "multiscale", "quantizer": ema},
    }


def on_a_square(index: int) -> Tensor:
    """Latents of four scales, so that each of the four convolutions is used."""
    return scattered(index, (4, 4))


def latents_for(options: dict[str, Any]) -> Callable[[int], Tensor]:
    return on_a_square if options["name"] == "multiscale" else scattered


WITHOUT_CODEBOOK: dict[str, dict[str, Any]] = {
    "gumbel": {"name": "gumbel", "vocab_size": 8, "kl_weight": 0.1},
    "gumbel-relaxed": {"name": "gumbel", "vocab_size": 8, "kl_weight": 0.1, "straight_through": False},
    "lfq": {"name": "lfq", "num_bits": 6, "entropy_weight": 1.0, "entropy_group_bits": 3},
    "lfq-one-group": {"name": "lfq", "num_bits": 4, "entropy_weight": 1.0, "diversity_weight": 2.0},
    "bsq": {"name": "bsq", "num_bits": 6, "entropy_weight": 1.0},
    "fsq": {"name": "fsq", "levels": [5, 3]},
    "residual-lfq": {"name": "residual", "depth": 2, "quantizer": {"name": "lfq", "num_bits": 4}},
}

PLAIN = {name: Case(options, latents_for(options)) for name, options in (CODEBOOKS | composites()).items()}
PLAIN |= {name: Case(options, steps=3) for name, options in WITHOUT_CODEBOOK.items()}
PLAIN |= {
    "vq-cosine-projected": Case(VQ | {"code_dim": 2, "distance": "cosine", "entropy_weight": 1.0}),
    "ema-rotation": Case(EMA | {"gradient": "rotation"}),
    "ema-micro-batches": Case(EMA | {"entropy_weight": 1.0}, steps=3, micro_batches=2),
    "vq-micro-batches": Case(VQ | {"entropy_weight": 1.0}, steps=3, micro_batches=2),
}

PLAIN |= {
    f"checkpointed-{name}": Case(options | {"entropy_weight": 1.0}, steps=3, checkpointed=True)
    for name, options in (CODEBOOKS | {"lfq": WITHOUT_CODEBOOK["lfq"]}).items()
}

ENTROPY = {
    f"entropy-{name}": Case(options | {"entropy_weight": 1.0}, steps=3)
    for name, options in CODEBOOKS.items()
    if name in ("ema", "vq", "simvq", "cvq-closest")
} | {
    f"entropy-{name}": Case(options, latents_for(options), steps=3)
    for name, options in composites(entropy_weight=1.0).items()
    if name in ("residual-vq-shared", "product-ema", "multiscale-ema")
}

SOME_UNUSED = choosing([0, 1, 2, 3], [0, 1, 2, 3, 4])
REVIVAL = {
    f"revival-{name}": Case(options | {"revive_after": 2}, SOME_UNUSED, at_points=True)
    for name, options in CODEBOOKS.items()
} | {
    f"revival-{name}": Case(options, latents_for(options))
    for name, options in composites(revive_after=2, revive_below=1.0).items()
}
REVIVAL |= {
    f"revival-{name}-micro-batches": Case(options | {"revive_after": 1}, SOME_UNUSED, micro_batches=2, at_points=True)
    for name, options in {"ema": EMA, "vq": VQ}.items()
}

GROWTH = {
    f"growth-{name}": Case(options | {"vocab_size": 16, "initial_vocab_size": 4})
    for name, options in (CODEBOOKS | {"ema-revival": EMA | {"revive_after": 2}}).items()
} | {
    f"growth-{name}": Case(options, latents_for(options))
    for name, options in composites(vocab_size=16, initial_vocab_size=4).items()
    if name in ("residual-ema", "residual-vq-shared", "multiscale-vq")
}

# 48 vectors a step. In the first two, one process alone has a vector at code 4, in little use, and none has 5 to 7.
ONE_SIDED = {
    "only-the-first-process-has-little-used-codes": choosing([0, 1, 2, 3] * 5 + [0, 1, 2, 4], [0, 1, 2, 3]),
    "only-the-second-process-has-little-used-codes": choosing([0, 1, 2, 3], [0, 1, 2, 3] * 5 + [0, 1, 2, 4]),
    "all-codes-are-in-use": choosing([*range(8)], [*range(8)]),
    "each-process-uses-half-of-the-codes": choosing([0, 1, 2, 3], [4, 5, 6, 7]),
    "the-second-process-has-one-vector-only": choosing([0, 1, 2, 3], [5], second_noise=0.0),
}
IMBALANCE = {
    f"{situation}-{name}": Case(options | {"revive_after": 2}, latents, steps=6, at_points=True)
    for situation, latents in ONE_SIDED.items()
    for name, options in CODEBOOKS.items()
}

# 24 vectors a process: fewer than codes, in one process or in both together.
FEW = {
    f"{size}-codes-{name}": Case(options | {"vocab_size": size}, steps=3)
    for size in (32, 64)
    for name, options in CODEBOOKS.items()
    if size == 64 or name.startswith("cvq")
}

START = {
    f"start-{name}": Case(options | {"codebook_start": "kmeans"}, choosing([0, 1, 2, 3], [4, 5, 6, 7]))
    for name, options in CODEBOOKS.items()
}
START_OF_OTHERS = {
    f"start-{name}": Case(options, latents_for(options))
    for name, options in (
        composites(codebook_start="kmeans")
        | {
            "vq-cosine-projected": VQ | {"code_dim": 2, "distance": "cosine", "codebook_start": "kmeans"},
            "vq-growing": VQ | {"initial_vocab_size": 4, "codebook_start": "kmeans"},
            "vq-128-codes": VQ | {"vocab_size": 128, "codebook_start": "kmeans"},
        }
    ).items()
}

FEW_SCALES = {
    f"multiscale-{inner['name']}-of-as-many-scales-as-convolutions": Case(
        {"name": "multiscale", "scales": [1, 2, 4], "num_convolutions": 3, "quantizer": inner}, on_a_square
    )
    for inner in (EMA, VQ)
}

TRAINED = PLAIN | ENTROPY | REVIVAL | GROWTH | IMBALANCE | FEW | FEW_SCALES
STARTED = START | START_OF_OTHERS


def build(case: Case) -> Quantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(case.options, DIM)
    if case.at_points:
        quantizer.set_codes(torch.arange(len(POINTS)), POINTS)
    return quantizer


def state_of(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}


def rows_of(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.chunk(world)[rank].clone()


class Checkpointed(nn.Module):
    """A quantizer whose activations are not kept for the backward pass."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, latents: Tensor, seeds: Tensor) -> QuantizerOutput:
        return checkpoint(self.quantizer, latents, seeds, use_reentrant=False)


def train(case: Case, rank: int = 0, world: int = 1) -> list[dict[str, dict[str, Tensor]]]:
    """What each step left: state, gradients (of latents too), losses and codes, the last three of each micro-batch.

    Gradients are averaged over processes by DistributedDataParallel, without its broadcast of buffers, which would
    repair those that differ.
    """
    quantizer = build(case)
    parameters = list(quantizer.parameters())
    parallel = world > 1 and parameters
    model: nn.Module = Checkpointed(quantizer) if case.checkpointed else quantizer
    model = DistributedDataParallel(model, broadcast_buffers=False) if parallel else model
    optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
    found = []
    for step in range(case.steps):
        quantizer.anneal(step / case.steps)
        losses, codes, gradients = {}, {}, {}
        for i in range(case.micro_batches):
            index = step * case.micro_batches + i
            last = i + 1 == case.micro_batches
            latents = rows_of(case.latents(index), rank, world).requires_grad_()
            seeds = rows_of(torch.arange(NUM_IMAGES) + 1000 * index, rank, world)
            with nullcontext() if last or not parallel else model.no_sync():
                output = model(latents, seeds)
                terms = output.losses | {"reconstruction": (output.quantized - latents.detach() / 2).square().mean()}
                (torch.stack(list(terms.values())).sum() / case.micro_batches).backward()
            losses |= {f"{name} {i}": term.detach() for name, term in terms.items()}
            codes[str(i)] = output.codes
            gradients[f"latents {i}"] = latents.grad / world
        gradients |= {name: p.grad.clone() for name, p in quantizer.named_parameters() if p.grad is not None}
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        quantizer.update(step, seed=5)
        found.append({"state": state_of(quantizer), "gradients": gradients, "losses": losses, "codes": codes})
    return found


def start(case: Case, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The state after the start from two micro-batches, that the training loop gathers."""
    quantizer = build(case)
    quantizer.initialize(torch.cat([gather_rows(rows_of(case.latents(i), rank, world)) for i in range(2)]))
    return state_of(quantizer)


def evaluate_alone(case: Case, rank: int = 0) -> Tensor | None:
    """The codes that the first process alone chooses in evaluation, as for a picture or the rest of a split."""
    quantizer = build(case).eval()
    return quantizer(case.latents(0)).codes if rank == 0 else None


def regularize(rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
    """LeCAM's loss, means and gradients at the logits of each of three steps, where each process has other logits."""
    lecam, found = LeCAM(0.5), []
    for step in range(3):
        logits = torch.randn(2, NUM_IMAGES, generator=torch.Generator().manual_seed(step)).cumsum(1)
        real, fake = (rows_of(rows, rank, world).requires_grad_() for rows in logits)
        loss = lecam(real, fake)
        loss.backward()
        found.append({"loss": loss.detach(), "means": lecam.means.clone()})
        found[-1] |= {"real": real.grad / world, "fake": fake.grad / world}
    return found


def outcome(name: str, run: Callable[[], Any], rank: int, folder: Path, timeout: timedelta = TIMEOUT) -> None:
    """Run a case in a process group of its own and save what it returns, or the traceback of what it raises."""
    store = dist.FileStore(str(folder / f"{name}.store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    try:
        result = {"value": run()}
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, folder / f"{name}.{rank}.pt")
    # Nobody leaves before the other is done: it may still be sending.
    store.set(f"done {rank}", "")
    store.wait(["done 0", "done 1"], 3 * TIMEOUT)
    dist.destroy_process_group()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, case in TRAINED.items():
        outcome(name, partial(train, case, rank, 2), rank, folder)
    for name, case in STARTED.items():
        outcome(name, partial(start, case, rank, 2), rank, folder)
    for name, case in PLAIN.items():
        outcome(f"alone-{name}", partial(evaluate_alone, case, rank), rank, folder, timedelta(seconds=5))
    outcome("lecam", partial(regularize, rank, 2), rank, folder)


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    mp.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
