"""Score a translated file by every measure, with the standard error of the paper's: one JSON file.

Runs in Tensor2Tensor's environment: python score.py TRANSLATION REFERENCE OUT.json
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
from importlib.metadata import distributions, version
from pathlib import Path

from t2t_problems import bleu

RESAMPLES = 200


def main() -> None:
    translation, reference, out = map(Path, sys.argv[1:])
    translations, references = bleu.read_pair(translation, reference)
    scores = bleu.scores(translations, references)._asdict()
    scores["paper_error"] = standard_error(translations, references)
    scores["sentences"] = len(references)
    scores["python"] = platform.python_version()
    scores["tensor2tensor"] = version("tensor2tensor")
    # tensorflow-cpu and tensorflow are two distributions of the same.
    names = {distribution.metadata["Name"] for distribution in distributions()}
    scores["tensorflow"] = version("tensorflow" if "tensorflow" in names else "tensorflow-cpu")
    aside = out.with_name("." + out.name)
    aside.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    aside.replace(out)


def standard_error(translations: list[str], references: list[str]) -> float:
    """The deviation of the paper's BLEU over test sets drawn again from this one, with replacement (Koehn, 2004)."""
    draw = random.Random(1)
    both = (translations, references)
    sides = [[bleu.split_compounds(bleu.moses_tokens(line, "fr")) for line in side] for side in both]
    resampled = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(len(references)), k=len(references))
        resampled.append(bleu.multi_bleu(*[[side[i] for i in chosen] for side in sides]))
    return statistics.stdev(resampled)


if __name__ == "__main__":
    main()
