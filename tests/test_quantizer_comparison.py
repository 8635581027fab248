"""The comparison of quantizers, and the curves of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.schema import TokenizerTrainingConfig
from pipelines.benchmarks.quantizer_comparison import (
    ALIVE,
    PEER,
    TEN_BITS,
    ComparisonConfig,
    PeerEMA,
    compare_quantizers,
)
from pipelines.benchmarks.training_speed import tokenizer_step
from pipelines.curves import CurvesConfig, plot_runs
from tokenizer.quantizers import QUANTIZERS, build_quantizer

OVERRIDES = ["model.channels=8", "model.residual_channels=4", "batch_size=4", "data.image_size=16", "warmup_steps=1"]


@pytest.fixture
def comparison(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ComparisonConfig:
    """Two rows, two steps each; the table of quantizers is put back afterwards."""
    monkeypatch.setattr("pipelines.benchmarks.quantizer_comparison.QUANTIZERS", dict(QUANTIZERS))
    monkeypatch.setitem(QUANTIZERS, PEER, PeerEMA)
    return ComparisonConfig(
        dataset=str(image_folder), overrides=OVERRIDES, steps=2, output_dir=str(tmp_path), rows=[PEER, "residual"]
    )


def test_each_row_is_trained_once_and_its_figures_stand_in_the_table(comparison, tmp_path, capsys):
    first = compare_quantizers(comparison)
    lines = first.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(f"| {PEER} | 4x4 of 1024 | 10 | ")
    assert lines[3].startswith("| residual | 4x4 (depth 2) of 32 | 10 | ")
    assert {folder.name for folder in tmp_path.iterdir()} == {PEER, "residual"}
    capsys.readouterr()
    again = compare_quantizers(comparison).splitlines()
    assert [line.split("|")[1:-2] for line in again] == [line.split("|")[1:-2] for line in lines]  # but for images/s
    assert "is complete: 2 steps" in capsys.readouterr().out


def test_an_unknown_row_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown row 'emma'; did you mean 'ema'"):
        ComparisonConfig(dataset="digits", rows=["emma"])


@pytest.mark.parametrize("row", [row for row in TEN_BITS if PEER not in row and row != "multiscale"])
def test_every_row_but_multiscale_has_ten_bits_a_position(row):
    assert build_quantizer(TEN_BITS[row], 64).code_layout((1, 1)).bits == pytest.approx(10, abs=1e-9)


@pytest.mark.parametrize("row", ALIVE)
def test_the_second_table_has_a_small_and_a_large_vocabulary(row):
    name, size = row.removesuffix(" codes").split(", ")
    assert ALIVE[row]["name"] == name
    assert build_quantizer(ALIVE[row], 64).vocab_size == int(size)


def test_the_timed_step_trains_network_and_codebook():
    config = TokenizerTrainingConfig(
        model={"name": "vqvae", "channels": 8, "residual_channels": 4},
        quantizer={"name": "ema", "vocab_size": 16},
        batch_size=4,
        learning_rate=1e-2,
        output_dir="not_made",
    )
    step = tokenizer_step(config)
    losses = [float(step()) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert not Path("not_made").exists()


def test_the_peer_decodes_its_own_codes():
    peer = PeerEMA(4, vocab_size=16)
    output = peer(torch.randn(2, 4, 6, 6))
    peer.eval()
    output = peer(torch.randn(2, 4, 3, 5))
    assert output.codes.shape == (2, 3, 5)
    torch.testing.assert_close(peer.decode(output.codes), output.quantized, rtol=0, atol=1e-6)


def test_the_curves_of_runs_are_drawn_into_one_picture(tokenizer_run, tmp_path):
    file = plot_runs(
        CurvesConfig(runs=[str(tokenizer_run), str(tokenizer_run)], output_file=str(tmp_path / "a" / "b.png"))
    )
    with Image.open(file) as picture:
        assert picture.size == (900, 300)
        assert len(picture.convert("L").getcolors()) > 10


def test_a_folder_without_a_run_and_an_unknown_metric_are_refused(tokenizer_run, tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: there is no metrics.jsonl"):
        plot_runs(CurvesConfig(runs=[str(tmp_path)]))
    with pytest.raises(ValueError, match=r"unknown metric of .* 'psnr'; did you mean 'psnr_db'"):
        plot_runs(CurvesConfig(runs=[str(tokenizer_run)], metrics=["psnr"], output_file=str(tmp_path / "c.png")))
