from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from formula import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from train_large.compression import packed as module
from train_large.compression import rate
from train_large.compression.coding import to_lzma, unlzma
from train_large.compression.packed import CHUNK, SMALL, PackedModel, read_index, read_packed, write_packed
from train_large.compression.quantization import Quantized, dequantize, quantize_tensor
from train_large.compression.rate import quantize_by_trellis, quantize_to_step
from train_large.errors import UserError

CHECKPOINT = {"cfg": {"model": {"encoder_layers": 2, "encoder_embed_dim": 16}}, "best": 0.25, "none": None, "list": [1]}
FILES = {"dict.txt": "12 5\n7 3\n", "labels.txt": "é\nno\n"}


def some_tensors() -> list[tuple[str, Quantized | torch.Tensor | str]]:
    """One of everything: pruned, by rows, by groups, of more than 8 bits, plain with and without zeros, tied; more of
    some kinds, and one too large to be coded with others."""
    torch.manual_seed(0)
    w = torch.randn(40, 16)
    pruned = w * (torch.rand(40, 16) < 0.4)
    return [
        ("large", quantize_tensor(torch.randn(70, 64), 5)),
        ("dense", quantize_tensor(w, 4)),
        ("pruned", quantize_tensor(pruned, 6)),
        ("all zero", quantize_tensor(torch.zeros(33), 3)),
        ("rows", quantize_tensor(pruned, 8, "row")),
        ("groups", quantize_tensor(w, 2, "group:24")),
        ("fine", quantize_to_step(w, 0.001)),
        ("tied", "pruned"),
        ("plain", w),
        ("plain, pruned", pruned),
        ("minus zero", torch.tensor([0.0, -0.0, 1.0] * 20)),
        ("scalar", quantize_tensor(torch.tensor(0.5), 8)),
        ("empty", quantize_tensor(torch.zeros(0, 3), 8)),
        ("version", torch.tensor([3.0])),
        ("count", torch.tensor(12345678901)),
        ("flags", torch.tensor([[True, False, True]])),
        ("half", torch.randn(5, 3).bfloat16()),
        ("pruned, too", quantize_tensor(pruned[:7].T, 6)),
        ("rows, too", quantize_tensor(pruned[5:8], 8, "row")),
        ("groups, too", quantize_tensor(w[:3], 2, "group:24")),
        ("fine, too", quantize_to_step(w[0], 0.001)),
        ("plain, pruned, too", pruned[3]),
        ("large, too", quantize_tensor(torch.randn(70, 64), 5)),
        ("small as large", quantize_tensor(torch.randn(9), 5)),
        ("empty, too", torch.zeros(0, dtype=torch.int64)),
        ("deep", quantize_tensor(torch.randn(280, 256) * torch.where(torch.rand(280, 256) < 0.001, 30, 1), 6)),
        ("trellis", quantize_by_trellis(torch.randn(70, 64), 0.02)),
        ("trellis, pruned", quantize_by_trellis(torch.randn(90, 64) * (torch.rand(90, 64) < 0.5), 0.5)),
    ]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    size = write_packed(some_tensors(), CHECKPOINT, FILES, path)
    assert size == path.stat().st_size == write_packed(some_tensors(), CHECKPOINT, FILES, None)
    return path


@pytest.mark.parametrize("name", ["../../owned.txt", "/owned.txt", "config.json"])
def test_files_have_names_that_are_known(tmp_path, name):
    """Folders are made of them (`export-hf`)."""
    write_packed(some_tensors(), CHECKPOINT, {**FILES, name: "x"}, tmp_path / "file")
    with pytest.raises(UserError, match="files of other names"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "numbers that are not finite"), ("\udcff", "not UTF-8")])
def test_a_configuration_that_is_no_text(tmp_path, value, reason):
    with pytest.raises(UserError, match=reason):
        write_packed(some_tensors(), {"extra_state": {"val_loss": value}}, FILES, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def same(one: object, other: object) -> bool:
    if isinstance(one, Quantized) and isinstance(other, Quantized):
        assert one.indices.dtype == other.indices.dtype
        masks = (one.mask is None) == (other.mask is None) and (one.mask is None or torch.equal(one.mask, other.mask))
        ranges = same_bits(one.minimum, other.minimum.numpy()) and same_bits(one.step, other.step.numpy())
        rest = (one.granularity, one.bits, one.trellis) == (other.granularity, other.bits, other.trellis)
        return masks and ranges and rest and torch.equal(one.indices, other.indices)
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def test_everything_comes_back_bit_for_bit(good):
    read = read_packed(good)
    assert (read.checkpoint, read.files) == (CHECKPOINT, FILES)
    written = dict(some_tensors())
    assert list(read.tensors) == list(written)
    assert read.tensors["tied"] is read.tensors["pruned"]
    for name, tensor in written.items():
        if not isinstance(tensor, str):
            assert same(read.tensors[name], tensor), name
    state = read.state()
    assert state["tied"].data_ptr() == state["pruned"].data_ptr()
    assert same_bits(state["rows"], dequantize(written["rows"]).numpy())


def test_the_same_model_gives_the_same_file(good, tmp_path):
    write_packed(some_tensors(), CHECKPOINT, FILES, tmp_path / "again")
    assert good.read_bytes() == (tmp_path / "again").read_bytes()
    assert os.listdir(tmp_path) == ["again"]


def test_it_is_a_safetensors_file(good):
    with safetensors.safe_open(good, "pt") as file:
        assert set(file.keys()) == {"index", "weights"}
        metadata = file.metadata()
    assert metadata.pop("crc32")
    assert metadata == {"train-large": "packed model", "version": "4", "size": "2l_16h"}


def test_small_tensors_of_one_kind_are_coded_together(good, tmp_path):
    index, _ = read_index(good)
    together = [[entry.name for entry in part.entries] for part in index.parts]
    assert ["pruned", "pruned, too"] in together
    assert ["rows", "rows, too"] in together
    for alone in ("large", "large, too", "small as large", "dense"):
        assert [alone] in together
    assert sorted(name for part in together for name in part) == sorted(set(dict(some_tensors())) - {"tied"})
    state = read_packed(good).state()
    memory = {
        tensor.untyped_storage().data_ptr() for name, tensor in state.items() if tensor.numel() and name != "tied"
    }
    assert len(memory) == sum(tensor.numel() > 0 for tensor in state.values()) - 1
    vectors = [(f"{i}", quantize_tensor(torch.randn(SMALL), 4)) for i in range(3)]
    write_packed(vectors, {}, {}, tmp_path / "three")
    assert [len(part.entries) for part in read_index(tmp_path / "three")[0].parts] == [3]


def test_a_tensor_of_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    monkeypatch.setattr(rate, "CHUNK", 100)
    write_packed(some_tensors(), CHECKPOINT, FILES, tmp_path / "file")
    blocks = {entry.name: len(part.blocks) for part in read_index(tmp_path / "file")[0].parts for entry in part.entries}
    assert blocks["pruned"] == 1 + 2 * 8  # 640 weights, and 112 of the next tensor
    read = read_packed(tmp_path / "file")
    for name, tensor in some_tensors():
        assert isinstance(tensor, str) or same(read.tensors[name], tensor), name


def test_the_example_of_the_format():
    """The bytes that the diagram in the module's docstring shows."""
    w = torch.tensor([0.50, -0.25, 0, 0.15, -0.05, 0.50])
    q = quantize_tensor(w, 3)
    assert q.indices.tolist() == [7, 0, 0, 4, 2, 7]
    blocks = [block for future in module._encoded([q]) for block in future.result()]
    text = module.__doc__ or ""
    for name, block in zip(("ranges", "mask", "codes"), blocks):
        [(method, shown)] = re.findall(rf"^    {name} +(\w\w) \| ((?:[0-9a-f]+ )*[0-9a-f]+)", text, re.MULTILINE)
        assert (method + shown).replace(" ", "") == block.hex(), name


def rewritten(good: Path, path: Path, change, forged: bool = True, bent=lambda weights: weights) -> Path:
    """The good file with its index changed by `change`, its weights by `bent`, and the index's checksum right again;
    `forged`: the parts' too."""
    data = good.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    end = header["index"]["data_offsets"][1]
    index = json.loads(unlzma(body[:end], 1 << 20, 1 << 26))
    change(index, header)
    weights = bent(body[end:])
    start = 0
    for number, part in enumerate(index["parts"] if forged else []):
        # As far as the lie lets it be told which bytes are meant.
        blocks = part.get("blocks", [])
        if isinstance(blocks, list) and all(isinstance(length, int) for length in blocks):
            length = sum(blocks)
            shapes = [one[:2] for one in index["tensors"] if one[2:] == [number]]
            if "blocks" in part and part["crc32"] != 1:
                part["crc32"] = module._crc32(shapes, part, [weights[start : start + length]])
            start += length
    frame = to_lzma(json.dumps(index).encode(), lc=0, lp=0)
    header["__metadata__"]["crc32"] = f"{zlib.crc32(frame):08x}"
    header["index"] = {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, len(frame)]}
    ends = [len(frame), len(frame) + len(weights)]
    header["weights"] = {"dtype": "U8", "shape": [len(weights)], "data_offsets": ends}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + frame + weights)
    return path


NAME, SHAPE, PART = 0, 1, 2

LIES = {  # of a tensor: what to say in which place; of its part: what to add
    "a larger shape": ("pruned", {SHAPE: [4000, 16]}),
    "a shape that no memory holds": ("pruned", {SHAPE: [1 << 40, 16]}),
    "a smaller shape": ("dense", {SHAPE: [39, 16]}),
    "a negative length": ("dense", {SHAPE: [-40, -16]}),
    "a fraction": ("dense", {SHAPE: [40.0, 16]}),
    "a shape in words": ("dense", {SHAPE: "large"}),
    "a part that is not there": ("dense", {PART: 1000}),
    "another part": ("dense", {PART: 0}),
    "a part too early": ("dense", {PART: 5}),
    "fewer bits": ("dense", {"bits": 3}),
    "more bits": ("dense", {"bits": 5}),
    "too many bits": ("dense", {"bits": 99}),
    "bits in words": ("dense", {"bits": "4"}),
    "no mask": ("pruned", {"mask": False}),
    "a mask": ("dense", {"mask": True}),
    "another granularity": ("rows", {"granularity": "group:5"}),
    "no granularity": ("rows", {"granularity": "colour"}),
    "other blocks": ("dense", {"blocks": [9, 10**6]}),
    "a missing block": ("dense", {"blocks": [9]}),
    "blocks that are no list": ("dense", {"blocks": {}}),
    "another checksum": ("dense", {"crc32": 1}),
    "another dtype": ("plain", {"dtype": "float16"}),
    "an unknown dtype": ("plain", {"dtype": "complex64"}),
    "a field of its own": ("plain", {"colour": 3}),
    "a trellis": ("dense", {"trellis": True}),
    "a trellis of rows": ("rows", {"trellis": True}),
    "a trellis of plain values": ("plain", {"trellis": True}),
    "a trellis in words": ("trellis", {"trellis": "yes"}),
    "depth in words": ("deep", {"deep": "yes"}),
    "tied to nothing": ("tied", {SHAPE: "missing"}),
    "tied to itself": ("tied", {SHAPE: "tied"}),
    "a name that is none": ("dense", {NAME: 3}),
    "a name twice": ("dense", {NAME: "large"}),
}


@pytest.mark.parametrize("forged", [False, True], ids=["", "forged"])
@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(good, tmp_path, lie, forged):
    name, change = LIES[lie]
    if forged and lie == "more bits":
        pytest.skip("codes of fewer bits are codes of more bits, too: the same weights")

    def lying(index, header):
        tensor = next(one for one in index["tensors"] if one[NAME] == name)
        for key, value in change.items():
            (tensor if isinstance(key, int) else index["parts"][tensor[PART]])[key] = value

    path = rewritten(good, tmp_path / "lie.safetensors", lying, forged)
    with pytest.raises(UserError, match=r"lie\.safetensors") as error:
        read_packed(path)
    if NAME not in change and lie not in ("a negative length", "a fraction", "another part", "a part too early"):
        assert name in str(error.value)


def test_a_shape_of_nothing_that_no_strides_count(good, tmp_path):
    def lying(index, header):
        tensor = next(one for one in index["tensors"] if one[NAME] == "empty")
        tensor[SHAPE] = [0, (1 << 48) - 1, (1 << 48) - 1]

    with pytest.raises(UserError, match=r"lie.* where a length should be"):
        read_packed(rewritten(good, tmp_path / "lie", lying))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_json(good, tmp_path, value):
    path = rewritten(good, tmp_path / "lie", lambda index, header: index["checkpoint"].update(x=value))
    with pytest.raises(UserError, match=r"lie .*(NaN|Infinity), which is not JSON"):
        read_packed(path)


@pytest.mark.parametrize(
    "tensor",
    [
        Quantized(torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([3e38]), torch.tensor([3e38]), None, "tensor", 4),
        Quantized(
            torch.zeros(2, 3, dtype=torch.uint8), torch.tensor([0.0]), torch.tensor([math.nan]), None, "tensor", 4
        ),
        torch.tensor([1.0, math.nan]),
        torch.tensor([1.0, -math.inf], dtype=torch.bfloat16),
    ],
    ids=["beyond float32", "a step that is none", "no number", "infinity"],
)
def test_weights_that_are_no_numbers(tmp_path, tensor):
    """`pack` refuses such weights; a file may have them all the same."""
    path = tmp_path / "file"
    write_packed([("w", tensor)], CHECKPOINT, FILES, path)
    with pytest.raises(UserError, match=r"file: w is damaged \(its (ranges|values) are not finite\)"):
        read_packed(path)


@pytest.mark.parametrize("lie", ["another shape of as many weights", "names exchanged"])
def test_the_checksum_of_a_part_covers_names_and_shapes(good, tmp_path, lie):
    def lying(index, header):
        first, second = (next(one for one in index["tensors"] if one[NAME] == name) for name in ("large", "large, too"))
        if lie == "names exchanged":
            first[NAME], second[NAME] = second[NAME], first[NAME]
        else:
            first[SHAPE].reverse()

    with pytest.raises(UserError, match="large.* is damaged"):
        read_packed(rewritten(good, tmp_path / "lie", lying, forged=False))


def test_parts_without_tensors_and_tensors_without_parts(good, tmp_path):
    for change in (
        lambda index, header: index["parts"].append(index["parts"][0]),
        lambda index, header: index["parts"].pop(),
        lambda index, header: index.update(parts={}),
        lambda index, header: index["tensors"].append(["bare"]),
        lambda index, header: index["tensors"].append([]),
        lambda index, header: index["tensors"].append({"name": "of old"}),
    ):
        with pytest.raises(UserError, match="lie"):
            read_packed(rewritten(good, tmp_path / "lie", change, forged=False))


def test_the_good_file_written_again_is_read(good, tmp_path):
    """So the lies above fail for what they say, not for how they were written."""
    path = rewritten(good, tmp_path / "same.safetensors", lambda index, header: None)
    assert list(read_packed(path).tensors) == list(read_packed(good).tensors)


def test_the_version_is_the_first_that_has_what_a_file_needs(good, tmp_path):
    def version(path):
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata()["version"]

    shallow = [(name, tensor) for name, tensor in some_tensors() if name != "deep"]
    plain = [(name, tensor) for name, tensor in shallow if not getattr(tensor, "trellis", False)]
    for name, tensors in (("shallow", shallow), ("plain", plain)):
        write_packed(tensors, CHECKPOINT, FILES, tmp_path / name)
    assert [version(tmp_path / name) for name in ("plain", "shallow")] == ["2", "3"]
    assert version(good) == "4"

    def older(index, header):
        header["__metadata__"]["version"] = "3"

    with pytest.raises(UserError, match="metadata and its index differ"):
        read_packed(rewritten(good, tmp_path / "older", older))


def test_blocks_that_are_deeper_than_the_index_says(good, tmp_path):
    def shallow(index, header):
        header["__metadata__"]["version"] = "3"
        for part in index["parts"]:
            part.pop("deep", None)

    with pytest.raises(UserError, match="deep is damaged.*more levels"):
        read_packed(rewritten(good, tmp_path / "lie.safetensors", shallow, True))


def test_indices_that_no_trellis_allows_are_not_written():
    q = some_tensors()[-1][1]
    q.indices[q.mask] ^= 1
    with pytest.raises(ValueError, match="trellis"):
        write_packed([("wrong", q)], {}, {}, None)


def test_a_newer_format_and_other_files(good, tmp_path):
    def newer(index, header):
        header["__metadata__"]["version"] = "5"

    with pytest.raises(UserError, match=r"newer.*format 5.*install"):
        read_packed(rewritten(good, tmp_path / "newer", newer))
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    safetensors.torch.save_file({"w": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text", "empty", "other.safetensors", "missing", "."):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            read_packed(tmp_path / name)


@pytest.mark.parametrize(
    ("bomb", "message"), [("0" * (1 << 28), "longer than it can be"), ([[]] * 300_000, "more values than")]
)
def test_a_bomb_is_refused_before_it_goes_off(good, tmp_path, bomb, message):
    """A small file whose index and frames would unfold to gigabytes, as text or as what is made of it."""

    def lying(index, header):
        index["checkpoint"]["bomb"] = bomb
        index["checkpoint"]["noise"] = random.Random(1).randbytes(12_000).hex()

    path = rewritten(good, tmp_path / "bomb", lying)
    assert path.stat().st_size < 1 << 20
    code = (
        "import re, sys; from pathlib import Path\n"
        "from train_large.compression.packed import read_packed\n"
        "from train_large.errors import UserError\n"
        # Not ru_maxrss, which begins with what the process had that started this one.
        "def peak(): return int(re.search('VmHWM:[^0-9]*([0-9]+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "try: read_packed(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)\n"
        "print((peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    said, grown = done.stdout.strip().splitlines()
    assert message in said
    assert int(grown) < 40  # MB


SECTIONS = {
    "cfg": [],
    "cfg.task": "text",
    "cfg.criterion": [1],
    "cfg.model": "text",
    "cfg.task.init_token": "x",
    "extra_state": [],
    "extra_state.previous_training_time": "long",
    "optimizer_history": 5,
    "optimizer_history.0": 5,
    "compression": 5,
    "compression.0": 5,
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_checkpoint_of_other_kinds_is_refused(good, tmp_path, name):
    def lying(index, header):
        index["checkpoint"] |= {"extra_state": {}, "optimizer_history": [{}], "compression": [{}]}
        index["checkpoint"]["cfg"] |= {"task": {}, "criterion": {}}
        *path, last = name.split(".")
        inner = index["checkpoint"]
        for key in path:
            inner = inner[int(key) if key.isdecimal() else key]
        inner[int(last) if last.isdecimal() else last] = SECTIONS[name]

    with pytest.raises(UserError, match="lie cannot be read"):
        read_packed(rewritten(good, tmp_path / "lie", lying))


def test_plain_values_are_no_more_than_their_bytes_can_hold(tmp_path):
    """A number of 8 bytes is in 8 blocks, each of 512 symbols a byte at most."""
    write_packed([("w", torch.zeros(1 << 16, dtype=torch.int64))], CHECKPOINT, FILES, tmp_path / "good")

    def lying(index, header):
        length = sum(index["parts"][0]["blocks"])
        index["tensors"][0][SHAPE] = [512 * length]
        index["parts"][0]["blocks"] = [length - 8 * (512 * length // CHUNK + 1) + 1] + [1] * (
            8 * -(-512 * length // CHUNK) - 1
        )

    with pytest.raises(UserError, match="more weights than|do not fit its shape"):
        read_packed(rewritten(tmp_path / "good", tmp_path / "lie", lying))


def test_mutations_behind_right_checksums_are_errors_or_are_read(good, tmp_path):
    """What a checksum would not tell, for whoever makes one: of the index and of the blocks."""
    rng = random.Random(0)
    others = [None, True, -1, 0, 1, 3, 7.5, 1 << 20, 1 << 47, 1 << 60, "", "w", [], {}, [1]]

    def leaves(value, into):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            into.append((value, key))
            if key != "files":
                leaves(inner, into)
        return into

    def lying(index, header):
        places = [
            place for name in ("tensors", "parts") for place in leaves(index[name], []) if place[0] is not index[name]
        ]
        holder, key = rng.choice(places)
        holder[key] = rng.choice(others)

    def bent(weights):
        changed = bytearray(weights)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)

    refused = 0
    for number in range(600):
        path = rewritten(
            good,
            tmp_path / "mutated",
            lying if number % 2 else lambda *_: None,
            bent=(lambda weights: weights) if number % 2 else bent,
        )
        with contextlib.suppress(UserError):
            read_packed(path)
            continue
        refused += 1
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_packed(path)
    assert refused > 300


def test_2000_random_mutations_are_errors_or_change_nothing(good, tmp_path):
    """Bits, bytes, cuts, and pieces moved: never a wrong tensor, and never another exception."""
    data = good.read_bytes()
    expected = read_packed(good)
    rng = random.Random(0)
    path = tmp_path / "mutated"
    harmless = unnamed = 0
    for _ in range(2000):
        changed = bytearray(data)
        kind, where = rng.randrange(5), rng.randrange(len(data))
        if kind == 0:
            changed[where] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[where] = rng.randrange(256)
        elif kind == 2:
            del changed[where:]
        elif kind == 3:
            del changed[where : where + rng.randrange(1, 9)]
        else:
            changed[where : where + 4] = rng.randbytes(4)
        path.write_bytes(changed)
        try:
            read = read_packed(path)
        except UserError as error:
            unnamed += str(path) not in str(error)
            continue
        harmless += 1  # the byte that was there, or white space for white space
        assert read.files == expected.files
        assert read.checkpoint == expected.checkpoint
        assert all(same(tensor, expected.tensors[name]) for name, tensor in read.tensors.items())
    assert harmless < 40
    assert unnamed == 0


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_single_bit_is_covered(good, data):
    content = bytearray(good.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = good.with_name("flipped")
    path.write_bytes(content)
    with pytest.raises(UserError, match="flipped"):
        read_packed(path)


@pytest.mark.parametrize("part", ["weights", "index"])
def test_damage_names_the_file_and_the_tensor(good, tmp_path, part):
    data = bytearray(good.read_bytes())
    index, weights = read_index(good)
    start = len(data) - len(weights)
    place = start + index.parts[0].blocks[0] + 20 if part == "weights" else start - 50
    data[place] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: large is damaged" if part == "weights" else r"index is damaged"):
        read_packed(tmp_path / "damaged")


def test_what_the_format_has_no_place_for(tmp_path):
    with pytest.raises(UserError, match="odd is of complex64"):
        write_packed([("odd", torch.zeros(3, dtype=torch.complex64))], {}, {}, tmp_path / "file")
    with pytest.raises(UserError, match="keys that are not text"):
        write_packed([], {"cfg": {1: 2}}, {}, tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(good):
    with pytest.raises(UserError, match="could not be written"):
        write_packed(some_tensors(), CHECKPOINT, FILES, Path("/dev/full/file"))
    assert isinstance(read_packed(good), PackedModel)


def test_the_length_of_a_chunk_is_part_of_the_format():
    assert CHUNK == 1 << 22
