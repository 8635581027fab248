"""Benchmarks: `scripts/benchmark.py SECTION` prints a JSON line a case and contestant."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import replace

from configs.validation import did_you_mean
from pipelines.benchmarks import priors, quantizers, tokenizers
from pipelines.benchmarks.harness import OURS, Section, measure

SECTIONS: dict[str, Section] = {
    "quantizers": quantizers.SECTION,
    "tokenizers": tokenizers.SECTION,
    "priors": priors.SECTION,
}

PEERS = {"diffusers": "diffusers", "transformers": "transformers", "vector-quantize-pytorch": "vector_quantize_pytorch"}
"""Libraries to measure against, and what they are imported as."""


def benchmark(section: str, case: str | None = None, against: str | None = None) -> None:
    """Measure a section's cases, or one of them: ours, the reference where there is one, and a peer.

    Raises:
        ValueError: for an unknown section, case or peer, or a peer that is not installed.
    """
    if section not in SECTIONS:
        raise ValueError(did_you_mean(section, SECTIONS, "section"))
    cases = {each.name: each for each in SECTIONS[section].cases(SECTIONS[section].num_images)}
    if case is not None and case not in cases:
        raise ValueError(did_you_mean(case, cases, "case"))
    contestants, versions = [OURS, "reference"], {}
    if against is not None:
        if against not in PEERS:
            raise ValueError(did_you_mean(against, PEERS, "peer"))
        if importlib.util.find_spec(PEERS[against]) is None:
            raise ValueError(f"{against} is not installed; run: {sys.executable} -m pip install {against}")
        if all(against not in each.contestants for each in cases.values()):
            raise ValueError(f"{against} does none of the work of section {section}; choose another peer")
        contestants, versions = [*contestants, against], {against: importlib.metadata.version(against)}
    for each in [cases[case]] if case else cases.values():
        there = [who for who in contestants if who in each.contestants]
        for line in measure(section, SECTIONS[section], replace(each, setting=each.setting | versions), there):
            print(json.dumps(line), flush=True)
