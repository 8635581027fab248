"""Variations of an image, the best of several images, and images larger than a prior was trained on."""

from __future__ import annotations

import pytest
import torch
from pipeline_cases import TOKENIZERS, make_pipeline, picture
from prior_cases import tiny_prior
from torch import Tensor, nn

from configs.layout import CodeLayout
from pipelines.larger_grids import check_grid
from prior import Prior


@pytest.mark.parametrize("prior", ["gpt", "maskgit"])
@pytest.mark.parametrize("quantizer", TOKENIZERS)
def test_a_variation_of_no_strength_is_the_reconstruction_and_of_full_strength_a_new_image(quantizer, prior):
    pipeline, image = make_pipeline(quantizer, prior), picture()
    none = pipeline.variations(image, 0, num_images=2, labels=["cat", "dog"], seed=0)
    before = pipeline.encode(image)
    assert torch.equal(none.codes, before.expand_as(none.codes))
    assert none.images[1].tobytes() == pipeline.reconstruct(image)[0].tobytes()
    full = pipeline.variations(image, 1, num_images=2, labels=["cat", "dog"], seed=0)
    assert torch.equal(full.codes, pipeline(2, labels=["cat", "dog"], seed=0).codes)
    assert full.labels == [0, 1]


@pytest.mark.parametrize("prior", ["gpt", "maskgit"])
def test_a_variation_draws_its_share_of_the_positions_anew_and_every_one_others(prior):
    pipeline, image = make_pipeline("depth", prior), picture()
    before = pipeline.encode(image)
    changed = pipeline.variations(image, 0.25, num_images=32, seed=0).codes != before
    positions = changed.any(-1).flatten(1)
    assert positions.sum(1).max() == 4
    assert positions.sum(1).float().mean() > 3
    assert positions.any(0).all()
    more = (pipeline.variations(image, 0.75, num_images=32, seed=0).codes != before).any(-1).flatten(1)
    assert more.sum(1).max() == 12


def test_variations_do_not_depend_on_the_batch_size():
    pipeline, image = make_pipeline(), picture(40, 30)
    whole = pipeline.variations(image, 0.5, num_images=5, seed=0).codes
    assert torch.equal(pipeline.variations(image, 0.5, num_images=5, seed=0, batch_size=2).codes, whole)
    assert torch.equal(pipeline.variations(image, 0.5, num_images=2, seed=0).codes, whole[:2])
    assert not torch.equal(pipeline.variations(image, 0.5, num_images=5, seed=1).codes, whole)


def test_variations_of_several_classes_do_not_depend_on_the_batch_size():
    pipeline, image, labels = make_pipeline(), picture(), [0, 1, 1, 0, 1]
    options = {"num_images": 5, "seed": 0, "guidance_scale": 3.0}
    whole = pipeline.variations(image, 0.9, labels=labels, **options).codes
    assert torch.equal(pipeline.variations(image, 0.9, labels=labels, **options, batch_size=2).codes, whole)
    assert not torch.equal(pipeline.variations(image, 0.9, labels=[0, 1, 0, 1, 0], **options).codes, whole)


@pytest.mark.parametrize(("prior", "options"), [("gpt", {}), ("maskgit", {"steps": 1}), ("pixelcnn", {})])
def test_where_a_variation_draws_says_nothing_about_what_it_draws(monkeypatch, prior, options):
    pipeline, kept, sample, n = make_pipeline(prior=prior), [], Prior.sample, 128
    for parameter in pipeline.prior.parameters():
        nn.init.zeros_(parameter)  # every code is equally likely
    monkeypatch.setattr(Prior, "sample", lambda *a, **given: kept.append(given["known_mask"]) or sample(*a, **given))
    codes = pipeline.variations(picture(), 0.25, num_images=n, batch_size=n, seed=0, **options).codes
    drawn = codes[~kept[0]]
    assert len(drawn) == n * 4
    # The standard deviation of a uniform number below 16 is 4.6.
    assert abs(drawn.float().mean() - 7.5) < 5 * 4.6 / len(drawn) ** 0.5


def test_a_strength_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"strength should be from 0 to 1, got 1.5"):
        make_pipeline().variations(picture(), 1.5)


class Classifier(nn.Module):
    """Two classes by a linear function of the pixels; it remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 2)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("prior", ["gpt", "maskgit", "pixelcnn"])
def test_the_best_of_several_images_is_the_one_that_the_classifier_finds_likeliest(prior):
    pipeline, classifier, labels = make_pipeline(prior=prior), Classifier(), torch.tensor([0, 1, 1, 0, 1])
    options = {"labels": labels, "seed": 0, "output_type": "tensor"}
    best = pipeline(5, **options, best_of=6, classifier=classifier)
    candidates = torch.stack(classifier.seen)
    assert candidates.shape == (6, 5, 3, 16, 16)
    assert len(candidates.flatten(2).flatten(0, 1).unique(dim=0)) == 30
    with torch.no_grad():
        p = classifier.layer(candidates.flatten(2)).softmax(-1)[:, torch.arange(5), labels]  # (6, 5)
    assert len(p.argmax(0).unique()) > 1
    expected = candidates[p.argmax(0), torch.arange(5)]
    assert torch.equal(best.images, expected)
    torch.testing.assert_close(pipeline.tokenizer.decode(best.codes), best.images, rtol=0, atol=1e-5)


def test_the_first_candidate_is_the_image_without_a_choice_and_wins_a_tie():
    pipeline, labels = make_pipeline(), [0, 1, 0]
    chosen = pipeline(3, labels=labels, seed=4, best_of=3, classifier=lambda images: torch.zeros(len(images), 2))
    assert torch.equal(chosen.codes, pipeline(3, labels=labels, seed=4).codes)


def test_the_best_of_several_does_not_depend_on_the_batch_size():
    pipeline, classifier = make_pipeline(), Classifier()
    options = {"labels": [0, 1, 1, 0, 1], "seed": 0, "best_of": 3, "classifier": classifier}
    whole = pipeline(5, **options).codes
    assert torch.equal(pipeline(5, **options, batch_size=2).codes, whole)


def test_a_choice_without_a_classifier_or_labels_and_a_classifier_without_a_choice_are_refused():
    pipeline, classifier = make_pipeline(), Classifier()
    for options in (
        {"best_of": 2, "labels": 0},
        {"best_of": 2, "classifier": classifier},
        {"labels": 0, "classifier": classifier},
    ):
        best_of = options.get("best_of", 1)
        with pytest.raises(ValueError, match=rf"best_of={best_of} chooses by what a classifier thinks of the class"):
            pipeline(2, **options)
    with pytest.raises(ValueError, match="best_of should be an integer of at least 1, got 0"):
        pipeline(2, best_of=0)


@pytest.mark.parametrize("prior", ["gpt", "maskgit"])
@pytest.mark.parametrize(("quantizer", "depth"), [("one grid", ()), ("depth", (2,))])
@pytest.mark.parametrize("grid", [[4, 4], [4, 9], [6, 5], [8, 8]], ids=str)
def test_a_larger_grid_gives_larger_images(grid, quantizer, depth, prior):
    pipeline = make_pipeline(quantizer, prior)
    output = pipeline(2, labels=[0, 1], grid=grid, seed=0, output_type="tensor", guidance_scale=1.5)
    assert output.codes.shape == (2, *grid, *depth)
    assert output.images.shape == (2, 3, 4 * grid[0], 4 * grid[1])
    alone = pipeline(2, labels=[0, 1], grid=grid, seed=0, guidance_scale=1.5, batch_size=1)
    assert torch.equal(alone.codes, output.codes)
    assert not torch.equal(pipeline(2, labels=[0, 1], grid=grid, seed=1).codes, output.codes)


@pytest.mark.parametrize(
    ("prior", "options"),
    [
        ("gpt", {"temperature": 0.0}),
        ("maskgit", {"temperature": 0.0, "choice_temperature": 0.0, "steps": 3}),
        ("pixelcnn", {"temperature": 0.0}),
    ],
)
def test_a_window_is_drawn_given_what_earlier_windows_have_drawn(prior, options):
    pipeline = make_pipeline(prior=prior)
    codes = pipeline(1, labels="dog", grid=[6, 7], seed=0, **options).codes
    filled = torch.zeros_like(codes, dtype=torch.bool)
    # Windows of 4x4 move by 2, and the last of each axis stands at the edge.
    for top in (0, 2):
        for left in (0, 2, 3):
            here = (slice(None), slice(top, top + 4), slice(left, left + 4))
            given = {"known": codes[here] * filled[here], "known_mask": filled[here].clone()}
            window = pipeline.prior.sample(1, torch.tensor([1]), **given, **options)
            assert torch.equal(window, codes[here])
            filled[here] = True
    assert filled.all()


@pytest.mark.parametrize("prior", ["gpt", "maskgit", "pixelcnn"])
def test_the_first_window_of_a_larger_image_is_the_image_of_the_trained_size(prior):
    pipeline, options = make_pipeline(prior=prior), {"labels": [0, 1], "seed": 0}
    codes = pipeline(2, grid=[4, 6], **options).codes
    assert torch.equal(codes[:, :, :4], pipeline(2, **options).codes)


def test_every_window_of_every_larger_image_has_random_numbers_of_its_own(monkeypatch):
    pipeline, seen, sample = make_pipeline(), [], Prior.sample
    monkeypatch.setattr(Prior, "sample", lambda *args, **given: seen.append(given["seeds"]) or sample(*args, **given))
    pipeline(3, labels=0, grid=[6, 8], seed=0, best_of=3, classifier=lambda images: torch.zeros(len(images), 2))
    assert len(seen) == 2 * 3 * 3
    assert len(torch.cat(seen).unique()) == 2 * 3 * 3 * 3


@pytest.mark.parametrize("grid", [[3, 8], [8, 3], [8], [4, 4, 4], [4.0, 8], []], ids=str)
def test_a_grid_that_is_smaller_or_no_grid_is_refused(grid):
    message = r"grid should be \[rows, columns\], at least \[4, 4\], got "
    with pytest.raises(ValueError, match=message):
        make_pipeline()(1, grid=grid)


def test_a_larger_grid_needs_a_prior_of_one_grid_of_two_axes():
    with pytest.raises(ValueError, match=r"grid=\[8, 8\] needs one 2-D grid of codes .* has \[1x1 of 16 \+ 2x2"):
        make_pipeline("several grids")(1, grid=[8, 8])
    with pytest.raises(ValueError, match=r"grid=\[8, 8\] needs one 2-D grid of codes .* has \[9 of 4\]"):
        check_grid(tiny_prior("gpt", CodeLayout.single((9,), 4)), [8, 8])


def test_the_best_of_several_larger_images_is_one_of_them():
    pipeline = make_pipeline()
    seen: list[Tensor] = []

    def classifier(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], dim=1)

    options = {"labels": [0, 1], "grid": [4, 6], "seed": 0, "output_type": "tensor"}
    best = pipeline(2, **options, best_of=3, classifier=classifier).images
    means = torch.stack(seen).mean((2, 3, 4))
    expected = torch.stack([means[:, 0].max(), means[:, 1].min()])
    torch.testing.assert_close(best.mean((1, 2, 3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (torch.zeros(2, 1), r"\(2, 1\)"),
        (torch.zeros(2), r"\(2,\)"),
        (torch.zeros(1, 2), r"\(1, 2\)"),
        ([[0, 0], [0, 0]], "list"),
    ],
)
def test_a_classifier_that_returns_something_else_is_refused(returned, came):
    message = rf"the classifier should return logits, a tensor \(2, 2\), got {came}"
    with pytest.raises(ValueError, match=message):
        make_pipeline()(2, labels=0, best_of=2, classifier=lambda images: returned)


def test_only_one_picture_is_varied_and_at_least_once():
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match=r"expected one picture \(PIL.Image.Image\), got list"):
        pipeline.variations([picture()] * 4, 0.5)
    with pytest.raises(ValueError, match="num_images should be an integer of at least 1, got 0"):
        pipeline.variations(picture(), 0.5, num_images=0)
