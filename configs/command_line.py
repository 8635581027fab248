"""What every script does around its verb: read the arguments, and show a user's mistake as a message."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from configs.loading import Choices, config_from_arguments
from configs.validation import Schema

_OURS = Path(__file__).resolve().parent.parent


def _raised_by_a_check(error: BaseException) -> bool:
    """Whether one of our own lines raised it, rather than a library below us: then the message says it all."""
    frames = traceback.extract_tb(error.__traceback__)
    innermost = Path(frames[-1].filename) if frames else _OURS
    return innermost.is_absolute() and innermost.is_relative_to(_OURS) and "site-packages" not in innermost.parts


@contextmanager
def mistakes_as_messages() -> Iterator[None]:
    """Show a user's mistake as a message.

    A ValueError from our own checks is printed without a traceback (all of it with TESSERA_TRACEBACK=1), and the exit
    code is 2. Ctrl-C and SIGTERM leave with 130.
    """
    # transformers draws a bar for every file of weights, which would tear ours.
    transformers.logging.disable_progress_bar()
    try:
        yield
    except ValueError as error:
        if not _raised_by_a_check(error) or os.environ.get("TESSERA_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(error if error.args else "interrupted", file=sys.stderr)
        sys.exit(130)


def run(verb: Callable[[Any], Any], schema: type[Schema], choices: Choices | None = None) -> None:
    """Run a script: arguments to a checked configuration to its verb."""
    with mistakes_as_messages():
        verb(config_from_arguments(schema, sys.argv[1:], choices))
