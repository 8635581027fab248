"""The silent traps of transformers' PreTrainedModel (design.md, section 4), closed for both base classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantizer_cases import VARIANTS, tiny_block
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.layout import CodeLayout
from prior import Prior
from prior.gpt import GPT, GPTConfig
from tokenizer import ImageTokenizer
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.codebook import CodebookQuantizer
from tokenizer.vqvae import VQVAE, VQVAEConfig

Model = ImageTokenizer | Prior


def tokenizer_config(**options: object) -> VQVAEConfig:
    tiny = {"channels": 8, "residual_channels": 4, "latent_dim": 4, "norm": "batch", "image_size": [16, 24]}
    return VQVAEConfig(**{**tiny, "quantizer": {"name": "ema", "vocab_size": 16}, **options})


def prior_config(**options: object) -> GPTConfig:
    layout = CodeLayout.single((2, 3), 5).to_list()
    return GPTConfig(**{"width": 8, "num_layers": 2, "num_heads": 2, "layout": layout, "num_classes": 3, **options})


KINDS = {"tokenizer": (ImageTokenizer, VQVAE, tokenizer_config), "prior": (Prior, GPT, prior_config)}
OTHER = {"tokenizer": "prior", "prior": "tokenizer"}
A_TENSOR = {"tokenizer": "quantizer.codebook", "prior": "head.weight"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: str) -> Model:
    """A tiny model whose every tensor, buffers too, has values that no constructor draws."""
    _, cls, config = KINDS[kind]
    model = cls(config())
    for tensor in model.state_dict().values():
        if tensor.dtype == torch.bool:
            tensor.copy_(torch.rand(tensor.shape) < 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 3)
        else:
            tensor.fill_(7)
    return model


def load(kind: str, folder: Path) -> Model:
    return KINDS[kind][0].from_pretrained(folder)


def assert_equal_tensors(model: Model, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(folder: Path, *, drop: str = "", add: dict[str, Tensor] | None = None) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name != drop}
    save_file(tensors | (add or {}), file, metadata={"format": "pt"})


def test_post_init_redraws_no_weight(kind):
    _, cls, config = KINDS[kind]

    class WithoutPostInit(cls):
        def post_init(self) -> None:
            pass

    torch.manual_seed(1)
    expected = dict(WithoutPostInit(config()).state_dict())
    torch.manual_seed(1)
    model = cls(config())
    assert_equal_tensors(model, expected)
    model.init_weights()
    assert_equal_tensors(model, expected)


def test_every_buffer_is_persistent(kind):
    model = build(kind)
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())


def test_every_tensor_is_equal_after_save_and_load(kind, tmp_path: Path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = load(kind, tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.config.options() == model.config.options()
    assert_equal_tensors(loaded, dict(model.state_dict()))


def test_a_model_in_a_subfolder_loads(kind, tmp_path: Path):
    model = build(kind)
    model.save_pretrained(tmp_path / "part")
    loaded = KINDS[kind][0].from_pretrained(tmp_path, subfolder="part")
    assert_equal_tensors(loaded, dict(model.state_dict()))


def test_a_model_saved_in_shards_loads(kind, tmp_path: Path):
    model = build(kind)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal_tensors(load(kind, tmp_path), dict(model.state_dict()))


def test_a_model_but_its_quantizer_loads_as_the_dtype_asked_for(kind, tmp_path: Path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = KINDS[kind][0].from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {
        k: v.bfloat16() if v.is_floating_point() and not k.startswith("quantizer.") else v
        for k, v in model.state_dict().items()
    }
    assert_equal_tensors(loaded, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_quantizer_keeps_float32_and_every_code_whatever_dtype_it_is_loaded_as(name, dtype, tmp_path: Path):
    model = VQVAE(tokenizer_config(quantizer=tiny_block(VARIANTS[name]))).eval()
    model.quantizer.anneal(0.25)
    model.quantizer.train()(torch.randn(2, 4, 4, 6))
    model.quantizer.eval().update(0)  # counters that no constructor gives
    model.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == next(loaded.encoder.parameters()).dtype == dtype
    torch.testing.assert_close(
        dict(loaded.quantizer.state_dict()), dict(model.quantizer.state_dict()), rtol=0, atol=0, check_stride=False
    )
    latents = torch.randn(2, 4, 4, 6)
    output, expected = loaded.quantizer(latents), model.quantizer(latents)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.quantized, expected.quantized)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert loaded(images).reconstruction.dtype == dtype
    assert loaded.decode(expected.codes).dtype == dtype


@pytest.mark.parametrize("start", ["kmeans", "normal", "uniform"])
@pytest.mark.parametrize("name", [name for name, cls in QUANTIZERS.items() if issubclass(cls, CodebookQuantizer)])
def test_loaded_codebooks_are_not_redrawn(name, start, tmp_path: Path):
    model = VQVAE(tokenizer_config(quantizer={"name": name, "vocab_size": 16, "codebook_start": start}))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    codes = torch.arange(16).view(1, 4, 4)
    assert torch.equal(loaded.quantizer.decode(codes), model.quantizer.decode(codes))


def test_a_missing_tensor_is_named(kind, tmp_path: Path):
    build(kind).save_pretrained(tmp_path)
    edit_weights(tmp_path, drop=A_TENSOR[kind])
    with pytest.raises(ValueError, match=f"do not fit .*: missing: {A_TENSOR[kind]}"):
        load(kind, tmp_path)


def test_an_unexpected_tensor_is_named(kind, tmp_path: Path):
    build(kind).save_pretrained(tmp_path)
    edit_weights(tmp_path, add={"surplus.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"do not fit .*: unexpected: surplus.weight"):
        load(kind, tmp_path)


def test_a_tensor_of_another_shape_is_named(kind, tmp_path: Path):
    build(kind).save_pretrained(tmp_path)
    edit_weights(tmp_path, add={A_TENSOR[kind]: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=f"do not fit .*: of another shape: .*{A_TENSOR[kind]}"):
        load(kind, tmp_path)


def test_an_unknown_config_key_is_refused_with_the_nearest_known_one(kind, tmp_path: Path):
    wrong, meant = {"tokenizer": ("chanels", "channels"), "prior": ("num_layer", "num_layers")}[kind]
    with pytest.raises(ValueError, match=f"unknown key of .* '{wrong}'; did you mean '{meant}'"):
        KINDS[kind][2](**{wrong: 4})
    build(kind).save_pretrained(tmp_path)
    edit_config(tmp_path, **{wrong: 4})
    with pytest.raises(ValueError, match=f"unknown key of .* '{wrong}'; did you mean '{meant}'"):
        load(kind, tmp_path)


def test_a_config_value_of_the_wrong_type_is_refused(kind, tmp_path: Path):
    key = {"tokenizer": "channels", "prior": "num_layers"}[kind]
    build(kind).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: "many"})
    with pytest.raises(ValueError, match=f"{key} should be integer.*, got 'many'"):
        load(kind, tmp_path)


def test_a_folder_of_the_other_kind_is_refused_by_name(kind, tmp_path: Path):
    build(OTHER[kind]).save_pretrained(tmp_path)
    saved = {"tokenizer": "vqvae", "prior": "gpt"}[OTHER[kind]]
    for cls in KINDS[kind][:2]:
        with pytest.raises(ValueError, match=f"holds a {saved}, not a {kind}; expected one of"):
            cls.from_pretrained(tmp_path)


def test_a_folder_without_config_is_refused_with_what_it_holds(kind, tmp_path: Path):
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=f"holds no saved {kind} .config.json is missing; found: picture.png"):
        load(kind, tmp_path)


def test_a_folder_with_a_config_but_no_weights_is_refused(kind, tmp_path: Path):
    build(kind).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a config.json but no weights"):
        load(kind, tmp_path)


def test_a_missing_folder_is_refused(kind, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        load(kind, tmp_path / "nowhere")


def test_a_truncated_file_of_weights_is_named(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"the weights in .* are damaged"):
        KINDS[kind][0].from_pretrained(tmp_path)
