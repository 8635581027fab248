"""Two processes with half of the batch each leave every quantizer, and LeCAM, as one with the whole batch does."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantizer_worker as worker
import torch
from torch import Tensor

from tokenizer.quantizers import QUANTIZERS

Outcomes = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def two_processes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """All cases in two processes; a case's name gives what it returned in each."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = str(root / "tests" / "quantizer_worker.py")
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, str(folder)],
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            # Cases that stand are compared all the same; the one that hangs, and those behind it, have no file.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def outcomes(name: str) -> list[Any]:
        files = [folder / f"{name}.{rank}.pt" for rank in range(2)]
        assert all(file.is_file() for file in files), f"no result: {(folder / 'log.txt').read_text()[-3000:]}"
        results = [torch.load(file) for file in files]
        errors = [f"process {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
        assert not errors, "\n".join(errors)
        return [result["value"] for result in results]

    return outcomes


def require_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def codebook_of(state: dict[str, Tensor]) -> Tensor:
    """The rows that codes stand for, of all codebooks."""
    found = [tensor for name, tensor in state.items() if name.split(".")[-1] == "codebook"]
    return torch.stack(found)


def from_row(rows: Tensor, latents: Tensor) -> Tensor:
    """Which of the vectors of latents `(B, D, *grid)` each row `(M, D)` is, `(M,)`; -1 for none."""
    same = (rows[:, None] == latents.movedim(1, -1).flatten(0, -2)).all(2)
    return torch.where(same.any(1), same.int().argmax(1), -1)


def test_every_quantizer_of_the_table_is_trained_by_two_processes() -> None:
    assert {case.options["name"] for case in worker.PLAIN.values()} == QUANTIZERS.keys()


@pytest.mark.parametrize("name", worker.TRAINED)
def test_both_processes_hold_the_same_state_bit_for_bit_after_every_step(two_processes: Outcomes, name: str) -> None:
    first, second = two_processes(name)
    assert len(first) == len(second) == worker.TRAINED[name].steps
    for mine, theirs in zip(first, second, strict=True):
        require_equal(mine["state"], theirs["state"])


@pytest.mark.parametrize("name", worker.TRAINED)
def test_two_processes_train_a_quantizer_as_one_does_with_the_joined_batch(two_processes: Outcomes, name: str) -> None:
    halves, whole = two_processes(name), worker.train(worker.TRAINED[name])
    for first, second, one in zip(*halves, whole, strict=True):
        for i, codes in one["codes"].items():
            assert torch.equal(torch.cat([first["codes"][i], second["codes"][i]]), codes)
        losses = {key: (first["losses"][key] + second["losses"][key]) / 2 for key in first["losses"]}
        torch.testing.assert_close(losses, one["losses"], rtol=1e-5, atol=1e-5)
        gradients = dict(first["gradients"])
        for key in gradients:
            if key.startswith("latents "):
                gradients[key] = torch.cat([first["gradients"][key], second["gradients"][key]])
            else:
                assert torch.equal(second["gradients"][key], gradients[key])
        torch.testing.assert_close(gradients, one["gradients"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first["state"], one["state"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*worker.ENTROPY, "ibq", "lfq", "bsq"])
def test_the_entropy_over_the_batch_is_that_of_both_processes(two_processes: Outcomes, name: str) -> None:
    # Each process alone has another entropy, so that a term over its own half would show.
    case, (first, _) = worker.TRAINED[name], two_processes(name)
    half = worker.train(dataclasses.replace(case, latents=lambda i: case.latents(i).chunk(2)[0]))
    assert not torch.allclose(half[0]["losses"]["entropy 0"], first[0]["losses"]["entropy 0"], rtol=1e-3)


def without_revival(options: dict[str, Any]) -> dict[str, Any]:
    inner = {"quantizer": options["quantizer"] | {"revive_after": 0}} if "quantizer" in options else {"revive_after": 0}
    return options | inner


@pytest.mark.parametrize("name", worker.REVIVAL)
def test_the_cases_of_revival_move_codes(two_processes: Outcomes, name: str) -> None:
    case = worker.REVIVAL[name]
    never = worker.train(dataclasses.replace(case, options=without_revival(case.options)))
    moved = codebook_of(two_processes(name)[0][1]["state"]) - codebook_of(never[1]["state"])
    assert moved.abs().amax() > 0.1


@pytest.mark.parametrize("name", [name for name in worker.IMBALANCE if name.startswith("all-codes-are-in-use")])
def test_where_all_codes_are_in_use_none_is_moved(two_processes: Outcomes, name: str) -> None:
    case = worker.IMBALANCE[name]
    never = worker.train(dataclasses.replace(case, options=without_revival(case.options)))
    last = two_processes(name)[0][-1]["state"]
    assert last["recent_counts"].sum() == 0
    torch.testing.assert_close(codebook_of(last), codebook_of(never[-1]["state"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ema", "vq", "cvq-closest", "cvq-random", "cvq-probabilistic", "ibq"])
def test_a_growing_codebook_takes_latents_of_both_processes(two_processes: Outcomes, name: str) -> None:
    found = two_processes(f"growth-{name}")[0]
    assert [int(step["state"]["num_active"]) for step in found] == [4, 8, 16, 16]
    rows = from_row(codebook_of(found[2]["state"])[0, 8:], worker.GROWTH[f"growth-{name}"].latents(2))
    assert (rows >= 0).all()
    assert 0 < (rows < 24).sum() < len(rows)


@pytest.mark.parametrize("name", ["ema", "vq", "ibq"])
def test_revived_codes_are_latents_of_both_processes(two_processes: Outcomes, name: str) -> None:
    found, latents = two_processes(f"revival-{name}")[0], worker.REVIVAL[f"revival-{name}"].latents
    rows = torch.cat([from_row(codebook_of(found[step]["state"])[0, 4:], latents(step)) for step in (1, 3)])
    assert 0 < ((rows >= 0) & (rows < 24)).sum() < (rows >= 0).sum()


@pytest.mark.parametrize("name", worker.STARTED)
def test_two_processes_start_a_codebook_as_one_does(two_processes: Outcomes, name: str) -> None:
    first, second = two_processes(name)
    require_equal(first, second)
    torch.testing.assert_close(first, worker.start(worker.STARTED[name]), rtol=1e-6, atol=1e-6)
    before = worker.state_of(worker.build(worker.STARTED[name]))
    assert not torch.equal(codebook_of(first), codebook_of(before))


@pytest.mark.parametrize("name", worker.START)
def test_the_start_finds_the_clusters_that_only_one_process_sees(two_processes: Outcomes, name: str) -> None:
    codebook = codebook_of(two_processes(name)[0])[0]
    nearest, code = torch.cdist(worker.POINTS, codebook).min(1)
    assert nearest.max() < 0.2
    assert len(code.unique()) == len(worker.POINTS)


@pytest.mark.parametrize("name", worker.PLAIN)
def test_one_process_evaluates_without_the_other(two_processes: Outcomes, name: str) -> None:
    # Pictures are drawn by the first process alone, and the batches of a split do not divide evenly.
    codes, nothing = two_processes(f"alone-{name}")
    assert nothing is None
    assert torch.equal(codes, worker.evaluate_alone(worker.PLAIN[name]))


def test_two_processes_regularize_a_discriminator_by_lecam_as_one_does(two_processes: Outcomes) -> None:
    for first, second, one in zip(*two_processes("lecam"), worker.regularize(), strict=True):
        assert torch.equal(first["means"], second["means"])
        torch.testing.assert_close(first["means"], one["means"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((first["loss"] + second["loss"]) / 2, one["loss"], rtol=1e-5, atol=1e-6)
        for kind in ("real", "fake"):
            torch.testing.assert_close(torch.cat([first[kind], second[kind]]), one[kind], rtol=1e-5, atol=1e-6)
