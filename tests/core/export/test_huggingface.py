from __future__ import annotations

import errno
import json
import shutil
import sys
from argparse import Namespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from train_large import cli
from train_large.data import folder as prepared_folder
from train_large.data.documents import digest
from train_large.errors import UserError
from train_large.export.huggingface import export_hf
from train_large.export.tokenizer import find_bpe

HEADS = {"sentence_classification_head": 3}


def batch(rows: int = 4, length: int = 20) -> torch.Tensor:
    """Rows of falling length, padded at the end."""
    tokens = torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 0
    for row in range(rows):
        tokens[row, length - 5 * row :] = 1
    return tokens


def load(folder, kind):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing left over
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    return model.eval()


@torch.no_grad()
def assert_same_logits(folder, model, head=None, tokens=None):
    tokens = batch() if tokens is None else tokens
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForMaskedLM
    found = load(folder, kind)(input_ids=tokens, attention_mask=tokens.ne(1).long()).logits
    expected = model(tokens, features_only=bool(head), classification_head_name=head)[0]
    if not head:  # what is computed at padding is used by nobody
        found, expected = found[tokens.ne(1)], expected[tokens.ne(1)]
    assert expected.std() > 0.1  # no model that says the same to everything
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["language model", "classifier"])
@pytest.mark.parametrize(
    ("arch", "flags", "family"),
    [
        ("prenorm_roberta", (), "RobertaPreLayerNorm"),
        ("prenorm_roberta", ("--share-layers", "all"), "RobertaPreLayerNorm"),
        ("prenorm_roberta", ("--share-layers", "attention", "--no-embedding-norm"), "XLMRobertaXL"),
        ("roberta_prenorm", ("--encoder-ffn-embed-dim", "40", "--encoder-layerdrop", "0.1"), "XLMRobertaXL"),
        ("roberta_prenorm", ("--layernorm-embedding",), "RobertaPreLayerNorm"),
        ("roberta_prenorm", ("--untie-weights-roberta",), "XLMRobertaXL"),
        ("prenorm_roberta", ("--untie-weights-roberta",), "RobertaPreLayerNorm"),
    ],
)
def test_logits_are_those_of_fairseq(build, save, prepared, tmp_path, arch, flags, family, kind):
    classifier = kind == "classifier"
    model, checkpoint = build(arch, *flags, heads=HEADS if classifier else None)

    export = export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)

    assert export.architecture == f"{family}For{'SequenceClassification' if classifier else 'MaskedLM'}"
    assert_same_logits(tmp_path / "out", model, *(HEADS if classifier else ()))


def test_a_quantized_checkpoint_keeps_its_values(build, save, prepared, tmp_path):
    model, checkpoint = build("prenorm_roberta", "--share-layers", "all", heads=HEADS)
    assert cli.main(["quantize", str(save(checkpoint)), str(tmp_path / "4bit.pt"), "--bits", "4"]) == 0
    state = torch.load(tmp_path / "4bit.pt", weights_only=True)["model"]
    model.load_state_dict(state)

    export_hf(tmp_path / "4bit.pt", tmp_path / "out", dictionary=prepared.folder)

    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(3):  # shared, and written out
        found = weights[f"roberta_prelayernorm.encoder.layer.{layer}.intermediate.dense.weight"]
        assert torch.equal(found, state["encoder.sentence_encoder.layers.0.fc1.weight"])
        assert len(found.unique()) <= 16
    assert_same_logits(tmp_path / "out", model, *HEADS)


class TestWhatGoesWithTheModel:
    """The dictionary, label names and BPE, where none are given."""

    @pytest.fixture
    def checkpoint(self, build, save, prepared, tmp_path):
        """A classifier's, trained on tmp_path/task, beside which the prepared text lies as text/."""
        (tmp_path / "text").symlink_to(prepared.folder)
        for part, lines in {"input0": prepared.dictionary.read_text(), "label": "bad 1\ngood 1\nso-so 1\n"}.items():
            (tmp_path / "task" / part).mkdir(parents=True)
            (tmp_path / "task" / part / "dict.txt").write_text(lines)
        pieces = [*find_bpe(prepared.folder), prepared.dictionary]
        prepared_folder.finish(tmp_path / "task", {"text": [digest(piece) for piece in pieces]}, {})
        self.model, checkpoint = build("prenorm_roberta", heads=HEADS, task={"data": str(tmp_path / "task")})
        return save(checkpoint)

    def check(self, folder, prepared):
        assert transformers.AutoConfig.from_pretrained(folder).id2label == {0: "bad", 1: "good", 2: "so-so"}
        found = transformers.AutoTokenizer.from_pretrained(folder)("The film is a delight")["input_ids"]
        assert found == [0, *prepared.encode("The film is a delight")]
        assert_same_logits(folder, self.model, *HEADS)

    def test_is_found_where_the_model_was_trained(self, checkpoint, prepared, tmp_path):
        export_hf(checkpoint, tmp_path / "out")
        self.check(tmp_path / "out", prepared)

    def test_is_in_a_packed_file(self, checkpoint, prepared, tmp_path):
        packed = tmp_path / "packed.safetensors"
        assert cli.main(["pack", str(checkpoint), str(packed), "--bits", "5"]) == 0
        assert cli.main(["unpack", str(packed), str(tmp_path / "unpacked.pt")]) == 0
        self.model.load_state_dict(torch.load(tmp_path / "unpacked.pt", weights_only=True)["model"])
        shutil.rmtree(tmp_path / "task")
        export_hf(packed, tmp_path / "out")
        self.check(tmp_path / "out", prepared)

    def test_may_be_nowhere(self, checkpoint, tmp_path):
        shutil.rmtree(tmp_path / "task")
        with pytest.raises(UserError, match="checkpoint_best.pt is not known: give it by --dictionary"):
            export_hf(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_single(build, save, prepared, tmp_path, dtype):
    model, checkpoint = build("prenorm_roberta")
    checkpoint["model"] = {name: weight.to(dtype) for name, weight in checkpoint["model"].items()}
    model.load_state_dict(checkpoint["model"])

    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)

    assert_same_logits(tmp_path / "out", model)


def test_sequences_may_be_as_long_as_fairseq_allows(build, save, prepared, tmp_path):
    model, checkpoint = build("prenorm_roberta", "--max-positions", "33")
    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary, bpe=prepared.folder)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 33 == model.max_positions()
    assert_same_logits(tmp_path / "out", model, tokens=batch(length=33))


def test_one_of_several_heads_is_chosen(build, save, prepared, tmp_path):
    model, checkpoint = build("prenorm_roberta", heads={"topic": 5, "mood": 2})
    path = save(checkpoint)
    with pytest.raises(UserError, match=r"--head mood\|topic"):
        export_hf(path, tmp_path / "out", dictionary=prepared.dictionary)
    with pytest.raises(UserError, match="--head style: the checkpoint has mood, topic"):
        export_hf(path, tmp_path / "out", dictionary=prepared.dictionary, head="style")
    export_hf(path, tmp_path / "out", dictionary=prepared.dictionary, head="topic")
    assert_same_logits(tmp_path / "out", model, "topic")


def test_a_classifier_needs_no_language_models_head(build, save, prepared, tmp_path):
    model, checkpoint = build("prenorm_roberta", heads=HEADS)
    for name in [name for name in checkpoint["model"] if name.startswith("encoder.lm_head.")]:
        del checkpoint["model"][name]
    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)
    assert_same_logits(tmp_path / "out", model, *HEADS)


def test_regression(build, save, prepared, tmp_path):
    model, checkpoint = build("prenorm_roberta", heads={"score": 1}, task={"regression_target": True})
    export = export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)
    assert export.labels == ()
    assert_same_logits(tmp_path / "out", model, "score")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_labels, config.problem_type) == (1, "regression")


class TestLabels:
    @pytest.fixture
    def task(self, prepared, tmp_path):
        """As prepare-task and fairseq-preprocess leave it."""
        for part in ("input0", "label"):
            (tmp_path / "task" / part).mkdir(parents=True)
        (tmp_path / "task" / "input0" / "dict.txt").write_bytes(prepared.dictionary.read_bytes())
        (tmp_path / "task" / "label" / "dict.txt").write_text("bad 9\ngood 7\nso-so 3\nmadeupword0000 0\n")
        return tmp_path / "task"

    def test_are_those_of_the_task(self, build, save, task, tmp_path):
        export = export_hf(save(build("prenorm_roberta", heads=HEADS)[1]), tmp_path / "out", dictionary=task)
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.id2label == {0: "bad", 1: "good", 2: "so-so"}
        assert config.label2id == {"bad": 0, "good": 1, "so-so": 2}
        assert export.labels == ("bad", "good", "so-so")

    def test_are_those_given(self, build, save, task, tmp_path):
        path = save(build("prenorm_roberta", heads=HEADS)[1])
        export_hf(path, tmp_path / "out", dictionary=task, labels=["a", "b", "c"])
        assert transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "a", 1: "b", 2: "c"}

    def test_must_be_as_many_as_the_head_has(self, build, save, task, tmp_path):
        path = save(build("prenorm_roberta", heads={"head": 2})[1])
        with pytest.raises(UserError, match="names 3 classes .* head has 2: give its own by --labels"):
            export_hf(path, tmp_path / "out", dictionary=task)
        for wrong in (["a"], ["a", "a"]):
            with pytest.raises(UserError, match="give 2 different names"):
                export_hf(path, tmp_path / "out", dictionary=task, labels=wrong)

    def test_are_for_classifiers(self, build, save, task, tmp_path):
        with pytest.raises(UserError, match="--labels are for a classifier"):
            export_hf(save(build("prenorm_roberta")[1]), tmp_path / "out", dictionary=task, labels=["a"])


@pytest.mark.parametrize(
    ("arch", "flags", "named"),
    [
        ("roberta_base", (), "--arch roberta_base"),
        ("roberta_prenorm", ("--activation-fn", "relu"), "--activation-fn relu"),
        ("roberta_prenorm", ("--pooler-activation-fn", "relu"), "--pooler-activation-fn relu"),
        ("roberta_prenorm", ("--spectral-norm-classification-head",), "--spectral-norm-classification-head"),
        ("roberta_prenorm", ("--quant-noise-pq", "0.1"), "--quant-noise-pq 0.1"),
        ("roberta_prenorm", ("--encoder-layers-to-keep", "0,2"), "--encoder-layers-to-keep 0,2"),
        ("prenorm_roberta", ("--layer-heads", "4,3,4"), "--layer-heads 4,3,4"),
        ("prenorm_roberta", ("--layer-ffn", "64,60,64"), "--layer-ffn 64,60,64"),
    ],
)
def test_the_flag_in_the_way_is_named(build, save, prepared, tmp_path, arch, flags, named):
    path = save(build(arch, *flags, heads=HEADS)[1])
    with pytest.raises(UserError, match=f"{path}: {named} is in the way"):
        export_hf(path, tmp_path / "out", dictionary=prepared.dictionary)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("quant_noise_scalar", 0.1, "--quant-noise-scalar 0.1"),  # fairseq cannot build a RoBERTa with it
        ("no_scale_embedding", False, "no --no-scale-embedding"),
        ("encoder_learned_pos", False, "no --encoder-learned-pos"),
        ("no_token_positional_embeddings", True, "--no-token-positional-embeddings"),
        ("mha_heads_to_keep", 2, "--mha-heads-to-keep 2"),
        ("encoder_attention_heads", 5, "--encoder-attention-heads 5 does not divide a hidden size of 32"),
    ],
)
def test_the_option_in_the_way_is_named(build, save, prepared, tmp_path, option, value, named):
    checkpoint = build("roberta_prenorm")[1]
    setattr(checkpoint["cfg"]["model"], option, value)
    with pytest.raises(UserError, match=named):
        export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)


def test_the_pooler_does_not_matter_to_a_language_model(build, save, prepared, tmp_path):
    model, checkpoint = build("roberta_prenorm", "--pooler-activation-fn", "relu")
    export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)
    assert_same_logits(tmp_path / "out", model)


def test_another_architecture_is_named(build, save, prepared, tmp_path):
    checkpoint = build("prenorm_roberta")[1]
    checkpoint["cfg"]["model"] = Namespace(arch="transformer_tiny", _name="transformer_tiny")
    checkpoint["model"] = {
        "encoder.embed_tokens.weight": torch.ones(9, 4),
        "decoder.embed_tokens.weight": torch.ones(9),
    }
    with pytest.raises(UserError, match="--arch transformer_tiny is in the way"):
        export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)


E_ = "encoder.sentence_encoder."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{E_}layers.1.fc1.weight": torch.ones(60, 32)}, "layers.1.fc1.weight is 60x32 and not 128x32"),
        ({f"{E_}layers.1.self_attn.q_proj.weight": torch.ones(24, 32)}, "q_proj.weight is 24x32 and not 32x32"),
        ({f"{E_}layers.2.fc2.bias": None}, "layers.2.fc2.bias is missing"),
        ({f"{E_}layers.0.fc1.weight": torch.ones(3)}, "layers.0.fc1.weight has 1 dimensions and not 2"),
        ({f"{E_}layers.7.fc2.bias": torch.ones(32)}, "layers.3.self_attn.q_proj.weight is missing"),
        ({f"{E_}adapter.weight": torch.ones(2, 2)}, "adapter.weight has no place in .*RobertaPreLayerNormForMaskedLM"),
        ({"encoder.lm_head.bias": torch.ones(3)}, "lm_head.bias is 3 and not"),
        ({"encoder.lm_head.weight": torch.ones(7, 32)}, "lm_head.weight is 7x32 and not"),
        ({f"{E_}embed_positions.weight": None}, "embed_positions.weight is missing"),
    ],
)
def test_the_tensor_in_the_way_is_named(build, save, prepared, tmp_path, change, message):
    checkpoint = build("prenorm_roberta")[1]
    state = {**checkpoint["model"], **change}
    checkpoint["model"] = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(UserError, match=message):
        export_hf(save(checkpoint), tmp_path / "out", dictionary=prepared.dictionary)


class TestDictionary:
    def test_of_another_length(self, build, save, prepared, tmp_path):
        lines = prepared.dictionary.read_text().splitlines()
        (tmp_path / "dict.txt").write_text("\n".join(lines[:-1]) + "\n")
        path = save(build("prenorm_roberta")[1])
        rows = len(lines) + 5
        with pytest.raises(UserError, match=f"a dictionary of {rows - 1} symbols.*embeddings have {rows} rows"):
            export_hf(path, tmp_path / "out", dictionary=tmp_path / "dict.txt")

    def test_in_another_order(self, build, save, prepared, tmp_path):
        first, second, *others = prepared.dictionary.read_text().splitlines()
        (tmp_path / "dict.txt").write_text("\n".join([second, first, *others]) + "\n")
        with pytest.raises(UserError, match="is not the dictionary that the model was trained with"):
            export_hf(save(build("prenorm_roberta")[1]), tmp_path / "out", dictionary=tmp_path / "dict.txt")

    def test_is_found_in_the_folders_of_the_data(self, build, save, prepared, tmp_path):
        with pytest.raises(UserError, match="holds none"):
            export_hf(save(build("prenorm_roberta")[1]), tmp_path / "out", dictionary=tmp_path)


class TestWholeOrNotAtAll:
    @pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
    def test_a_target_that_exists_is_left_alone(self, build, save, prepared, tmp_path, kind):
        target = tmp_path / "out"
        {"file": target.touch, "folder": target.mkdir, "dangling link": lambda: target.symlink_to("nowhere")}[kind]()
        with pytest.raises(UserError, match="exists already: choose another folder or delete it"):
            export_hf(save(build("prenorm_roberta")[1]), target, dictionary=prepared.dictionary)

    def test_nothing_is_left_of_a_failure(self, build, save, prepared, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("train_large.export.huggingface.model_card", full)
        path = save(build("prenorm_roberta")[1])
        with pytest.raises(UserError, match="could not be written .No space left on device"):
            export_hf(path, tmp_path / "out", dictionary=prepared.dictionary)
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    def test_a_missing_package_is_named(self, build, save, prepared, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UserError, match=r"safetensors.torch .*pip install '\.\[pack,hf\]'"):
            export_hf(save(build("prenorm_roberta")[1]), tmp_path / "out", dictionary=prepared.dictionary)


def test_the_files_are_listed_with_their_bytes(build, save, prepared, tmp_path):
    export = export_hf(
        save(build("prenorm_roberta")[1]), tmp_path / "out", dictionary=prepared.folder, bpe=prepared.folder / "bpe"
    )
    assert export.files == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert export.files.keys() == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # as readable as any file
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_eps"] == 1e-5
