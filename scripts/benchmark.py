"""Measure speed and memory: a JSON line a case and contestant, timed in alternation on this machine."""

import argparse

from configs.command_line import mistakes_as_messages
from pipelines.benchmarks import PEERS, SECTIONS, benchmark

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", help=", ".join(SECTIONS))
    parser.add_argument("--case", metavar="NAME", help="only this one; an unknown name lists all")
    parser.add_argument("--against", metavar="PEER", help=f"measure a library too: {', '.join(PEERS)}")
    arguments = parser.parse_args()
    with mistakes_as_messages():
        benchmark(arguments.section, arguments.case, arguments.against)
