"""What goes wrong is said before any training: what came, what was expected and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, TINY_PRIOR, TINY_QUANTIZER, TINY_RUN
from PIL import Image

from configs.generation import GenerationConfig
from configs.loading import load_config
from configs.schema import EncodingConfig, PriorTrainingConfig, TokenizerTrainingConfig
from pipelines import encode_dataset, train_prior, train_tokenizer
from pipelines.devices import explain_out_of_memory
from pipelines.generation import generate
from prior import PRIORS
from tokenizer import TOKENIZERS
from tokenizer.quantizers import QUANTIZERS


def refusal(call: Callable[[], object]) -> str:
    """The message of the ValueError that the call ends in."""
    with pytest.raises(ValueError, match=r".") as error:
        call()
    return str(error.value)


@pytest.fixture
def tokenizer_refusal(tmp_path, image_folder) -> Callable[..., str]:
    """The message with which the training of a tokenizer refuses overrides, having written nothing."""

    def call(*overrides: str) -> str:
        output = tmp_path / "run"
        given = [
            *TINY_MODEL,
            *TINY_QUANTIZER,
            *TINY_RUN,
            "steps=4",
            "data.image_size=16",
            f"data.dataset={image_folder}",
        ]
        given = [*given, f"output_dir={output}", *overrides]
        message = refusal(lambda: train_tokenizer(load_config(TokenizerTrainingConfig, None, given)))
        assert not output.exists()
        return message

    return call


@pytest.fixture
def prior_refusal(tmp_path, code_folder) -> Callable[..., str]:
    """The message with which the training of a prior refuses overrides, having written nothing."""

    def call(*overrides: str) -> str:
        output = tmp_path / "run"
        given = [*TINY_PRIOR, *TINY_RUN, "steps=4", f"codes={code_folder}", f"output_dir={output}", *overrides]
        message = refusal(lambda: train_prior(load_config(PriorTrainingConfig, None, given)))
        assert not output.exists()
        return message

    return call


@pytest.fixture
def generation_refusal(tmp_path, tokenizer_run, prior_run) -> Callable[..., str]:
    """The message with which the sampling of two images refuses overrides, having written nothing."""

    def call(*overrides: str) -> str:
        output = tmp_path / "samples"
        given = [f"tokenizer={tokenizer_run}", f"prior={prior_run}", "num_images=2", f"output_dir={output}", *overrides]
        message = refusal(lambda: generate(load_config(GenerationConfig, None, given)))
        assert not output.exists()
        return message

    return call


@pytest.fixture(scope="module")
def second_tokenizer(tmp_path_factory, image_folder) -> Path:
    """A tokenizer with the layout of `tokenizer_run`, trained with another seed."""
    output = tmp_path_factory.mktemp("second") / "tokenizer"
    given = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "steps=1", "seed=1", "data.image_size=16"]
    given = [*given, f"data.dataset={image_folder}", f"output_dir={output}"]
    return train_tokenizer(load_config(TokenizerTrainingConfig, None, given))


def trained_prior(folder: Path, code_folder: Path, *overrides: str) -> Path:
    given = [*TINY_PRIOR, *TINY_RUN, "steps=1", f"codes={code_folder}", f"output_dir={folder}", *overrides]
    return train_prior(load_config(PriorTrainingConfig, None, given))


@pytest.fixture(scope="module")
def prior_without_classes(tmp_path_factory, code_folder) -> Path:
    return trained_prior(tmp_path_factory.mktemp("priors") / "prior", code_folder, "class_conditional=false")


@pytest.fixture(scope="module")
def prior_without_label_dropout(tmp_path_factory, code_folder) -> Path:
    return trained_prior(tmp_path_factory.mktemp("priors") / "prior", code_folder, "model.label_dropout=0")


def test_an_unknown_tokenizer_lists_the_known_ones(tokenizer_refusal):
    message = tokenizer_refusal("model.name=vqvea")
    assert "unknown model 'vqvea'; did you mean 'vqvae'?" in message
    assert f"choose one of {', '.join(sorted(TOKENIZERS))}" in message


def test_an_unknown_quantizer_lists_the_known_ones(tokenizer_refusal):
    message = tokenizer_refusal("quantizer.name=emma")
    assert "unknown quantizer 'emma'; did you mean 'ema'?" in message
    assert f"choose one of {', '.join(sorted(QUANTIZERS))}" in message


def test_an_unknown_prior_lists_the_known_ones(prior_refusal):
    message = prior_refusal("model.name=gtp")
    assert "unknown model 'gtp'; did you mean 'gpt'?" in message
    assert f"choose one of {', '.join(sorted(PRIORS))}" in message


@pytest.mark.parametrize("block", ["model", "quantizer"])
def test_an_option_that_a_block_does_not_have_is_named_with_the_nearest_one(tokenizer_refusal, block):
    wrong, right = {"model": ("latent_dims", "latent_dim"), "quantizer": ("vocabsize", "vocab_size")}[block]
    assert f"'{block}.{wrong}'; did you mean '{block}.{right}'?" in tokenizer_refusal(f"{block}.{wrong}=8")


@pytest.mark.parametrize(("size", "shown", "advice"), [("18", "18x18", "16x16"), ("[16,30]", "16x30", "16x32")])
def test_an_image_size_that_does_not_divide_is_refused_with_one_that_does(tokenizer_refusal, size, shown, advice):
    message = tokenizer_refusal(f"data.image_size={size}", "model.downsampling_factor=4")
    assert f"images of {shown} pixels do not divide into patches of 4x4" in message
    assert message.endswith(f"try {advice}")


def test_an_image_size_below_the_downsampling_factor_is_refused_with_one_that_does(tokenizer_refusal):
    message = tokenizer_refusal("data.image_size=4", "model.downsampling_factor=8")
    assert "images of 4x4 pixels do not divide into patches of 8x8" in message
    assert message.endswith("try 8x8")


def test_an_image_size_of_three_numbers_is_refused(tokenizer_refusal):
    assert "one number or [height, width], got [3, 16, 16]" in tokenizer_refusal("data.image_size=[3,16,16]")


def test_a_missing_dataset_is_named(tokenizer_refusal, tmp_path):
    message = tokenizer_refusal(f"data.dataset={tmp_path / 'nowhere'}")
    assert message == f"there is no image data at {tmp_path / 'nowhere'}: no such file or folder"


def test_a_missing_split_is_named_with_the_existing_ones(tokenizer_refusal, prior_refusal):
    for message in (tokenizer_refusal("data.split=trian"), prior_refusal("split=trian")):
        assert "unknown split 'trian'; did you mean 'train'? choose one of test, train" in message


def test_an_unknown_background_colour_is_named(tokenizer_refusal):
    assert "whitish" in tokenizer_refusal("data.background=whitish")


def test_codes_where_images_belong_are_refused(tokenizer_refusal, code_folder):
    message = tokenizer_refusal(f"data.dataset={code_folder}")
    assert f"{code_folder} holds codes, where images were expected; give it to train_prior.py" in message


def test_a_tokenizer_where_codes_belong_is_refused(prior_refusal, tokenizer_run):
    message = prior_refusal(f"codes={tokenizer_run}")
    assert f"{tokenizer_run} holds no codes (codes.json is missing; found: " in message
    assert "make some with scripts/encode_dataset.py" in message


def test_a_prior_where_a_tokenizer_belongs_is_refused(prior_run, image_folder, tmp_path):
    given = [f"tokenizer={prior_run}", f"data.dataset={image_folder}", f"output_dir={tmp_path / 'codes'}"]
    message = refusal(lambda: encode_dataset(load_config(EncodingConfig, None, given)))
    assert f"{prior_run} holds a gpt, not a tokenizer; expected one of {', '.join(sorted(TOKENIZERS))}" in message
    assert not (tmp_path / "codes").exists()


def test_a_tokenizer_where_a_prior_belongs_is_refused(generation_refusal, tokenizer_run):
    message = generation_refusal(f"prior={tokenizer_run}")
    assert f"{tokenizer_run} holds a vqvae, not a prior; expected one of {', '.join(sorted(PRIORS))}" in message


def test_a_model_that_is_not_there_is_refused_by_its_path(generation_refusal, tmp_path):
    assert f"there is no folder {tmp_path / 'nowhere'}" in generation_refusal(f"tokenizer={tmp_path / 'nowhere'}")


def test_a_run_that_has_not_finished_is_no_model_yet(generation_refusal, prior_run, tmp_path):
    shutil.copytree(prior_run, tmp_path / "prior")
    (tmp_path / "prior" / "config.json").unlink()
    message = generation_refusal(f"prior={tmp_path / 'prior'}")
    assert "holds no saved prior (config.json is missing; found: " in message
    assert message.endswith("its training has not finished")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("cta", "unknown class 'cta'; did you mean 'cat'? choose one of cat, dog"),
        ("zebra", "unknown class 'zebra'; choose one of cat, dog"),
        ("2", "the classes are numbered 0 to 1, got 2"),
        ("-1", "the classes are numbered 0 to 1, got -1"),
        ("[cat,cow]", "unknown class 'cow'; choose one of cat, dog"),
        ("[cat,dog,cat]", "expected one label or num_images=2 of them, got 3"),
        ("[]", "expected one label or num_images=2 of them, got 0"),
    ],
)
def test_a_class_that_the_prior_does_not_have_is_refused_with_those_it_has(generation_refusal, label, expected):
    assert expected in generation_refusal(f"labels={label}")


@pytest.mark.parametrize("labels", ["cat", "0", "each"])
def test_labels_for_a_prior_without_classes_are_refused(generation_refusal, prior_without_classes, labels):
    message = generation_refusal(f"prior={prior_without_classes}", f"labels={labels}")
    assert "without classes" in message or "needs a prior with classes" in message
    assert labels in message


def test_a_tokenizer_that_did_not_make_the_priors_codes_is_refused(generation_refusal, second_tokenizer):
    message = generation_refusal(f"tokenizer={second_tokenizer}")
    assert "the prior was trained on codes of another tokenizer" in message
    assert "both have [4x4 of 16], but the fingerprints are" in message


def test_pictures_from_a_tokenizer_that_did_not_make_the_codes_are_refused(
    prior_refusal, second_tokenizer, code_folder
):
    message = prior_refusal(f"tokenizer={second_tokenizer}")
    assert f"the tokenizer in {second_tokenizer} is not the one that made {code_folder}" in message
    assert "give tokenizer=DIR of the right one" in message


def test_a_tokenizer_of_another_layout_is_refused_with_both_layouts(generation_refusal, image_folder, tmp_path):
    given = [*TINY_MODEL, *TINY_QUANTIZER, *TINY_RUN, "steps=1", "data.image_size=8", f"data.dataset={image_folder}"]
    given = [*given, f"output_dir={tmp_path / 'small'}"]
    small = train_tokenizer(load_config(TokenizerTrainingConfig, None, given))
    message = generation_refusal(f"tokenizer={small}")
    assert "the prior has codes laid out as [4x4 of 16], but the tokenizer has [2x2 of 16]" in message
    assert "use a matching pair" in message


def test_a_folder_that_holds_something_else_is_refused_by_every_verb(
    tmp_path, image_folder, tokenizer_run, code_folder, prior_run
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    output = f"output_dir={tmp_path / 'run'}"
    tiny = [*TINY_RUN, "steps=4", output]
    images, models = f"data.dataset={image_folder}", [f"tokenizer={tokenizer_run}", f"prior={prior_run}"]
    calls = {
        train_tokenizer: (TokenizerTrainingConfig, [*TINY_MODEL, *TINY_QUANTIZER, *tiny, images, "data.image_size=16"]),
        encode_dataset: (EncodingConfig, [models[0], images, output]),
        train_prior: (PriorTrainingConfig, [*TINY_PRIOR, *tiny, f"codes={code_folder}"]),
        generate: (GenerationConfig, [*models, output]),
    }
    for verb, (schema, given) in calls.items():
        config = load_config(schema, None, given)
        message = refusal(partial(verb, config))
        assert str(tmp_path / "run") in message
        assert "choose another output_dir" in message
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_of_another_stage_is_refused(prior_run, image_folder):
    given = [*TINY_MODEL, *TINY_RUN, "steps=4", f"data.dataset={image_folder}", f"output_dir={prior_run}"]
    message = refusal(lambda: train_tokenizer(load_config(TokenizerTrainingConfig, None, given)))
    assert message == f"{prior_run} holds a run of another stage; choose another output_dir"


def test_guidance_of_a_prior_without_label_dropout_is_refused(
    generation_refusal, prior_refusal, prior_without_label_dropout
):
    message = prior_refusal("sampling.guidance_scale=2", "model.label_dropout=0")
    assert message.startswith(
        "the pictures cannot be drawn with sampling={'guidance_scale': 2}: guidance_scale=2.0 needs a"
    )
    message = generation_refusal(f"prior={prior_without_label_dropout}", "labels=cat", "guidance_scale=2")
    assert "guidance_scale=2.0 needs a prior trained with label dropout" in message
    assert "model.label_dropout=0" in message


def test_sampling_without_a_class_from_a_prior_without_label_dropout_is_refused(
    generation_refusal, prior_without_label_dropout
):
    message = generation_refusal(f"prior={prior_without_label_dropout}")
    assert "samples within a class only; give labels, one of cat, dog" in message


def test_guidance_without_labels_is_refused(generation_refusal):
    message = generation_refusal("guidance_scale=2")
    assert "guidance_scale=2.0 needs labels to guide towards; give labels, or leave it at 1" in message


def test_an_unknown_sampling_option_is_refused_before_training(prior_refusal):
    message = prior_refusal("sampling.temprature=0.9")
    assert "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?" in message


def test_a_batch_that_does_not_divide_into_accumulation_steps_is_refused(tokenizer_refusal, prior_refusal):
    for refused in (tokenizer_refusal, prior_refusal):
        message = refused("batch_size=10", "accumulation_steps=4")
        assert message == "batch_size=10 does not divide into accumulation_steps=4 equal parts; choose a multiple"


def test_labels_outside_the_classes_are_refused_before_training(tokenizer_refusal, tmp_path):
    picture = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    rows = datasets.Dataset.from_dict({"image": [picture, picture], "label": [0, -1]})
    rows.cast_column("label", datasets.ClassLabel(names=["a", "b"])).save_to_disk(tmp_path / "set")
    assert "row 1 has label -1, outside the 2 classes" in tokenizer_refusal(f"data.dataset={tmp_path / 'set'}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore details"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_says_what_to_change(error):
    def run() -> None:
        with explain_out_of_memory("lower batch_size=64"):
            raise error

    message = refusal(run)
    assert message.startswith("out of memory (")
    assert message.endswith("; lower batch_size=64")
    assert "\n" not in message


def test_a_real_allocation_that_fails_is_explained():
    def run() -> None:
        with explain_out_of_memory("lower batch_size=64"):
            torch.empty(2**60, dtype=torch.uint8)

    assert refusal(run).endswith("; lower batch_size=64")


def test_other_errors_pass_through_unchanged():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised, explain_out_of_memory("lower batch_size=64"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("option", ["top_k=0", "top_k=abc", "temperature=-1", "top_p=2"])
def test_sampling_options_out_of_range_are_refused_before_training(prior_refusal, option):
    name, _, value = option.partition("=")
    message = prior_refusal(f"sampling.{option}")
    assert "the pictures cannot be drawn" in message
    assert name in message
    assert value in message
