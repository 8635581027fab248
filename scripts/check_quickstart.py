"""Check that a quickstart's metrics.json clears the bars of quality; its time is not checked."""

import argparse
import json
import sys
from pathlib import Path

from pipelines.quickstart import missed_bars

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, help="a quickstart's metrics.json")
    file = parser.parse_args().metrics
    missed = missed_bars(json.loads(file.read_text()))
    print("\n".join(missed) or f"{file} clears every bar of quality")
    sys.exit(bool(missed))
