"""Every command and every Python block of the README runs, with two steps where it trains."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from prior import PRIORS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The README's lines that run a script of ours, as words after the launcher."""
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    launchers = ("accelerate launch ", "python ")
    return [shlex.split(line.removeprefix(x)) for line in lines for x in launchers if line.startswith(x)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder that looks like the checkout, with nothing run in it yet, and images of a user's own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(root / name)
    (folder / "path" / "to" / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(100):
        pixels = random.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "path" / "to" / "images" / f"{index}.jpg")
    return folder


def shortened(words: list[str]) -> list[str]:
    """The command with two steps, and a small batch, where it trains."""
    if "scripts/train_tokenizer.py" in words or "scripts/train_prior.py" in words:
        return [*(word for word in words if not word.startswith("steps=")), "steps=2", "batch_size=8"]
    return words


def test_the_readme_names_all_four_verbs() -> None:
    verbs = ("train_tokenizer", "encode_dataset", "train_prior", "generate")
    assert {words[0] for words in commands()} >= {f"scripts/{verb}.py" for verb in verbs}


def test_every_command_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for words in commands():
        script, *arguments = shortened(words)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
    assert len(list((checkout / "runs/digits/samples").glob("[0-9]*.png"))) == 100
    assert (checkout / "runs/digits/samples/grid.png").is_file()
    assert (checkout / "runs/mine/tokenizer/model.safetensors").is_file()


def test_accelerate_launch_runs_a_script(checkout: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "scripts/train_tokenizer.py"]
    done = subprocess.run(
        [*launch, "model.channels=8", "dry_run=true"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout


def test_every_python_block_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    for block in blocks("python"):
        exec(compile(re.sub(r"steps=\d+", "steps=2", block), "README.md", "exec"), {})
    assert (checkout / "runs/python/pipeline/prior/model.safetensors").is_file()
    assert (checkout / "runs/python/seven.png").is_file()


@pytest.mark.parametrize("name", PRIORS)
def test_every_option_of_sampling_stands_in_the_section_on_priors(name: str) -> None:
    section = README.partition("## Priors and sampling\n")[2].partition("\n## ")[0]
    options = PRIORS[name].sampling_options.__dataclass_fields__.keys()
    verbs = (ImageGenerationPipeline.__call__, ImageGenerationPipeline.edit, ImageGenerationPipeline.variations)
    arguments = {argument for verb in verbs for argument in inspect.signature(verb).parameters}
    arguments -= {"self", "images", "image", "masks", "batch_size", "output_type", "sampling"}
    words = {*options, *arguments, "known", "known_mask"}
    assert not sorted(word for word in words if not re.search(rf"\b{word}\b", section))


def test_every_path_in_the_readme_exists(root: Path) -> None:
    packages = "configs|tokenizer|prior|pipelines|scripts|tests"
    mentioned = set(re.findall(rf"\b(?:{packages})/[\w/]+\.(?:py|sh|yaml)\b", README))
    missing = sorted(name for name in mentioned - {"scripts/x.py"} if not (root / name).exists())
    assert not missing
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert all((root / picture).is_file() for picture in pictures), pictures
