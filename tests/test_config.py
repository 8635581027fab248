"""From YAML and key=value to a checked schema: what is refused, what is dropped, and what --help says."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

import configs.evaluation
import configs.generation
import configs.schema
from configs.evaluation import EvaluationConfig
from configs.generation import GenerationConfig
from configs.layout import CodeLayout
from configs.loading import config_from_arguments, help_text, load_config, options_of, read_yaml, write_yaml
from configs.pretrained import StrictConfig
from configs.schema import (
    EncodingConfig,
    ImagePreprocessing,
    PriorTrainingConfig,
    RunConfig,
    TokenizerTrainingConfig,
)
from configs.validation import Schema, field_docs
from prior import PRIOR_CONFIGS, PRIORS, build_prior
from tokenizer import TOKENIZER_CONFIGS, TOKENIZERS, build_tokenizer
from tokenizer.discriminator import DISCRIMINATORS
from tokenizer.objective import TokenizerObjective
from tokenizer.quantizers import QUANTIZERS

CONFIGS = Path(configs.schema.__file__).parent
SCHEMAS = [
    value
    for value in (vars(configs.schema) | vars(configs.generation) | vars(configs.evaluation)).values()
    if inspect.isclass(value) and issubclass(value, Schema) and value is not Schema
]
TOKENIZER_CHOICES = {"model": TOKENIZER_CONFIGS, "quantizer": QUANTIZERS}
PRIOR_CHOICES = {"model": PRIOR_CONFIGS}
BLOCK_CLASSES = {
    **{f"quantizer {name}": cls for name, cls in QUANTIZERS.items()},
    **{f"tokenizer {name}": cls for name, cls in TOKENIZER_CONFIGS.items()},
    **{f"prior {name}": cls for name, cls in PRIOR_CONFIGS.items()},
}


def tokenizer_config(*overrides: str, file: Path | None = None) -> TokenizerTrainingConfig:
    return load_config(TokenizerTrainingConfig, file, overrides)


@pytest.fixture
def preset(tmp_path):
    """Writes a preset and gives its file."""

    def write(text: str) -> Path:
        file = tmp_path / "preset.yaml"
        file.write_text(text)
        return file

    return write


# What is refused


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("learning_rat=0.1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("data.image_sise=32", "unknown key 'data.image_sise'; did you mean 'data.image_size'?"),
        ("objective.reconstruct=l1", "unknown key 'objective.reconstruct'; did you mean 'objective.reconstruction'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override, hint, preset):
    with pytest.raises(ValueError, match="choose one of") as raised:
        tokenizer_config(override)
    assert str(raised.value).startswith(hint)
    key, _, value = override.partition("=")
    outer, _, inner = key.partition(".")
    file = preset(f"{outer}: {{{inner}: {value}}}" if inner else f"{key}: {value}")
    with pytest.raises(ValueError, match="choose one of") as from_file:
        tokenizer_config(file=file)
    assert str(from_file.value) == str(raised.value)


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones_without_a_guess():
    with pytest.raises(ValueError, match=r"unknown key 'zzz'; choose one of .*batch_size.*weight_decay"):
        tokenizer_config("zzz=1")


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("model.chanels", lambda: build_tokenizer({"name": "vqvae", "chanels": 8}, {"name": "ema"})),
        ("quantizer.vocabsize", lambda: build_tokenizer({"name": "vqvae"}, {"name": "ema", "vocabsize": 8})),
        ("model.widht", lambda: build_prior({"name": "gpt", "widht": 8}, CodeLayout.single((2, 2), 4))),
    ],
)
def test_an_unknown_option_of_a_block_is_refused_with_the_nearest_known_one(kind, build):
    with pytest.raises(ValueError, match=f"unknown option of .* '{kind}'; did you mean '{kind.partition('.')[0]}\\."):
        build()


@pytest.mark.parametrize(
    ("block", "build"),
    [
        ("model 'vqve'; did you mean 'vqvae'", lambda: build_tokenizer({"name": "vqve"}, {"name": "ema"})),
        ("quantizer 'emma'; did you mean 'ema'", lambda: build_tokenizer({"name": "vqvae"}, {"name": "emma"})),
        ("model 'gtp'; did you mean 'gpt'", lambda: build_prior({"name": "gtp"}, CodeLayout.single((2, 2), 4))),
    ],
)
def test_an_unknown_name_of_a_block_is_refused_with_the_nearest_known_one(block, build):
    with pytest.raises(ValueError, match=f"unknown {block}.*choose one of"):
        build()


@pytest.mark.parametrize(
    "override",
    [
        "steps=many",
        "steps=1.5",
        "steps=true",
        "batch_size=null",
        "batch_size=[1,2]",
        "learning_rate=fast",
        "learning_rate=true",
        "betas=0.9",
        "betas=[0.9,x]",
        "schedule=linear",
        "dry_run=1",
        "dry_run=maybe",
        "mixed_precision=yes",
        "output_dir=true",
        "output_dir=[a]",
        "model=vqvae",
        "quantizer=",
        "data=digits",
        "data.image_size=large",
        "data.image_size=[32,x]",
        "data.flip=2",
    ],
)
def test_a_wrong_type_is_refused_and_the_message_names_the_key(override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{key}(\[\d\])? should be .*, got "):
        tokenizer_config(override)


@pytest.mark.parametrize(
    "override",
    [
        "steps=0",
        "steps=-5",
        "epochs=0",
        "epochs=-1",
        "batch_size=0",
        "batch_size=.inf",
        "learning_rate=0",
        "learning_rate=10",
        "learning_rate=.nan",
        "warmup_steps=-1",
        "betas=[0.9,1.5]",
        "betas=[0.9,1]",
        "betas=[0.9]",
        "betas=[0.9,0.99,0.999]",
        "weight_decay=-0.1",
        "weight_decay=.inf",
        "weight_decay=.nan",
        "epochs=.inf",
        "max_grad_norm=-1",
        "weight_ema=1",
        "seed=-1",
        "seed=4294967296",
        "log_every=0",
        "keep_checkpoints=0",
        "accumulation_steps=0",
        "data.image_size=0",
        "data.image_size=[32,-32]",
        "data.image_size=1000000",
        "data.num_workers=-1",
        "data.cache_mib=-1",
        "data.validation=1.5",
        "data.validation=-0.1",
        "data.validation=2",
    ],
)
def test_a_number_out_of_range_is_refused_and_the_message_names_the_key(override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{key}(\[\d\])? should be .*, got "):
        tokenizer_config(override)


@pytest.mark.parametrize(
    "override", ["steps", "--steps=3", "--steps", "-x", "data.dataset=[", "data.dataset=${nothing}"]
)
def test_an_argument_that_cannot_be_read_is_a_value_error_that_shows_it(override):
    with pytest.raises(ValueError, match=r"expected key=value|cannot read") as raised:
        tokenizer_config(override)
    assert override in str(raised.value)


@pytest.mark.parametrize(("text", "says"), [("a: [", "not valid YAML"), ("- a", "should hold keys and values")])
def test_a_file_that_is_no_mapping_is_a_value_error_that_names_it(text, says, preset):
    file = preset(text)
    with pytest.raises(ValueError, match=says) as raised:
        tokenizer_config(file=file)
    assert str(file) in str(raised.value)


def test_a_missing_file_is_a_value_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config file .*gone\.yaml"):
        tokenizer_config(file=tmp_path / "gone.yaml")


def test_a_key_without_a_default_is_asked_for():
    with pytest.raises(ValueError, match="please give tokenizer="):
        load_config(EncodingConfig)


@pytest.mark.parametrize(
    ("schema", "overrides", "says"),
    [
        (RunConfig, ["batch_size=10", "accumulation_steps=4"], "batch_size=10 does not divide"),
        (TokenizerTrainingConfig, ["train_only=decoder"], "give init_from="),
        (TokenizerTrainingConfig, ["model.name=3"], "model needs a name"),
        (PriorTrainingConfig, ["model.name="], "model needs a name"),
        (GenerationConfig, [], "give pipeline=DIR, or tokenizer=DIR and prior=DIR"),
        (GenerationConfig, ["tokenizer=a"], "give pipeline=DIR, or tokenizer=DIR and prior=DIR"),
        (GenerationConfig, ["pipeline=a", "prior=b"], "got pipeline and prior"),
        (EvaluationConfig, [], "give tokenizer=DIR, prior=DIR or both"),
    ],
)
def test_values_that_do_not_go_together_are_refused(schema, overrides, says):
    with pytest.raises(ValueError, match=says):
        load_config(schema, None, overrides)


# What an override does to a preset


def test_a_new_name_drops_the_presets_other_options_of_that_block_alone(preset):
    file = preset("model: {name: vqvae, channels: 8}\nquantizer: {name: ema, vocab_size: 16, decay: 0.9}\nsteps: 5")
    config = tokenizer_config("quantizer.name=vq", file=file)
    assert config.quantizer == {"name": "vq"}
    assert config.model == {"name": "vqvae", "channels": 8}
    assert config.steps == 5


def test_a_new_name_keeps_the_options_given_beside_it(preset):
    file = preset("quantizer: {name: ema, vocab_size: 16, decay: 0.9}")
    config = tokenizer_config("quantizer.vocab_size=32", "quantizer.name=vq", file=file)
    assert config.quantizer == {"vocab_size": 32, "name": "vq"}


def test_the_same_name_keeps_the_presets_options(preset):
    file = preset("quantizer: {name: ema, vocab_size: 16, decay: 0.9}")
    config = tokenizer_config("quantizer.name=ema", "quantizer.decay=0.5", file=file)
    assert config.quantizer == {"name": "ema", "vocab_size": 16, "decay": 0.5}


def test_an_option_alone_keeps_the_name_of_the_preset_or_the_default(preset):
    assert tokenizer_config("quantizer.vocab_size=8").quantizer == {"name": "ema", "vocab_size": 8}
    assert tokenizer_config(file=preset("quantizer: {vocab_size: 8}")).quantizer == {"name": "ema", "vocab_size": 8}


def test_an_override_of_one_key_of_a_nested_schema_keeps_the_others(preset):
    config = tokenizer_config("data.flip=true", file=preset("data: {dataset: somewhere, image_size: 64}"))
    assert (config.data.dataset, config.data.image_size, config.data.flip) == ("somewhere", 64, True)


@pytest.mark.parametrize(("kept", "dropped"), [("epochs", "steps"), ("steps", "epochs")])
def test_steps_and_epochs_replace_each_other_over_a_preset(kept, dropped, preset):
    config = tokenizer_config(f"{kept}=3", file=preset(f"{dropped}: 7"))
    assert getattr(config, kept) == 3
    assert getattr(config, dropped) is None


def test_steps_and_epochs_together_are_refused_wherever_they_are_given(preset):
    with pytest.raises(ValueError, match="give steps or epochs, got both: steps=3 epochs=2"):
        tokenizer_config("steps=3", "epochs=2")
    with pytest.raises(ValueError, match="give steps or epochs, got both"):
        tokenizer_config(file=preset("steps: 3\nepochs: 2"))


def test_a_preset_is_left_as_it_was(preset):
    file = preset("quantizer: {name: ema, vocab_size: 16}\nsteps: 5")
    before = file.read_text()
    tokenizer_config("quantizer.name=vq", "epochs=1", file=file)
    assert file.read_text() == before


# How values are read


@pytest.mark.parametrize(
    ("text", "value", "size"),
    [("48", 48, (48, 48)), ("[16,24]", [16, 24], (16, 24)), ("[32.0,32]", [32, 32], (32, 32))],
)
def test_image_size_is_one_number_or_height_and_width(text, value, size, preset):
    file = preset(f"data: {{image_size: {text}}}")
    for config in (tokenizer_config(f"data.image_size={text}"), tokenizer_config(file=file)):
        assert config.data.image_size == value
        assert ImagePreprocessing(image_size=config.data.image_size).size == size


def test_image_size_of_three_numbers_is_refused():
    with pytest.raises(ValueError, match=r"one number or \[height, width\], got \[3, 32, 32\]"):
        ImagePreprocessing(image_size=[3, 32, 32])


@pytest.mark.parametrize("text", ["no", "false", "'no'"])
def test_mixed_precision_no_survives_yaml_reading_it_as_false(text, preset):
    assert tokenizer_config(f"mixed_precision={text}").mixed_precision == "no"
    assert tokenizer_config(file=preset(f"mixed_precision: {text}")).mixed_precision == "no"


@pytest.mark.parametrize("channels", [True, "3", 2, None])
def test_a_choice_of_numbers_takes_those_numbers_only(channels):
    with pytest.raises(ValueError, match=r"in_channels should be 1 \| 3, got "):
        ImagePreprocessing(in_channels=channels)


def test_a_choice_of_numbers_gives_the_number_that_was_declared():
    assert type(ImagePreprocessing(in_channels=1.0).in_channels) is int


@pytest.mark.parametrize(
    ("override", "value"), [("0.02", 0.02), ("0", 0), ("test", "test"), ("some/folder", "some/folder"), ("", None)]
)
def test_validation_is_a_share_or_a_name(override, value):
    assert tokenizer_config(f"data.validation={override}").data.validation == value


@pytest.mark.parametrize("value", ["#ff8000", "a=b", "a=#b", "train[:10%]", "~/images", "2024-01-01", "with space"])
def test_a_text_on_the_command_line_is_taken_as_it_is(value):
    assert tokenizer_config(f"data.background={value}").data.background == value


def test_a_whole_number_in_scientific_notation_is_an_integer():
    steps = tokenizer_config("steps=1e3").steps
    assert steps == 1000
    assert type(steps) is int


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "FILE", "steps=3"],
        ["--config=FILE", "steps=3"],
        ["steps=3", "--config", "FILE"],
        ["steps=3", "--config=FILE"],
    ],
)
def test_the_config_file_may_stand_anywhere_among_the_arguments(arguments, preset):
    file = preset("steps: 9\nbatch_size: 7")
    config = config_from_arguments(TokenizerTrainingConfig, [a.replace("FILE", str(file)) for a in arguments])
    assert (config.steps, config.batch_size) == (3, 7)


@pytest.mark.parametrize(
    "arguments",
    [["--config"], ["--config="], ["steps=3", "--config"], ["--config", "a", "--config", "b"], ["--configs", "a"]],
)
def test_no_config_file_or_two_of_them_are_refused(arguments):
    with pytest.raises(ValueError, match=r"--config FILE\.yaml|expected key=value"):
        config_from_arguments(TokenizerTrainingConfig, arguments)


@pytest.mark.parametrize(
    "config",
    [
        TokenizerTrainingConfig(mixed_precision="no", data={"image_size": [16, 24], "background": "#102030"}),
        PriorTrainingConfig(epochs=0.5, validation=0.1, sampling={"temperature": 0.9}),
        EncodingConfig(tokenizer="runs/tokenizer"),
        GenerationConfig(pipeline="runs/pipeline", labels=[1, "cat"]),
        EvaluationConfig(prior="runs/prior"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_configuration_written_as_yaml_reads_back_equal(config, tmp_path):
    write_yaml(tmp_path / "config.yaml", config.to_dict())
    assert load_config(type(config), tmp_path / "config.yaml") == config
    assert load_config(type(config), tmp_path / "config.yaml").to_dict() == config.to_dict()


def test_two_configurations_share_no_mutable_default():
    one, other = TokenizerTrainingConfig(), TokenizerTrainingConfig()
    one.model["channels"], one.betas[0], one.data.flip = 3, 0.0, True
    assert other == TokenizerTrainingConfig()


# What --help says


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_has_a_docstring_underneath(schema):
    assert schema.__doc__
    docs = field_docs(schema)
    for field in dataclasses.fields(schema):
        assert docs.get(field.name, "").endswith("."), f"{schema.__name__}.{field.name}"


def leaves(schema: type[Schema], prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Dotted key -> (default, docstring) of each field of a schema and the schemas inside it."""
    found = {}
    for field in dataclasses.fields(schema):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(default, Schema):
            found |= leaves(type(default), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = (default, field_docs(schema)[field.name])
    return found


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_help_lists_every_key_with_its_default_and_meaning(schema):
    shown = words(help_text(schema))
    for key, (default, meaning) in leaves(schema).items():
        value = "REQUIRED" if default is dataclasses.MISSING else "none" if default is None else default
        assert f" {key}={value} (" in shown
        start = shown.index(f" {key}={value} (")
        # A later key may have the same docstring: this one's stands right behind its type.
        assert 0 < shown.index(words(meaning), start) - start < len(f" {key}={value} ()") + 120


@pytest.mark.parametrize(
    ("schema", "choices"), [(TokenizerTrainingConfig, TOKENIZER_CHOICES), (PriorTrainingConfig, PRIOR_CHOICES)]
)
def test_help_lists_every_name_and_option_of_the_blocks(schema, choices):
    shown = words(help_text(schema, choices))
    for block, classes in choices.items():
        assert f"{block}.name={getattr(schema(), block)['name']} ({' | '.join(classes)})" in shown
        for name, cls in classes.items():
            section = shown.partition(f"with {block}.name={name}:")[2]
            assert section
            for option, (kind, default, meaning) in options_of(cls).items():
                value = "none" if default == "None" else default
                assert f"{block}.{option}={value} ({kind}) {words(meaning)}" in section


@pytest.mark.parametrize("name", BLOCK_CLASSES)
def test_every_option_of_a_block_has_a_type_a_default_and_a_meaning(name):
    for option, (kind, default, meaning) in options_of(BLOCK_CLASSES[name]).items():
        assert kind, option
        assert "<" not in default, f"{option} has no plain default: {default}"
        assert meaning.endswith("."), option


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_keyword_of_a_quantizer_and_of_what_it_inherits_is_a_documented_option(name):
    keywords: set[str] = set()
    for owner in QUANTIZERS[name].__mro__:
        parameters = list(inspect.signature(owner).parameters.values()) if "__init__" in vars(owner) else []
        if "dim" in [p.name for p in parameters]:
            assert parameters[0].name == "dim"
            keywords |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    assert set(options_of(QUANTIZERS[name])) == keywords


@pytest.mark.parametrize("name", [*TOKENIZER_CONFIGS, *PRIOR_CONFIGS])
def test_only_what_the_training_writes_into_a_models_config_has_no_docstring(name):
    cls = {**TOKENIZER_CONFIGS, **PRIOR_CONFIGS}[name]
    shared = next(base for base in cls.__mro__ if base.__base__ is StrictConfig)
    own: dict[str, Any] = {}
    for base in cls.__mro__[: cls.__mro__.index(shared)]:
        own |= inspect.get_annotations(base)
    assert {key for key, hint in own.items() if "ClassVar" not in str(hint)} <= set(options_of(cls)) | {"model_type"}


def test_options_are_read_from_an_args_section_that_others_follow():
    class Documented:
        """What it is.

        Args:
            dim: channels.
            size: how large it is, over
                two lines.
            colour: of it.

        Raises:
            ValueError: for a bad size.
        """

        def __init__(self, dim: int, *, size: int = 3, colour: str | None = None) -> None: ...

    assert options_of(Documented) == {
        "size": ("integer", "3", "how large it is, over two lines."),
        "colour": ("text | none", "None", "of it."),
    }


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_whatever_else_is_given(flag, capsys):
    with pytest.raises(SystemExit) as left:
        config_from_arguments(EncodingConfig, ["nonsense", flag])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == help_text(EncodingConfig).strip()


# The presets


def preset_files(folder: str) -> Any:
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    assert files
    return pytest.mark.parametrize("file", files, ids=lambda file: file.name)


@preset_files("tokenizer")
def test_a_tokenizer_preset_loads_and_builds_its_model_and_its_discriminator(file):
    config = load_config(TokenizerTrainingConfig, file)
    tokenizer = build_tokenizer(config.model, config.quantizer, image_size=config.data.image_size)
    assert type(tokenizer) is TOKENIZERS[config.model["name"]]
    assert type(tokenizer.quantizer) is QUANTIZERS[config.quantizer["name"]]
    assert tokenizer.image_shape[1:] == ImagePreprocessing(image_size=config.data.image_size).size
    # Without LPIPS, whose weights would have to be downloaded.
    objective = dataclasses.replace(config.objective, perceptual_weight=0.0)
    adversary = TokenizerObjective(objective, tokenizer, config.steps).adversary
    assert (adversary is not None) == bool(config.objective.adversarial_weight)
    if adversary is not None:
        assert type(adversary.discriminator) is DISCRIMINATORS[config.objective.discriminator["name"]]


@preset_files("prior")
def test_a_prior_preset_loads_and_builds_its_model(file):
    config = load_config(PriorTrainingConfig, file)
    layout = CodeLayout.single((8, 8), 512)
    prior = build_prior(config.model, layout, num_classes=10)
    assert type(prior) is PRIORS[config.model["name"]]
    assert prior.code_layout == layout


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_preset_says_in_a_comment_what_it_is(file):
    assert file.read_text().startswith("# ")
    assert read_yaml(file)
