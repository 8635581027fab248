"""The benchmark of priors: every contestant does the work of its case, and what is compared is the same work."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from pipelines.benchmarks import prior_contestants as contestants
from pipelines.benchmarks import prior_training_contestants as trainers
from pipelines.benchmarks import priors
from pipelines.benchmarks.prior_contestants import PlainDecoder, Work

SIDE, VOCAB_SIZE = 3, 16


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    sizes = {"WIDTH": 16, "NUM_LAYERS": 1, "NUM_HEADS": 2, "VOCAB_SIZE": VOCAB_SIZE}
    for module in (contestants, trainers):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(contestants, "PIXELCNN_WIDTH", 8)
    monkeypatch.setattr(contestants, "PIXELCNN_LAYERS", 2)


def works() -> dict[str, Work]:
    """What our own contestant does in each case."""
    return {case.name: case.contestants["tessera"].args[0] for case in priors.cases(4)}


def test_every_case_says_what_it_takes_to_repeat_it():
    cases = priors.cases(4)
    assert len({case.name for case in cases}) == len(cases) == len(priors.cases(1))
    for case in cases:
        assert json.loads(json.dumps(case.setting)) == case.setting
        work = case.contestants["tessera"].args[0]
        assert case.amount == work.batch_size * (work.num_codes if case.unit == "tokens" else 1)
        for make in case.contestants.values():
            assert make is None or make.args == (work,)


def test_the_cases_are_those_of_the_table():
    found = works()
    for number, batch_size in (("one", 1), ("many", 4)):
        for guided in ("", "-guided"):
            for kind, dtype in (("", torch.float32), ("-bf16", torch.bfloat16), ("-compiled", torch.bfloat16)):
                work = found[f"gpt-{number}{guided}{kind}"]
                assert (work.batch_size, work.guided, work.dtype) == (batch_size, bool(guided), dtype)
                assert (work.compiled, work.num_codes) == (kind == "-compiled", 256)
    assert {"pixelcnn-8x8", "pixelcnn-32x32", "maskgit-guided-compiled", "train-64-bf16", "train-256"} <= found.keys()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "makers"),
    [
        ("gpt", [contestants.sample, contestants.sample_plainly, contestants.sample_llama]),
        ("maskgit", [contestants.sample, contestants.fill_in_plainly]),
        ("pixelcnn", [contestants.sample, contestants.recompute]),
    ],
)
def test_every_sampler_draws_whole_images(model, makers, dtype, guided):
    work = Work(model, SIDE, 2, dtype, guided)
    for make in makers:
        codes = make(work)()
        drawn = codes[:, 1:] if make is contestants.sample_llama else codes.flatten(1)  # Llama's begin with the class
        assert drawn.shape == (2, SIDE**2)
        assert 0 <= drawn.min() <= drawn.max() < VOCAB_SIZE


@pytest.mark.parametrize(
    ("model", "makers"),
    [
        ("gpt", [contestants.sample, contestants.sample_plainly]),
        ("maskgit", [contestants.sample, contestants.fill_in_plainly]),
    ],
)
def test_compiled_contestants_compile(model, makers, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for make in makers:
        torch.compiler.reset()
        before = len(graphs)
        run = make(Work(model, 2, 2, guided=True, compiled=True))
        assert len(graphs) > before
        compiled = len(graphs)
        run()
        assert len(graphs) == compiled


@pytest.mark.parametrize("make", [trainers.train, trainers.train_plainly, trainers.train_llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_trainer_learns_its_batch(make, dtype):
    torch.manual_seed(0)
    run = make(Work("gpt", SIDE, 4, dtype))
    losses = [float(run()) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01


@torch.no_grad()
def test_the_plain_decoder_sees_all_earlier_codes_and_no_later_one():
    model, codes = PlainDecoder(5).eval(), torch.randint(0, VOCAB_SIZE, (2, 5))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()

    def logits(codes: torch.Tensor) -> torch.Tensor:
        cache = [(keys, values) for keys, values in torch.zeros(1, 2, 2, 2, 5, 8)]
        return torch.stack([model(codes[:, j : j + 1], torch.tensor([j]), cache, mask) for j in range(5)])

    before = logits(codes)
    for j in range(5):
        changed = codes.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCAB_SIZE
        differs = (logits(changed) != before).any(-1).any(-1)
        assert differs.tolist() == [place >= j for place in range(5)]
