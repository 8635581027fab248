"""Which codes a training uses: the figures in its log, and the warning where the codebook collapses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_MODEL, TINY_RUN
from quantizer_cases import tiny_quantizer
from torch import Tensor, nn

from configs.loading import load_config
from configs.schema import TokenizerTrainingConfig
from pipelines import metrics, train_tokenizer
from pipelines.code_use import LEAST_PERPLEXITY, CodeUse, collapse_warning
from pipelines.run_log import RunLog
from tokenizer.quantizers import build_quantizer

Train = Callable[..., Path]


def even_counts(num_used: int, times: int, size: int = 100) -> Tensor:
    """Counts `(1, size)` of which the first `num_used` are `times`: a perplexity of `num_used`."""
    counts = torch.zeros(1, size, dtype=torch.int64)
    counts[:, :num_used] = times
    return counts


# The warning


def test_the_warning_says_perplexity_size_and_what_to_try():
    quantizer = tiny_quantizer("vq", vocab_size=100)
    assert collapse_warning(quantizer, even_counts(5, 1000)) == (
        "the codebook is collapsing: a perplexity of 5.0 is below 10% of the 100 codes; "
        "try quantizer.codebook_start=kmeans"
    )


def test_the_warning_comes_below_a_tenth_of_the_codes():
    quantizer = tiny_quantizer("vq", vocab_size=100)
    assert LEAST_PERPLEXITY == 0.1
    assert collapse_warning(quantizer, even_counts(9, 1000)) is not None
    assert collapse_warning(quantizer, even_counts(11, 1000)) is None


def test_fewer_choices_than_codes_say_nothing():
    quantizer = tiny_quantizer("vq", vocab_size=100)
    assert collapse_warning(quantizer, even_counts(1, 99)) is None
    assert collapse_warning(quantizer, even_counts(1, 100)) is not None
    assert collapse_warning(quantizer, torch.zeros(1, 100, dtype=torch.int64)) is None


def test_of_few_choices_a_perplexity_of_half_their_number_says_nothing():
    quantizer = tiny_quantizer("vq", vocab_size=100_000)
    assert "a perplexity of 1.0 is below 10% of the 100,000 codes" in collapse_warning(
        quantizer, even_counts(1, 100, 100_000)
    )
    assert collapse_warning(quantizer, even_counts(1, 99, 100_000)) is None
    assert collapse_warning(quantizer, even_counts(499, 3, 100_000)) is not None
    assert collapse_warning(quantizer, even_counts(500, 2, 100_000)) is None
    # Half as many choices as codes, and a perplexity of 5.5 % of these.
    assert collapse_warning(tiny_quantizer("vq", vocab_size=8192), even_counts(450, 9, 8192)) is not None


def test_one_collapsed_codebook_among_several_is_enough():
    quantizer = tiny_quantizer("residual", depth=3, vocab_size=100)
    counts = even_counts(100, 50).repeat(3, 1)
    assert collapse_warning(quantizer, counts) is None
    counts[1] = even_counts(2, 2500)
    assert "a perplexity of 2.0 is below 10% of the 100 codes" in collapse_warning(quantizer, counts)


def test_fewer_choices_than_the_codes_of_all_codebooks_say_nothing():
    quantizer = tiny_quantizer("residual", depth=3, vocab_size=100)
    assert quantizer.num_codebooks == 3
    assert collapse_warning(quantizer, even_counts(1, 99).expand(3, 100)) is None
    warning = collapse_warning(quantizer, even_counts(1, 100).expand(3, 100))
    assert "quantizer.quantizer.codebook_start=kmeans" in warning


def test_a_growing_codebook_is_measured_against_the_codes_that_it_has():
    quantizer = tiny_quantizer("vq", vocab_size=100, initial_vocab_size=20)
    counts = even_counts(3, 30)
    assert collapse_warning(quantizer, counts) is None
    quantizer.num_active.fill_(90)
    assert "below 10% of the 90 codes" in collapse_warning(quantizer, counts)


def test_a_warning_is_printed_again_only_after_it_stopped_applying(tmp_path, capsys):
    log = RunLog(Accelerator(cpu=True), tmp_path)
    for text in (None, "first", "second", None, "third", "fourth"):
        log.warn_once(text)
    printed = capsys.readouterr().out
    assert [word for word in ("first", "second", "third", "fourth") if word in printed] == ["first", "third"]


# What keeps codes in use


def share_in_use(name: str, **options: object) -> float:
    """The share of codes in use after 100 steps of a linear autoencoder, whose latents start small and far from 0."""
    encoder, decoder, quantizer = nn.Linear(16, 8), nn.Linear(8, 16), build_quantizer({"name": name, **options}, 8)
    nn.init.normal_(encoder.weight, std=0.05)
    nn.init.constant_(encoder.bias, 3.0)

    def latents(num_vectors: int) -> Tensor:
        return encoder(torch.randn(num_vectors, 16)).t()[None].detach()

    if quantizer.num_start_vectors:
        quantizer.initialize(latents(quantizer.num_start_vectors))
    scales = dict(quantizer.learning_rate_scales())
    parameters = [p for module in (encoder, decoder, quantizer) for p in module.parameters()]
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.01 * scales.get(p, 1.0)} for p in parameters])
    for step in range(100):
        quantizer.anneal((step + 1) / 100)
        vectors = torch.randn(512, 16)
        output = quantizer(encoder(vectors).t()[None])
        loss = (decoder(output.quantized[0].t()) - vectors).square().mean() + sum(output.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.update(step)
    return quantizer.eval()(latents(8192)).codes.unique().numel() / quantizer.vocab_size


SIZES = {name: {"vocab_size": 64} for name in ("cvq", "ema", "simvq", "vq")}
SIZES |= {"fsq": {"levels": [4, 4, 4]}, "lfq": {"num_bits": 6}}


@pytest.mark.parametrize("name", SIZES)
def test_default_options_keep_nearly_all_of_64_codes_in_use(name):
    assert share_in_use(name, **SIZES[name]) >= 0.95


@pytest.mark.parametrize("name", ["cvq", "ema", "simvq", "vq"])
def test_codes_that_start_far_from_the_latents_come_into_use_by_revival_or_anchors_alone(name):
    assert share_in_use(name, vocab_size=64, codebook_start="normal") > 0.8


@pytest.mark.parametrize("name", ["ema", "simvq", "vq"])
def test_few_codes_that_start_far_from_the_latents_are_in_use_where_none_is_revived(name):
    assert share_in_use(name, vocab_size=64, codebook_start="normal", revive_after=0) < 0.5


# The figures


def test_figures_are_of_the_codes_since_the_last_figures():
    quantizer = tiny_quantizer("residual", depth=2)
    use = CodeUse(quantizer, Accelerator(cpu=True))
    for num_codes in (16, 2):
        codes = torch.randint(0, num_codes, (3, 4, 4, 4, 2))
        for micro_batch in codes:
            use.add(micro_batch)
        figures, _ = use.take()
        counts = metrics.count_codes(codes, 16, num_codebooks=2)
        assert figures == {"codebook_usage": metrics.usage(counts), "codebook_perplexity": metrics.perplexity(counts)}
        assert figures["codebook_usage"] == num_codes / 16


@pytest.fixture
def training(tmp_path: Path, image_folder: Path) -> Train:
    """Train a tiny tokenizer with 4 x 4 codes for 6 steps of 4 images."""

    def train(*overrides: str) -> Path:
        given = [*TINY_MODEL, *TINY_RUN, "steps=6", "data.image_size=16", "mixed_precision=no", "validate_every=0"]
        given += [f"data.dataset={image_folder}", f"output_dir={tmp_path / 'run'}", *overrides]
        return train_tokenizer(load_config(TokenizerTrainingConfig, None, given))

    return train


def figures_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


COLLAPSING = ["quantizer.name=vq", "quantizer.vocab_size=64", "quantizer.codebook_start=uniform"]


def test_a_run_whose_codebook_collapses_says_so_once_and_what_to_try(training, capsys):
    run = training(*COLLAPSING, "quantizer.revive_after=0")
    printed = capsys.readouterr().out
    assert [line["codebook_perplexity"] < 6.4 for line in figures_of(run)] == [True] * 6
    assert printed.count("the codebook is collapsing") == 1
    assert "is below 10% of the 64 codes; try quantizer.codebook_start=kmeans" in printed


def test_a_run_says_nothing_of_collapse_during_warmup(training, capsys):
    training(*COLLAPSING, "quantizer.revive_after=0", "warmup_steps=6")
    assert "collapsing" not in capsys.readouterr().out


def test_a_run_with_fewer_choices_than_codes_between_two_lines_says_nothing_of_collapse(training, capsys):
    training(*COLLAPSING, "quantizer.revive_after=0", "quantizer.vocab_size=65")
    assert "collapsing" not in capsys.readouterr().out


def test_choices_between_two_lines_of_the_log_add_up(training, capsys):
    training(*COLLAPSING, "quantizer.revive_after=0", "quantizer.vocab_size=65", "log_every=2")
    assert capsys.readouterr().out.count("the codebook is collapsing") == 1


@pytest.mark.parametrize("name", ["ema", "multiscale", "product", "residual"])
def test_a_run_that_uses_its_codes_logs_that_and_says_nothing_of_collapse(name, training, capsys):
    inner = [] if name == "ema" else ["quantizer.quantizer.name=ema"]
    size = f"{'quantizer.' * (1 + len(inner))}vocab_size=16"
    run = training(f"quantizer.name={name}", *inner, size)
    assert len(figures_of(run)) == 6
    for line in figures_of(run):
        assert 0.1 < line["codebook_usage"] <= 1
        assert 1.6 < line["codebook_perplexity"] <= 16
        assert line["codebook_perplexity"] <= 16 * line["codebook_usage"] + 1e-6
    assert "collapsing" not in capsys.readouterr().out
