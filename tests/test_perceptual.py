"""LPIPS against the package lpips with the same weights of VGG16, and what it says where weights cannot be had."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import lpips
import pytest
import torch
from conftest import ADVERSARIAL, TINY_MODEL, TINY_RUN, metrics, weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import VGG16_Weights
from torchvision.models import vgg as torchvision_vgg

from configs.loading import load_config
from configs.objective import ObjectiveConfig
from configs.schema import TokenizerTrainingConfig
from pipelines import train_tokenizer
from tokenizer import ImageTokenizer, build_tokenizer
from tokenizer.objective import TokenizerObjective
from tokenizer.perceptual import LPIPS

URL = VGG16_Weights.IMAGENET1K_V1.url
DOWNLOAD = f"download {URL} and give objective.perceptual_file=PATH; "
ADVICE = DOWNLOAD + "objective.perceptual_weight=0 goes on without"
WITH_A_FILE = DOWNLOAD + "objective.perceptual_weight=0 objective.perceptual_file=null goes on without"


def features_of_vgg16(**_: Any) -> SimpleNamespace:
    """torchvision's VGG16 without its classifier, which LPIPS does not use: 59 MB instead of 528."""
    return SimpleNamespace(features=torchvision_vgg.make_layers(torchvision_vgg.cfgs["D"]))


@pytest.fixture(scope="module", autouse=True)
def _small_vgg16() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.perceptual.vgg16", features_of_vgg16)
        patch.setattr("torchvision.models.vgg16", features_of_vgg16)
        yield


@pytest.fixture(scope="module")
def vgg16() -> nn.Module:
    """Random layers of which even the last tells images apart."""
    torch.manual_seed(0)
    vgg16 = features_of_vgg16().features
    for parameter in vgg16.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.normal_(parameter, std=0.1)
    return vgg16


@pytest.fixture(scope="module")
def files(vgg16: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights as .pth, with a tensor of the classifier as torchvision's file has, and as .safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"features.{name}": tensor for name, tensor in vgg16.state_dict().items()}
    torch.save(tensors | {"classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    save_file(tensors, folder / "vgg16.safetensors")
    return {"pth": folder / "vgg16.pth", "safetensors": folder / "vgg16.safetensors"}


@pytest.fixture(scope="module")
def perceptual(files: dict[str, Path]) -> LPIPS:
    return LPIPS(str(files["pth"]))


@pytest.fixture(scope="module")
def reference(vgg16: nn.Module) -> lpips.LPIPS:
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = {name: layer for part in reference.net.children() for name, layer in part.named_children()}
    for name, layer in vgg16.named_children():
        if name in layers:
            layers[name].load_state_dict(layer.state_dict())
    return reference


def pair(channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(2, channels, 32, 48) * 2 - 1, torch.rand(2, channels, 32, 48) * 2 - 1


def test_the_vgg16_of_these_tests_has_the_layers_of_torchvisions():
    with torch.device("meta"):
        assert str(features_of_vgg16().features) == str(torchvision_vgg.vgg16().features)


@torch.no_grad()
def test_it_is_the_distance_of_the_package_lpips_with_the_same_vgg16(perceptual, reference):
    images, others = pair()
    others[1] = images[1] + 0.05 * torch.randn_like(images[1])
    distances, of_each_layer = reference(images, others, retPerLayer=True)
    distances = distances.flatten()
    assert all(distance.mean() > 1e-3 for distance in of_each_layer)
    torch.testing.assert_close(perceptual(images, others), distances.mean(), rtol=1e-5, atol=1e-5)
    for i in range(2):
        torch.testing.assert_close(perceptual(images[i : i + 1], others[i : i + 1]), distances[i], rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_the_package_lpips(perceptual, reference):
    images, others = pair()
    gradients = []
    for distance in (perceptual, reference):
        reconstruction = others.clone().requires_grad_()
        distance(images, reconstruction).mean().backward()
        gradients.append(reconstruction.grad)
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


@torch.no_grad()
def test_pth_and_safetensors_give_the_same(perceptual, files):
    images, others = pair()
    assert torch.equal(LPIPS(str(files["safetensors"]))(images, others), perceptual(images, others))


@torch.no_grad()
def test_grey_images_are_those_that_are_repeated_to_three_channels(perceptual):
    images, others = pair(channels=1)
    repeated = perceptual(images.repeat(1, 3, 1, 1), others.repeat(1, 3, 1, 1))
    torch.testing.assert_close(perceptual(images, others), repeated, rtol=1e-6, atol=0)


@torch.no_grad()
def test_it_is_zero_for_equal_images_positive_for_others_and_symmetric(perceptual):
    images, others = pair()
    assert perceptual(images, images) == 0
    assert perceptual(images, others) > 1e-4
    torch.testing.assert_close(perceptual(images, others), perceptual(others, images), rtol=1e-5, atol=0)
    farther = perceptual(images, (images + 0.4 * (others - images)).clamp(-1, 1))
    nearer = perceptual(images, (images + 0.1 * (others - images)).clamp(-1, 1))
    assert 0 < nearer < farther


def test_only_images_get_a_gradient_and_following_it_brings_them_nearer(perceptual):
    images, others = pair()
    others.requires_grad_()
    before = perceptual(images, others)
    before.backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in perceptual.parameters())
    assert (others.grad.flatten(1).abs().amax(1) > 0).all()
    with torch.no_grad():
        assert perceptual(images, others - 1e-3 * others.grad.sign()) < before


def test_flat_images_have_a_finite_gradient(perceptual):
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    perceptual(torch.zeros(1, 3, 32, 32), flat).backward()
    assert flat.grad.isfinite().all()


@torch.no_grad()
def test_training_mode_does_not_matter(perceptual):
    images, others = pair()
    expected = perceptual(images, others)
    assert torch.equal(perceptual.train()(images, others), expected)
    assert torch.equal(perceptual.eval()(images, others), expected)


@torch.no_grad()
def test_images_are_not_changed(perceptual):
    images, others = pair()
    before = images.clone(), others.clone()
    perceptual(images, others)
    assert torch.equal(images, before[0])
    assert torch.equal(others, before[1])


def message_of(file: Path | str | None) -> str:
    with pytest.raises(ValueError, match="goes on without") as error:
        LPIPS(None if file is None else str(file))
    return str(error.value)


def test_a_missing_file_is_refused_with_what_to_download_and_where_to_put_it(tmp_path):
    file = tmp_path / "vgg16.pth"
    assert message_of(file) == f"there is no file objective.perceptual_file={file}; {WITH_A_FILE}"
    assert message_of(tmp_path) == f"there is no file objective.perceptual_file={tmp_path}; {WITH_A_FILE}"


@pytest.mark.parametrize("contents", [b"", b"<html>404</html>", b"\x80\x02cos\nsystem\n."], ids=str)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_that_cannot_be_read_is_refused_with_what_to_download_and_where_to_put_it(ending, contents, tmp_path):
    file = tmp_path / f"vgg16.{ending}"
    file.write_bytes(contents)
    message = message_of(file)
    assert message.startswith(f"objective.perceptual_file={file} cannot be read (")
    assert message.endswith(WITH_A_FILE)


def test_half_a_file_is_refused_with_what_to_download_and_where_to_put_it(files, tmp_path):
    for ending, whole in files.items():
        file = tmp_path / f"half.{ending}"
        file.write_bytes(whole.read_bytes()[:1_000_000])
        assert message_of(file).endswith(WITH_A_FILE)


def test_what_an_unreadable_file_advises_to_go_on_is_a_configuration_that_loads(tmp_path):
    file = f"objective.perceptual_file={tmp_path / 'none'}"
    off = re.findall(r"objective\.\w+=\w+", WITH_A_FILE.rpartition("; ")[2])
    assert len(off) == 2
    config = load_config(TokenizerTrainingConfig, None, ["steps=1", "objective.perceptual_weight=1", file, *off])
    assert not config.objective.perceptual_weight
    with pytest.raises(ValueError, match=r"give that as well, or objective\.perceptual_file=null"):
        load_config(TokenizerTrainingConfig, None, ["steps=1", file])


OTHERS = {
    "another network": {"conv1.weight": torch.zeros(3)},
    "layers of other shapes": {f"features.{i}.weight": torch.zeros(1) for i in range(26)},
    "some of the layers": {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)},
    "a checkpoint around the weights": {"epoch": 3, "state_dict": {}},
    "numbered tensors": {0: torch.zeros(3)},
    "a list of tensors": [torch.zeros(3)],
    "a tensor": torch.zeros(3),
}


@pytest.mark.parametrize("contents", OTHERS.values(), ids=OTHERS)
def test_a_file_without_vgg16_is_refused_with_what_to_download_and_where_to_put_it(contents, tmp_path):
    torch.save(contents, tmp_path / "other.pth")
    message = message_of(tmp_path / "other.pth")
    assert message.startswith(f"objective.perceptual_file={tmp_path / 'other.pth'} does not hold torchvision's VGG16")
    assert message.endswith(WITH_A_FILE)


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("invalid hash value"), TimeoutError("timed out")], ids=str
)
def test_a_download_that_fails_is_an_error_with_what_to_download_and_where_to_put_it(error, tmp_path, monkeypatch):
    asked = []

    def fail(url: str, *_: Any, **__: Any) -> None:
        asked.append(url)
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    assert message_of(None) == f"the weights of VGG16 could not be downloaded ({error}); {ADVICE}"
    assert asked == [URL]


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision keeps the weights once it has downloaded them; nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("asked the network"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints" / Path(URL).name


@torch.no_grad()
def test_weights_that_torchvision_has_downloaded_are_taken_from_there(perceptual, files, downloaded):
    downloaded.symlink_to(files["pth"])
    images, others = pair()
    assert torch.equal(LPIPS()(images, others), perceptual(images, others))


@pytest.mark.parametrize("contents", [b"", b"<html>404</html>"], ids=str)
def test_a_broken_download_is_an_error_with_what_to_download_and_where_to_put_it(contents, downloaded):
    downloaded.write_bytes(contents)
    assert message_of(None).endswith(ADVICE)


def test_images_that_are_too_small_are_refused_before_any_weights_are_read(tmp_path):
    tokenizer = build_tokenizer({"name": "vqvae", "channels": 4}, {"name": "ema"}, image_size=[8, 16])
    config = ObjectiveConfig(perceptual_weight=1.0, perceptual_file=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="images of 8x16 pixels are too small for LPIPS: sides should be at least 16"):
        TokenizerObjective(config, tokenizer, 10)


@pytest.mark.parametrize("state", ["missing", "empty", "cut off", "of something else"])
def test_a_package_lpips_that_is_not_whole_is_an_error_that_says_so(files, tmp_path, monkeypatch, state):
    path = tmp_path / "lpips" / "weights" / "v0.1" / "vgg.pth"
    path.parent.mkdir(parents=True)
    torch.save({"some": torch.zeros(1000)}, path)
    if state == "missing":
        path.unlink()
    elif state != "of something else":
        path.write_bytes(path.read_bytes()[: 0 if state == "empty" else -100])
    spec = importlib.machinery.ModuleSpec("lpips", None, origin=str(tmp_path / "lpips" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"the package lpips is not whole: .*vgg.pth cannot be read"):
        LPIPS(str(next(iter(files.values()))))


def test_without_the_package_lpips_it_is_an_error_that_says_how_to_install_it(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = message_of(files["pth"])
    assert "needs the package lpips" in message
    assert "pip install 'tessera-images[perceptual]'" in message


# In a training


@pytest.fixture
def train(files: dict[str, Path], image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train a tiny VQ-VAE for 2 steps on LPIPS alone, without a quantizer's losses, into `tmp_path / name`."""
    given = [*TINY_MODEL, "quantizer.name=fsq", "quantizer.levels=[4,4]", "quantizer.entropy_weight=0", *TINY_RUN]
    given += ["steps=2", "batch_size=2", "checkpoint_every=1", "data.image_size=16", "data.num_workers=0"]
    given += ["mixed_precision=no", f"data.dataset={image_folder}", f"objective.perceptual_file={files['pth']}"]
    given += ["objective.perceptual_weight=1", "objective.reconstruction_weight=0"]

    def run(*overrides: str, name: str = "run") -> Path:
        arguments = [*given, f"output_dir={tmp_path / name}", *overrides]
        return train_tokenizer(load_config(TokenizerTrainingConfig, None, arguments))

    return run


def test_in_a_training_it_is_logged_by_name_and_moves_encoder_and_decoder(train):
    run = train()
    assert all(line["loss"] == pytest.approx(line["perceptual"]) and line["perceptual"] > 0 for line in metrics(run))
    before = load_file(run / "checkpoints" / "step-00000001" / "model.safetensors")
    moved = {name.split(".")[0] for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}
    assert moved >= {"encoder", "decoder"}


def test_tuning_the_decoder_on_every_term_keeps_codes_and_fingerprint(train):
    start = train("steps=1", name="start")
    every = [*ADVERSARIAL, "objective.adversarial_start=0", "objective.r1_weight=1"]
    every += ["objective.reconstruction_weight=1", f"init_from={start}", "train_only=decoder", "steps=1"]
    tuned = train(*every, name="tuned")
    assert {"reconstruction", "perceptual", "adversarial", "discriminator", "lecam", "r1"} <= metrics(tuned)[0].keys()
    before, after = weights(start), weights(tuned)
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"decoder"}
    first, second = ImageTokenizer.from_pretrained(start), ImageTokenizer.from_pretrained(tuned)
    assert first.fingerprint == second.fingerprint
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(first.encode(images), second.encode(images))
