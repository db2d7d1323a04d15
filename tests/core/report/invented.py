"""An invented translation study: four sizes, and the logs that their runs would leave."""

from train_large import runlog

# name, layers, hidden, heads, parameters, without embeddings, updates, perplexity, BLEU: the third is the best.
TRANSLATION_SIZES = (
    ("2l_64h", 2, 64, 1, 760_000, 250_000, 5400, 21.0, 9.1),
    ("2l_128h", 2, 128, 2, 1_940_000, 920_000, 3300, 14.2, 14.6),
    ("2l_256h", 2, 256, 4, 5_700_000, 3_680_000, 1400, 12.9, 17.3),
    ("6l_256h", 6, 256, 4, 13_100_000, 11_060_000, 520, 31.0, 6.0),
)


def make_translation_model(name, layers, hidden, heads, parameters, bare, updates, perplexity, bleu):
    """Validations at every tenth of the budget, which measure BLEU at every second one."""
    flops = 6.0 * parameters * 1024
    curve = []
    for k in range(1, 11):
        left = (1 - k / 10) * 600 / perplexity
        point = {
            "updates": updates * k // 10,
            "train_seconds": 18.0 * k,
            "flops": flops * (updates * k // 10),
            "perplexity": perplexity * (1 + left),
            "approx_bleu": 2.0 + 3 * k,
        }
        if k % 2 == 0:
            point["bleu"] = bleu * k / 10
        curve.append(point)
    return {
        "name": name,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "parameters": parameters,
        "parameters_without_embeddings": bare,
        "learning_rate": 0.2,
        "run_log": f"{name}/run.jsonl",
        "updates": updates,
        "train_seconds": 180.0,
        "tokens": updates * 1024,
        "flops": flops * updates,
        "perplexity": perplexity,
        "curve": curve,
        "scores": {"paper": bleu + 0.31, "t2t": bleu + 1.42, "sacrebleu": bleu, "paper_error": 0.41},
    }


def make_translation_value():
    decoding = {"sentences": 1000, "beam_size": 4, "alpha": 0.6}
    return {
        "format": 1,
        "title": "An invented translation study",
        "created": "2026-03-01T12:00:00+00:00",
        "command": "make demo-mt BUDGET=3m",
        "machine": {
            "processor": "A processor",
            "cores": 2,
            "memory_gib": 7.8,
            "python": "3.11.2",
            "tensorflow": "2.12.1",
            "tensor2tensor": "1.15.7",
        },
        "budget": {"seconds": 180.0, "clock": "train"},
        "translation": {
            "corpus": "Invented manuals",
            "source": "English",
            "target": "French",
            "train": 60_000,
            "dev": 900,
            "test": 1000,
            "vocabulary": 4096,
            "batch_tokens": 1024,
            "decoding": decoding,
            "averaged": 4,
            "signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.4.3",
            "curve_decoding": {**decoding, "sentences": 250, "beam_size": 1},
        },
        "models": [make_translation_model(*size) for size in TRANSLATION_SIZES],
    }


T2T_FACTS = {"arch": "transformer_budgeted", "problem": "translate_enfr_pairs", "vocabulary": 4096}
T2T_BUDGET = {"budget_seconds": 180.0, "budget_clock": "train", "seconds_per_update": None}


def write_run_log(folder, model, facts, **besides):
    """A run log in this folder, as the tools write theirs, with what was measured of a model; returns the folder.

    `besides` goes into each validation line that has a BLEU."""
    path = str(folder / runlog.NAME)
    nothing = dict.fromkeys(runlog.COUNTERS, 0)
    shape = {name: model[name] for name in ("layers", "hidden", "heads")}
    runlog.append(path, "start", nothing, size=model["name"], **shape, **facts)
    for point in model["curve"]:
        counters = {
            "updates": point["updates"],
            "train_seconds": point["train_seconds"],
            "wall_seconds": 7 + 2 * point["train_seconds"],
            "tokens": float(1024 * point["updates"]),
            "flops": point["flops"],
        }
        runlog.append(path, "train", counters, loss=4.0)
        scores = {name: point[name] for name in ("perplexity", "bleu", "approx_bleu") if name in point}
        runlog.append(path, "valid", counters, **{"subset": "dev", **scores, **(besides if "bleu" in point else {})})
    runlog.append(path, "stop", counters, reason="budget")
    return folder
