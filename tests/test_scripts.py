"""What a user sees of a script: the keys that --help lists, and one line for a mistake.

Most tests run the script's file in this process, which costs no imports; the last ones start a process of their own.
"""

from __future__ import annotations

import dataclasses
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.command_line import run
from configs.generation import GenerationConfig
from configs.schema import EncodingConfig
from configs.validation import Schema, field_docs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def schema_of(script: Path) -> type[Schema] | None:
    """The schema that a script reads its arguments into; None for one without."""
    names = runpy.run_path(str(script), run_name="imported").values()
    return next((name for name in names if inspect.isclass(name) and issubclass(name, Schema)), None)


def each(scripts: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", scripts, ids=lambda path: path.name)


WITH_SCHEMA = [script for script in SCRIPTS if schema_of(script)]
WITH_KEYS = [script for script in SCRIPTS if "key=value" in script.read_text() or schema_of(script)]


def call(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script's file as `python script arguments` would, in this process; gives its exit code."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as left:
        return left.code or 0
    return 0


def start(arguments: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with `folder` as the working directory."""
    settings = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=settings | environment, capture_output=True, text=True, timeout=120)


@each(SCRIPTS)
def test_help_exits_with_0(script, monkeypatch, capsys):
    assert call(script, ["--help"], monkeypatch) == 0
    assert capsys.readouterr().out


@each(WITH_KEYS)
def test_help_says_that_keys_are_given_as_key_value(script, monkeypatch, capsys):
    call(script, ["--help"], monkeypatch)
    assert "key=value" in capsys.readouterr().out


@each(WITH_SCHEMA)
def test_help_lists_every_key_and_what_it_means(script, monkeypatch, capsys):
    call(script, ["--help"], monkeypatch)
    shown = " ".join(capsys.readouterr().out.split())
    schema = schema_of(script)
    assert schema is not None
    for field in dataclasses.fields(schema):
        assert f" {field.name}=" in shown or f" {field.name}." in shown
        assert f" {field.name}=" not in shown or field_docs(schema)[field.name] in shown


@each(WITH_KEYS)
def test_an_unknown_key_exits_with_2_and_one_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(script, ["no_such_key=3"], monkeypatch) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: unknown key 'no_such_key'")
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


@each(WITH_SCHEMA)
def test_a_script_is_about_twenty_lines_that_hand_its_schema_to_its_verb(script):
    names = runpy.run_path(str(script), run_name="imported")
    assert names["run"] is run
    assert len(script.read_text().splitlines()) <= 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["batch_size=0"], "error: batch_size should be integer at least 1, got 0"),
        (["tokenizer=DIR", "--config"], "error: expected --config FILE.yaml"),
        (["--config", "no/such.yaml"], "error: there is no config file no/such.yaml"),
        ([], "error: please give tokenizer="),
    ],
)
def test_a_mistake_is_shown_as_a_message_without_a_traceback(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as left:
        run(lambda config: None, EncodingConfig)
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(says)
    assert "Traceback" not in shown


def test_the_verb_gets_the_checked_configuration(monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["script", "pipeline=here", "seed=7"])
    run(given.append, GenerationConfig)
    assert given == [GenerationConfig(pipeline="here", seed=7)]


def test_a_mistake_keeps_its_traceback_where_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("TESSERA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["script", "no_such_key=3"])
    with pytest.raises(ValueError, match="unknown key"):
        run(lambda config: None, EncodingConfig)


def test_an_error_of_a_library_below_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "tokenizer=DIR"])
    with pytest.raises(ValueError, match="empty parameter list"):
        run(lambda config: torch.optim.AdamW([]), EncodingConfig)


def test_ctrl_c_leaves_with_130(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script", "tokenizer=DIR"])
    with pytest.raises(SystemExit) as left:
        run(interrupted, EncodingConfig)
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_script_runs_from_any_folder_and_prints_its_help(tmp_path):
    done = start([ROOT / "scripts" / "train_tokenizer.py", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for key in (
        "steps=none",
        "model.name=vqvae",
        "quantizer.name=ema",
        "quantizer.vocab_size=512",
        "data.image_size=32",
    ):
        assert f"  {key}  (" in done.stdout


def test_an_unknown_key_in_a_process_of_its_own_exits_with_2_and_one_line(tmp_path):
    done = start([ROOT / "scripts" / "train_prior.py", "stepz=3"], tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unknown key 'stepz'; did you mean 'steps'?")
