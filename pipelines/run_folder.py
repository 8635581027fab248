"""What a run leaves on disk, written whole or not at all: checkpoints with a manifest, the final model, its result."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from configs.loading import load_config, read_yaml, write_yaml
from configs.validation import Schema

MANIFEST = "manifest.json"
RESULT = "result.json"
CONFIG = "config.yaml"
SOURCE = "source.json"
"""Digests of the data that a run is trained on."""

# Keys that a resumed run may change: they do not change what is computed, except for where it ends.
FREE_KEYS = {
    "steps", "epochs", "checkpoint_every", "keep_checkpoints", "tracker", "project", "resume", "output_dir",
    "log_every", "validate_every", "sample_every", "dry_run", "data.num_workers", "data.cache_mib",
}  # fmt: skip


def read_json(file: Path) -> dict[str, Any] | None:
    """The contents of a JSON file, None where there is none."""
    return json.loads(file.read_text()) if file.is_file() else None


def write_json(file: Path, values: Any) -> None:
    """Write JSON so that the file holds either the old or the new contents."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, file)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if folder.is_dir():
            folder.rmdir()  # an empty one may stand there; a full one is an error here
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def seal(partial: Path, folder: Path) -> None:
    """Write the manifest of a finished checkpoint, of folders in it too, and give it its name."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    write_json(partial / MANIFEST, {file.relative_to(partial).as_posix(): _digest(file) for file in files})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there with the size and contents that the manifest says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        return bool(files) and all(_digest(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps whose contents are whole; broken ones are passed over."""
    names = sorted((run / "checkpoints").glob("step-*"), reverse=True) if (run / "checkpoints").is_dir() else []
    return next((checkpoint for checkpoint in names if is_whole(checkpoint)), None)


def discard_checkpoints_after(run: Path, step: int) -> None:
    """Delete checkpoints with more steps than the newest whole one: they are broken, and would outlive whole ones."""
    for broken in (run / "checkpoints").glob("step-*"):
        if broken.name > checkpoint_folder(run, step).name:
            shutil.rmtree(broken)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    for partial in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(partial)


def save_model(save: Callable[[Path], Any], run: Path) -> None:
    """Put a saved model into a run folder: config.json goes first and comes last, so that no half is taken for whole.

    Args:
        save: writes config.json and safetensors into the folder it is given.
    """
    partial = Path(tempfile.mkdtemp(prefix=".model.partial-", dir=run))
    try:
        save(partial)
        (run / "config.json").unlink(missing_ok=True)
        for old in run.glob("*.safetensors*"):
            old.unlink()
        for file in sorted(partial.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, run / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def require_same_run(run: Path, schema: type[Schema], config: dict[str, Any], trained: bool) -> None:
    """Refuse a folder that holds something else, or a run that differs in more than `FREE_KEYS`.

    A key that is younger than the run counts there as its default.

    Args:
        run: the output folder, which may not exist yet.
        schema: what `config` and the folder's own configuration are of.
        config: the new run's configuration.
        trained: whether the folder holds anything worth keeping.

    Raises:
        ValueError: with every differing key and both values.
    """
    if run.is_file():
        raise ValueError(f"{run} is a file; choose another output_dir")
    if not (run / CONFIG).is_file():
        if run.is_dir() and (found := sorted(p.name for p in run.iterdir() if not p.name.startswith("."))):
            raise ValueError(
                f"{run} is no run folder, but holds {', '.join(found[:6])}; choose another output_dir or empty it"
            )
        return
    if not trained:
        return
    recorded = read_yaml(run / CONFIG)
    if ("codes" in recorded) != ("codes" in config):
        raise ValueError(f"{run} holds a run of another stage; choose another output_dir")
    with suppress(ValueError):  # keys that are no more are named below
        recorded = load_config(schema, run / CONFIG).to_dict()
    old, new = flatten(recorded), flatten(config)
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]
    if differing:
        raise ValueError(
            f"{run} holds another run: {'; '.join(differing)}. "
            "Choose another output_dir, or the same values to go on with it"
        )


def require_same_source(run: Path, found: dict[str, str], trained: bool) -> None:
    """Refuse to go on with data that changed under a run.

    Args:
        run: the run folder.
        found: digests of the data as it is now, each under what it is of.
        trained: whether the folder holds anything worth keeping.

    Raises:
        ValueError: with what has changed.
    """
    recorded = read_json(run / SOURCE) or {}
    changed = [what for what, digest in found.items() if recorded.get(what, digest) != digest]
    if trained and changed:
        digests = ", ".join(f"{what} {recorded[what][:12]} there and {found[what][:12]} now" for what in changed)
        raise ValueError(
            f"{run} was trained on other data than there is now: digests are {digests}; bring the data back as it was, "
            "or choose another output_dir"
        )


def lock(run: Path) -> IO[str]:
    """Hold a run folder for this process until the returned file is closed or the process ends, however it ends.

    Raises:
        ValueError: where another process trains in it.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("w")
    try:
        # Unlike flock, this lock is not inherited by loader processes that outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"{run} is being trained by another process; wait for it, or choose another output_dir"
        ) from error
    return file


def write_config(run: Path, config: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    partial = run / f".{CONFIG}.partial"
    write_yaml(partial, config)
    os.replace(partial, run / CONFIG)
