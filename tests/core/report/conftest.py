"""An invented experiment: four sizes, with numbers of the order that such sizes come out with."""

import math

import pytest
from report.invented import T2T_BUDGET, T2T_FACTS, make_translation_value, write_run_log

from train_large.report import figures
from train_large.report import results as results_module

SPARSITIES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
LOSS_AT_BITS = {32: 0.0, 8: 0.001, 6: 0.006, 4: 0.03}
# In the order of make_model's arguments; `leave` is the share of the budget after which the size leaves the plateau.
SIZES = (
    ("2l_32h", 2, 32, 2, 131_000, 27_000, 3e-3, 35_800, 419.0, 0.58, 0.9),
    ("2l_64h", 2, 64, 4, 300_000, 102_000, 3e-3, 28_042, 137.0, 0.66, 0.45),
    ("3l_128h", 3, 128, 8, 1_030_000, 597_000, 2e-3, 15_456, 108.0, 0.74, 0.3),
    ("4l_256h", 4, 256, 16, 4_010_000, 3_160_000, 1e-3, 5_308, 155.0, 0.71, 0.5),
)


def make_model(name, layers, hidden, heads, parameters, bare, rate, updates, perplexity, accuracy, leave):
    flops = 6.0 * parameters * 1024
    curve = []
    for k in range(1, 13):
        height = 450 - 20 * k / 12 + 8000 * math.exp(-2.0 * k)
        if k / 12 > leave:
            height = perplexity + (height - perplexity) * math.exp(-8 * (k / 12 - leave))
        curve.append(
            {
                "updates": updates * k // 12,
                "train_seconds": 50.0 * k,
                "flops": flops * (updates * k // 12),
                "perplexity": perplexity if k == 12 else height,
            }
        )
    robust = 1.4 - 0.1 * math.log2(parameters / 131_000)
    compressed = []
    for sparsity in SPARSITIES:
        for bits, loss in LOSS_AT_BITS.items():
            nonzero = round(parameters * (1 - sparsity))
            packed = nonzero * bits // 8 + (parameters // 8 if sparsity else 0)
            lost = robust * (loss + 0.1 * sparsity**4)
            compressed.append(
                {
                    "sparsity": sparsity,
                    "bits": bits,
                    "accuracy": accuracy - lost,
                    "parameters": parameters,
                    "nonzero": nonzero,
                    "bytes": min(packed, parameters * bits // 8),
                    "bytes_paper": nonzero * bits // 8,
                    "recovery_updates": 40 if sparsity else 0,
                    "recovered": sparsity < 0.7,
                }
            )
    return {
        "name": name,
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "parameters": parameters,
        "parameters_without_embeddings": bare,
        "learning_rate": rate,
        "run_log": f"{name}/run.jsonl",
        "updates": updates,
        "train_seconds": 600.0,
        "tokens": updates * 1024,
        "flops": flops * updates,
        "perplexity": perplexity,
        "curve": curve,
        "finetuned": {"accuracy": accuracy, "seconds": 25.0, "updates": 566},
        "compressed": compressed,
    }


def make_value():
    return {
        "format": 1,
        "title": "An invented experiment",
        "created": "2026-03-01T12:00:00+00:00",
        "command": "make demo BUDGET=10m",
        "machine": {
            "processor": "A processor",
            "cores": 2,
            "memory_gib": 7.8,
            "python": "3.11.2",
            "torch": "2.13.0",
            "fairseq": "0.12.3",
        },
        "budget": {"seconds": 600.0, "clock": "train"},
        "pretraining": {"corpus": "Invented text", "tokens": 3_100_000, "vocabulary": 3000, "batch_tokens": 1024},
        "task": {"name": "movie reviews", "train": 9057, "valid": 1006, "metric": "accuracy", "majority": 0.503},
        "models": [make_model(*size) for size in SIZES],
    }


KINDS = ("attention q, k, v", "attention out", "fc1", "fc2", "token embeddings", "biases", "all")


def with_files_and_weight_errors(value):
    """The same experiment with what newer files have besides: sizes of packed files, and errors of the weights that
    fall with the size."""
    for place, model in enumerate(value["models"]):
        for entry in model["compressed"]:
            entry["file_bytes"] = 30_000 + round(0.7 * entry["bytes_paper"])
        model["weight_errors"] = []
        for sparsity, bits, size in ((0.0, 8, 0.06), (0.0, 6, 0.25), (0.0, 4, 1.0), (0.6, 32, 2.0)):
            for i, kind in enumerate(KINDS):
                pruned_away = not (sparsity and kind == "biases")
                error = 0.01 * (1 + 0.1 * i) * size * 0.8**place * pruned_away
                model["weight_errors"].append(
                    {
                        "sparsity": sparsity,
                        "bits": bits,
                        "kind": kind,
                        "parameters": 1000 * (i + 1),
                        "mean": -1e-5 * pruned_away,
                        "mean_absolute": error,
                        "variance": 1.4 * error**2,
                        "deviation": 0.1 * 0.9**place,
                        "relative": 10 * error,
                    }
                )
    return value


@pytest.fixture
def translation_value():
    """A translation study's results.json as plain values, the test's own to change."""
    return make_translation_value()


@pytest.fixture(scope="session")
def translation():
    return results_module.parse(make_translation_value())


@pytest.fixture
def t2t_runs(tmp_path):
    """Folders of four runs by Tensor2Tensor."""
    return [
        write_run_log(
            tmp_path / "study" / model["name"] / "train",
            model,
            {**T2T_FACTS, **T2T_BUDGET, "parameters": model["parameters"]},
            **{"bleu_sentences": 250, "beam_size": 4, "alpha": 0.6},
        )
        for model in make_translation_value()["models"]
    ]


@pytest.fixture
def new_value():
    return with_files_and_weight_errors(make_value())


@pytest.fixture(scope="session")
def new_results():
    return results_module.parse(with_files_and_weight_errors(make_value()))


@pytest.fixture
def value():
    """results.json as plain values, the test's own to change."""
    return make_value()


@pytest.fixture(scope="session")
def results():
    return results_module.parse(make_value())


@pytest.fixture(scope="session")
def new_drawings(new_results):
    return {drawing.name: drawing for drawing in figures.draw(new_results)}


@pytest.fixture(scope="session")
def drawings(results):
    """The figures by name: drawn once, for that takes seconds."""
    return {drawing.name: drawing for drawing in figures.draw(results)}


@pytest.fixture(scope="session")
def translation_drawings(translation):
    return {drawing.name: drawing for drawing in figures.draw(translation)}
