"""A folder that several processes write together, and that appears when all of them are done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipelines.run_folder import whole_folder


@contextmanager
def shared_folder(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder, the same on all processes, that becomes `folder` when the main process leaves the block.

    An error of any process removes it. The launcher ends the others, which may be waiting.
    """
    with ExitStack() as stack:
        partial = [stack.enter_context(whole_folder(folder)) if accelerator.is_main_process else folder]
        (shared,) = broadcast_object_list(partial)
        try:
            yield shared
        except BaseException:
            _discard(shared)
            raise
    accelerator.wait_for_everyone()


def _discard(folder: Path) -> None:
    """Remove a folder that other processes may write to: once it has another name, they find it no more."""
    gone = Path(tempfile.mkdtemp(prefix=f"{folder.name}.discarded-", dir=folder.parent))
    with suppress(FileNotFoundError):  # another process was first
        os.replace(folder, gone)
    shutil.rmtree(gone)
