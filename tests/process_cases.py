"""Scripts in several processes of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch(
    root: Path, script: str | Path, overrides: list[str], count: int = 2, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run one of our scripts, or another by its absolute path, in CPU processes under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return subprocess.run(
        [*launcher, str(root / "scripts" / script), *overrides],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def processes(root: Path, script: str | Path, overrides: list[str], count: int = 2, timeout: int = 300) -> str:
    """Run a script in several CPU processes, which must end well; its output."""
    done = launch(root, script, overrides, count, timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
