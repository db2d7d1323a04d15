"""Tensor2Tensor's programs as processes, and sentences to train on."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import forked

from train_large import runlog

ROOT = Path(__file__).parents[2]
NOUNS = {"cat": "chat", "dog": "chien", "bird": "oiseau", "train": "train", "book": "livre", "tree": "arbre"}
VERBS = {"sees": "voit", "eats": "mange", "takes": "prend", "knows": "connaît", "loves": "aime"}
ADJECTIVES = {"big": "grand", "red": "rouge", "green": "vert", "black": "noir", "quiet": "calme"}


def pairs(number: int) -> list[tuple[str, str]]:
    """Sentences of a small language, translated word by word, adjectives after their nouns."""
    draw = random.Random(1)

    def noun_phrase() -> tuple[str, str]:
        noun, adjective = draw.choice(list(NOUNS)), draw.choice(list(ADJECTIVES))
        return f"the {adjective} {noun}", f"le {NOUNS[noun]} {ADJECTIVES[adjective]}"

    made = set()
    while len(made) < number:
        (subject, sujet), (thing, chose) = noun_phrase(), noun_phrase()
        verb = draw.choice(list(VERBS))
        made.add((f"{subject} {verb} {thing} .", f"{sujet} {VERBS[verb]} {chose} ."))
    return sorted(made)


def environment() -> dict[str, str]:
    quiet = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}


def launch(*arguments: object, status: int = 0) -> str:
    """What a program says, results last."""
    done = forked.run([sys.executable, "-m", *map(str, arguments)], env=environment(), cwd=str(ROOT), timeout=900)
    said = done.stderr + done.stdout
    assert done.returncode == status, said[-3000:]
    return said


def trainer(data: Path, out: Path, hparams: str, *flags: str) -> list[object]:
    return [
        "t2t_problems.launch",
        "trainer",
        "--problem=translate_enfr_pairs",
        f"--data_dir={data}",
        f"--output_dir={out}",
        "--model=transformer_budgeted",
        "--hparams_set=transformer_enfr_2l_128h",
        "--hparams=batch_size=256,learning_rate_warmup_steps=100,learning_rate_constant=0.5," + hparams,
        "--train_steps=100000",
        "--eval_steps=2",
        "--decode_hparams=beam_size=1",
        *flags,
    ]


def make_data(folder: Path) -> Path:
    """What datagen makes of the pairs."""
    (folder / "pairs.tsv").write_text("".join(f"{en}\t{fr}\n" for en, fr in pairs(3000)), encoding="utf-8")
    launch(
        "t2t_problems.launch",
        "datagen",
        "--problem=translate_enfr_pairs",
        f"--tmp_dir={folder}",
        f"--data_dir={folder / 'data'}",
    )
    return folder / "data"


def read(out: Path, kind: str = "") -> list[dict]:
    log = out / runlog.NAME
    return [line for line in runlog.read(str(log)) if kind in ("", line["kind"])] if log.exists() else []
