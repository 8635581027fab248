"""Digits through all four verbs into runs/quickstart; scripts/quickstart.sh does the set-up first."""

import argparse
import os
import time
from pathlib import Path

from configs.command_line import mistakes_as_messages
from pipelines.quickstart import print_table, quickstart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="start over instead of picking up finished stages")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both trainings, such as steps=2")
    arguments = parser.parse_args()
    started_at = float(os.environ.get("QUICKSTART_STARTED_AT", time.time()))
    with mistakes_as_messages():
        figures = quickstart(
            arguments.output_dir, fresh=arguments.fresh, started_at=started_at, overrides=tuple(arguments.overrides)
        )
        print_table(figures, arguments.output_dir)


if __name__ == "__main__":
    main()
