from __future__ import annotations

import onnxruntime
import pytest
import torch
import transformers

from train_large.errors import UserError
from train_large.export import onnx
from train_large.export.huggingface import export_hf
from train_large.export.onnx import export_onnx

HEADS = {"sentence_classification_head": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "heads"), [("prenorm_roberta", HEADS), ("prenorm_roberta", None), ("roberta_prenorm", HEADS)]
)
def test_onnxruntime_computes_fairseqs_logits(build, save, prepared, tmp_path, arch, heads, capfd):
    model, checkpoint = build(arch, heads=heads)
    out = tmp_path / "out"
    path = save(checkpoint)
    capfd.readouterr()
    assert "model.onnx" in export_hf(path, out, dictionary=prepared.dictionary, onnx=True).files
    assert not any("Loading" in said or "torch.onnx" in said for said in capfd.readouterr())
    assert transformers.utils.logging.is_progress_bar_enabled()

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (1, 20), (7, 11)):
        tokens = torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(rows))
        tokens[1:, length // 2 :] = 1
        inputs = {"input_ids": tokens.numpy(), "attention_mask": tokens.ne(1).long().numpy()}
        found = torch.from_numpy(session.run(["logits"], inputs)[0])
        head = next(iter(heads)) if heads else None
        with torch.no_grad():
            expected = model(tokens, features_only=bool(heads), classification_head_name=head)[0]
        if not heads:
            found, expected = found[tokens.ne(1)], expected[tokens.ne(1)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(build, save, prepared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_hf(save(build("prenorm_roberta", heads=HEADS)[1]), out, dictionary=prepared.dictionary)
    before = sorted(file.name for file in out.iterdir())
    honest = torch.onnx.export

    def another_model(module, *args, **kwargs):
        other = onnx._Logits(transformers.AutoModelForSequenceClassification.from_pretrained(out)).eval()
        other.model.classifier.out_proj.bias.data += 0.001
        return honest(other, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", another_model)
    with pytest.raises(UserError, match=r"model.onnx was not written: .* differ from torch's by 0.001"):
        export_onnx(out)
    assert sorted(file.name for file in out.iterdir()) == before


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a model that export-hf wrote"):
        export_onnx(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UserError, match="is not a model that export-hf wrote"):
        export_onnx(tmp_path)
