"""`hugging_face_run.py OUT DATA LAYERS HIDDEN BATCH UPDATES [SECONDS RATE WARM_UP]`: Trainer on RobertaPreLayerNorm.

As its user would run it on this CPU: bf16, its default optimizer and collator, blocks of 128 tokens of the same text
(the tokens of DATA/train.bin, which fairseq-preprocess has made, and its vocabulary). OUT as of `fairseq_run.py`. With
SECONDS it stops then and validates on DATA/valid.bin; the learning rate RATE is constant after WARM_UP updates.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LENGTH = 128


class Blocks(torch.utils.data.Dataset):
    def __init__(self, data: Path, split: str) -> None:
        tokens = np.memmap(data / f"{split}.bin", dtype=np.uint16, mode="r")
        self.blocks = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.blocks[index].astype(np.int64))


class Masking:
    """As `DataCollatorForLanguageModeling`, which wants a tokenizer: 15 % of the tokens, 80 % of them masked, 10 %
    replaced."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.mask = vocabulary, vocabulary - 1

    def __call__(self, blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = torch.stack(blocks)
        labels = tokens.clone()
        chosen = torch.rand(tokens.shape) < 0.15
        labels[~chosen] = -100
        which = torch.rand(tokens.shape)
        tokens[chosen & (which < 0.8)] = self.mask
        replaced = chosen & (which >= 0.9)
        tokens[replaced] = torch.randint(self.vocabulary, (int(replaced.sum()),))
        return {"input_ids": tokens, "labels": labels}


class Notes(TrainerCallback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())
        control.should_training_stop |= self.ends[-1] - self.began > self.seconds

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    out, data = Path(sys.argv[1]), Path(sys.argv[2])
    layers, hidden, batch, updates = map(int, sys.argv[3:7])
    seconds, rate, warm_up = map(float, sys.argv[7:] or (math.inf, 5e-4, 20))
    vocabulary = sum(1 for _ in (data / "dict.txt").open()) + 5
    config = RobertaPreLayerNormConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        pad_token_id=1,
    )
    notes = Notes(seconds)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=updates,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=int(warm_up),
            weight_decay=0.01,
            use_cpu=True,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=1,
        )
        model = RobertaPreLayerNormForMaskedLM(config)
        trainer = Trainer(model, arguments, Masking(vocabulary), Blocks(data, "train"), callbacks=[notes])
        trainer.train()
        valid = None if seconds == math.inf else trainer.evaluate(Blocks(data, "valid"))["eval_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = [batch * LENGTH] * len(notes.ends)
    found = {"ends": notes.ends, "tokens": tokens, "losses": notes.losses, "valid": valid, "peak": peak}
    out.write_text(json.dumps(found))


main()
