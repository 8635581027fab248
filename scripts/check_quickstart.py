"""Check that a quickstart's metrics.json clears the bars of quality; its time is not checked."""

import json
import sys
from pathlib import Path

from pipelines.quickstart import missed_bars

if __name__ == "__main__":
    missed = missed_bars(json.loads(Path(sys.argv[1]).read_text()))
    print("\n".join(missed) or f"{sys.argv[1]} clears every bar")
    sys.exit(bool(missed))
