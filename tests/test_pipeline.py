"""The pipeline object: put together, saved, loaded, sampled from, and refused where parts do not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_cases import make_pipeline
from prior_cases import tiny_prior
from torch import Tensor

import pipelines.image_generation
from configs.layout import CodeLayout
from pipelines import ImageGenerationPipeline
from pipelines.preprocessing import to_pil
from prior import Prior, build_prior
from tokenizer import ImageTokenizer

PARTS = {"README.md", "pipeline.json", "prior", "tokenizer"}


@pytest.fixture
def pipeline(tokenizer_run: Path, prior_run: Path) -> ImageGenerationPipeline:
    return ImageGenerationPipeline.from_parts(tokenizer_run, prior_run)


def sample(pipeline: ImageGenerationPipeline, *arguments: Any, **options: Any) -> Tensor:
    images = pipeline(*arguments, output_type="tensor", **options).images
    assert isinstance(images, Tensor)
    return images


def prior_of(layout: CodeLayout, fingerprint: str, **options: Any) -> Prior:
    model = {"name": "gpt", "width": 16, "num_layers": 1, "num_heads": 2, **options}
    return build_prior(model, layout, fingerprint=fingerprint)


def test_a_saved_pipeline_gives_the_same_images_for_a_seed(pipeline: ImageGenerationPipeline, tmp_path: Path) -> None:
    before = sample(pipeline, 3, labels=[0, 1, 1], seed=5)
    pipeline.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == PARTS
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(sample(loaded, 3, labels=[0, 1, 1], seed=5), before)
    assert loaded.class_names == ["cat", "dog"]
    assert pipeline.tokenizer.fingerprint in (tmp_path / "saved" / "README.md").read_text()


def test_saving_over_a_pipeline_replaces_it(
    pipeline: ImageGenerationPipeline, tiny_tokenizer: ImageTokenizer, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    tiny_tokenizer.config.fingerprint = tiny_tokenizer.compute_fingerprint()
    other = ImageGenerationPipeline(tiny_tokenizer, prior_of(tiny_tokenizer.code_layout, tiny_tokenizer.fingerprint))
    other.save_pretrained(tmp_path / "saved")
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(sample(loaded, 2, seed=0), sample(other, 2, seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == PARTS


def test_saving_into_an_empty_folder_works_and_into_a_foreign_one_is_refused(
    pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    pipeline.save_pretrained(tmp_path / "empty")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"foreign is not empty and holds no pipeline"):
        pipeline.save_pretrained(tmp_path / "foreign")
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis.tex is not empty"):
        pipeline.save_pretrained(tmp_path / "foreign" / "thesis.tex")


def test_a_save_that_fails_leaves_the_old_pipeline_and_nothing_else(
    pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "prior" / "config.json").read_bytes()
    pipeline.prior.config.fingerprint = object()  # type: ignore[assignment]  # JSON cannot hold it
    with pytest.raises(TypeError):
        pipeline.save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved" / "prior" / "config.json").read_bytes() == before


def test_a_folder_without_a_pipeline_says_what_it_holds(tokenizer_run: Path, prior_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no saved pipeline.*config.json"):
        ImageGenerationPipeline.from_pretrained(tokenizer_run)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds a gpt, not a tokenizer"):
        ImageGenerationPipeline.from_parts(prior_run, tokenizer_run)


def test_labels_are_numbers_names_lists_or_tensors(pipeline: ImageGenerationPipeline) -> None:
    by_number = sample(pipeline, 2, labels=1, seed=0)
    assert torch.equal(sample(pipeline, 2, labels="dog", seed=0), by_number)
    assert torch.equal(sample(pipeline, 2, labels=["dog", 1], seed=0), by_number)
    assert torch.equal(sample(pipeline, 2, labels=("1", "dog"), seed=0), by_number)
    assert torch.equal(sample(pipeline, 2, labels=torch.tensor([1, 1]), seed=0), by_number)
    assert torch.equal(sample(pipeline, 2, labels=torch.tensor(1), seed=0), by_number)
    output = pipeline(2, labels=["dog", "cat"], seed=3)
    assert (output.labels, output.seed, output.codes.shape) == ([1, 0], 3, (2, 4, 4))
    assert pipeline(1, seed=0).labels is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"expected one label or num_images=3 of them, got 2"),
        ([], r"expected one label or num_images=3 of them, got 0"),
        (torch.tensor([0, 1, 0, 1]), r"num_images=3 of them, got 4"),
        ("dgo", r"unknown class 'dgo'; did you mean 'dog'\?"),
        (2, r"classes are numbered 0 to 1, got 2"),
        (-1, r"classes are numbered 0 to 1, got -1"),
        ([0, 1, 7], r"classes are numbered 0 to 1, got 7"),
    ],
)
def test_wrong_labels_are_named(pipeline: ImageGenerationPipeline, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(3, labels=labels)


def test_labels_are_refused_by_a_prior_without_classes(tiny_tokenizer: ImageTokenizer) -> None:
    prior = prior_of(tiny_tokenizer.code_layout, tiny_tokenizer.fingerprint)
    with pytest.raises(ValueError, match="trained without classes"):
        ImageGenerationPipeline(tiny_tokenizer, prior)(1, labels=0)


def test_a_prior_without_label_dropout_needs_labels(tiny_tokenizer: ImageTokenizer) -> None:
    model = {"name": "gpt", "width": 16, "num_layers": 1, "num_heads": 2, "label_dropout": 0}
    classes = {"num_classes": 2, "class_names": ["cat", "dog"]}
    prior = build_prior(model, tiny_tokenizer.code_layout, fingerprint=tiny_tokenizer.fingerprint, **classes)
    pipeline = ImageGenerationPipeline(tiny_tokenizer, prior)
    with pytest.raises(ValueError, match=r"give labels, one of cat, dog"):
        pipeline(1)
    assert pipeline(1, labels="cat", seed=0).labels == [0]


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.9}])
def test_an_image_is_the_same_for_any_batch_size(pipeline: ImageGenerationPipeline, options: dict[str, Any]) -> None:
    labels = [0, 1, 0, 1, 1, 0, 0]
    alone = pipeline(7, labels=labels, seed=0, batch_size=1, output_type="tensor", **options)
    for batch_size in (3, 7, 64):
        together = pipeline(7, labels=labels, seed=0, batch_size=batch_size, output_type="tensor", **options)
        assert torch.equal(together.codes, alone.codes)
        torch.testing.assert_close(together.images, alone.images, rtol=0, atol=1e-5)
    few = pipeline(2, labels=labels[:2], seed=0, **options)
    assert torch.equal(few.codes, alone.codes[:2])


def test_different_seeds_share_no_image(pipeline: ImageGenerationPipeline) -> None:
    codes = torch.cat([pipeline(16, seed=seed).codes for seed in range(8)])
    assert len(codes.flatten(1).unique(dim=0)) == 8 * 16


def test_without_a_seed_one_is_drawn_and_told(pipeline: ImageGenerationPipeline) -> None:
    first, second = pipeline(4), pipeline(4)
    assert first.seed != second.seed
    assert torch.equal(pipeline(4, seed=first.seed).codes, first.codes)


def test_pictures_equal_the_tensor(pipeline: ImageGenerationPipeline) -> None:
    pictures = pipeline(3, labels=1, seed=0).images
    images = sample(pipeline, 3, labels=1, seed=0)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    for picture, image in zip(pictures, images, strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert torch.equal(pixels, ((image + 1) * 127.5).round().to(torch.uint8))


def test_options_out_of_range_or_unknown_are_refused(pipeline: ImageGenerationPipeline) -> None:
    for options, message in (
        ({"num_images": 0}, "num_images should be an integer of at least 1, got 0"),
        ({"num_images": -1, "labels": 0}, "num_images should be an integer of at least 1, got -1"),
        ({"batch_size": 0}, "batch_size should be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size should be an integer of at least 1, got 1.5"),
        ({"seed": 1.5}, "seed should be an integer of 64 bits, got 1.5"),
        ({"seed": 2**63}, "seed should be an integer of 64 bits, got 9223372036854775808"),
        ({"output_type": "numpy"}, "output_type should be pil or tensor, got 'numpy'"),
        ({"top_k": 0}, "top_k should be integer at least 1"),
        ({"guidance_scale": 2.0}, "needs labels"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**options)
    with pytest.raises(TypeError, match="num_steps"):
        pipeline(1, num_steps=3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(16, 16), (7, 31), (100, 40)])
def test_pictures_of_any_size_and_mode_are_encoded(
    pipeline: ImageGenerationPipeline, mode: str, size: tuple[int, int]
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(values).convert(mode)
    codes = pipeline.encode([picture, picture])
    assert codes.shape == (2, 4, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes[0], codes[1])
    (reconstruction,) = pipeline.reconstruct(picture)
    assert (reconstruction.size, reconstruction.mode) == ((16, 16), "RGB")


def test_reconstructing_is_encoding_and_decoding(pipeline: ImageGenerationPipeline) -> None:
    pictures = to_pil(torch.rand(3, 3, 16, 16) * 2 - 1)
    images = pipeline.tokenizer.decode(pipeline.encode(pictures))
    with torch.no_grad():
        expected = pipeline.tokenizer(pipeline.preprocess(pictures)).reconstruction.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    for mine, theirs in zip(pipeline.reconstruct(pictures), pipeline.decode(pipeline.encode(pictures)), strict=True):
        assert mine.tobytes() == theirs.tobytes()
    with pytest.raises(ValueError, match="at least one image"):
        pipeline.encode([])


def test_another_layout_is_refused(tiny_tokenizer: ImageTokenizer) -> None:
    prior = prior_of(CodeLayout.single((8, 8), 16), tiny_tokenizer.fingerprint)
    with pytest.raises(ValueError, match=r"\[8x8 of 16\].*\[4x4 of 16\]"):
        ImageGenerationPipeline(tiny_tokenizer, prior)


def test_a_prior_of_one_grid_of_several_is_refused() -> None:
    tokenizer = make_pipeline("several grids").tokenizer
    prior = tiny_prior("pixelcnn", tokenizer.code_layout, grid=2)
    prior.config.fingerprint = tokenizer.fingerprint
    with pytest.raises(
        ValueError, match=r"the prior models \[4x4 of 16\] alone, of \[1x1 .*\]; a pipeline needs a prior"
    ):
        ImageGenerationPipeline(tokenizer, prior)


def test_a_tokenizer_with_the_same_layout_and_another_fingerprint_is_refused(
    tiny_tokenizer: ImageTokenizer, prior_run: Path
) -> None:
    with pytest.raises(ValueError, match=r"codes of another tokenizer.*4x4 of 16.*fingerprints"):
        ImageGenerationPipeline(tiny_tokenizer, Prior.from_pretrained(prior_run))


def test_a_pipeline_in_bfloat16_samples_encodes_and_is_saved(
    pipeline: ImageGenerationPipeline, tokenizer_run: Path, prior_run: Path, tmp_path: Path
) -> None:
    assert pipeline.to(dtype=torch.bfloat16) is pipeline
    images = sample(pipeline, 2, labels=1, seed=0)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    picture = to_pil(images)[0]
    assert pipeline.reconstruct(picture)[0].size == (16, 16)
    loaded = ImageGenerationPipeline.from_parts(tokenizer_run, prior_run, dtype=torch.bfloat16)
    assert torch.equal(sample(loaded, 2, labels=1, seed=0), images)
    pipeline.save_pretrained(tmp_path / "saved")
    again = ImageGenerationPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(sample(again, 2, labels=1, seed=0), images)


def test_pushing_to_the_hub_uploads_what_saving_writes(
    pipeline: ImageGenerationPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    uploaded: dict[str, bytes] = {}

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> SimpleNamespace:
            assert (repo_id, private, exist_ok) == ("pictures", True, True)
            return SimpleNamespace(repo_id="someone/pictures")

        def upload_folder(self, *, repo_id: str, folder_path: str) -> SimpleNamespace:
            assert repo_id == "someone/pictures"
            uploaded.update(files(Path(folder_path)))
            return SimpleNamespace(commit_url="https://hub/someone/pictures/commit/1")

    monkeypatch.setattr(pipelines.pipeline_base, "HfApi", Hub)
    assert pipeline.push_to_hub("pictures", private=True, token="secret") == "https://hub/someone/pictures/commit/1"
    assert uploaded == files(tmp_path / "saved")
    assert json.loads(uploaded["pipeline.json"]) == {"pipeline": "ImageGenerationPipeline", "format": 1}
