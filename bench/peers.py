"""Other libraries' files of quantized weights, for bench/file_size.py: each one written and read back by its library.

A setting is a function (tensors, path) -> tensors read back. The tensors of a model stand in linear layers and
embeddings under their own names; a forward pass is not needed, since only the file counts. Where a group of weights
must divide a row and does not (the demo's smallest models), the library's own per-row scheme takes that tensor, or
none. Biases and norms stay in the floating type of the model: no library here quantizes them.
"""

from __future__ import annotations

import io
import lzma
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import torch
import zstandard
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from optimum import quanto
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn
from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig
from torchao.prototype.quantization.int4 import Int4OpaqueTensor, PrototypeInt4WeightOnlyConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    NF4Tensor,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)

Tensors = Mapping[str, Tensor]
Write = Callable[[Tensors, Path], Tensors]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUPS = (32, 128)


@dataclass(frozen=True)
class Setting:
    """One way to write a model.

    embeddings: whether they are quantized. "as linear layers" where the peer cannot do it itself and is helped to.
    """

    peer: str
    version: str
    name: str
    embeddings: str
    write: Write


def settings() -> Iterator[Setting]:
    """All peers in all settings."""
    for peer, package, embeddings, found in (
        ("safetensors", "safetensors", "no", _plain_settings()),
        ("torchao", "torchao", "no", [("int8 row, fp32", _torchao_default)]),
        ("torchao", "torchao", "yes", _torchao_settings()),
        ("optimum-quanto", "optimum-quanto", "no", _quanto_settings(nn.Embedding)),
        ("optimum-quanto", "optimum-quanto", "as linear layers", _quanto_settings(nn.Linear)),
        ("compressed-tensors", "compressed-tensors", "yes", _compressed_tensors_settings()),
        ("onnxruntime", "onnxruntime", "yes", _onnxruntime_settings()),
        ("onnxruntime", "onnxruntime", "as linear layers", _onnxruntime_block_settings()),
        ("gguf", "gguf", "yes", _gguf_settings()),
        ("int8 + archiver", "", "yes", _archive_settings()),
    ):
        for name, write in found:
            yield Setting(peer, version(package) if package else ARCHIVERS_VERSION, name, embeddings, write)


def is_embedding(name: str, tensor: Tensor) -> bool:
    """Whether a matrix is looked up by rows: by its name, in BERT and in fairseq."""
    return tensor.dim() == 2 and "embed" in name


class Weights(nn.Module):
    """Matrices in linear layers and embeddings (with nn.Linear, in linear layers all), the rest as plain parameters."""

    def __init__(self, tensors: Tensors, embedding: type[nn.Module] = nn.Embedding):
        super().__init__()
        # Matrices first: they say what module it is, to which a bias may have come before by its name.
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].dim() != 2):
            *parents, owner, leaf = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            if not hasattr(module, owner):
                if tensor.dim() != 2:
                    new: nn.Module = nn.Module()
                elif is_embedding(name, tensor) and embedding is nn.Embedding:
                    new = nn.Embedding(*tensor.shape)
                else:
                    new = nn.Linear(*tensor.T.shape, bias=f"{name.removesuffix('weight')}bias" in tensors)
                module.add_module(owner, new)
            setattr(getattr(module, owner), leaf, nn.Parameter(tensor.clone(), requires_grad=False))


def _plain_settings() -> Iterator[tuple[str, Write]]:
    for name, dtype in FLOATS.items():

        def write(tensors: Tensors, path: Path, dtype: torch.dtype = dtype) -> Tensors:
            save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
            return load_file(path)

        yield name, write


# torchao: what its safetensors support can save; its int4 for CPUs and NF4 go through torch.save, as its docs have it.


def _torchao_settings() -> Iterator[tuple[str, Write]]:
    half, row = torch.float16, Int8WeightOnlyConfig()
    yield "int8 tensor, fp16", _torchao(half, Int8WeightOnlyConfig(granularity=PerTensor()))
    yield "int8 row, fp16", _torchao(half, row)
    yield "float8 row, fp16", _torchao(half, Float8WeightOnlyConfig(granularity=PerRow()))
    for group in GROUPS:
        yield f"int8 group {group}, fp16", _torchao(half, Int8WeightOnlyConfig(granularity=PerGroup(group)), row)
        for bits in (6, 4):
            intx = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(group), MappingType.ASYMMETRIC)
            yield f"intx {bits} bits group {group}, fp16", _torchao(half, intx, row)
        int4 = PrototypeInt4WeightOnlyConfig(group)
        yield f"int4 group {group}, fp16", _torchao(half, int4, row, in_safetensors=False)
    finer = NF4WeightOnlyConfig()
    finer.scaler_block_size = 2
    yield "nf4, fp16", _torchao(half, NF4WeightOnlyConfig(), finer, row, in_safetensors=False)


def _torchao_default(tensors: Tensors, path: Path) -> Tensors:
    """quantize_ as it comes: linear layers only, in the model's own float32."""
    return _torchao(torch.float32, Int8WeightOnlyConfig(), kinds=(nn.Linear,))(tensors, path)


def _torchao(dtype: torch.dtype, *configs, in_safetensors: bool = True, kinds=(nn.Linear, nn.Embedding)) -> Write:
    """Every weight by the first of `configs` that can have it."""

    def write(tensors: Tensors, path: Path) -> Tensors:
        model = Weights(tensors).to(dtype)
        layers = [module for module in model.modules() if isinstance(module, kinds)]
        chosen = {module: next(c for c in configs if _fits(c, *module.weight.shape)) for module in layers}
        for config in configs:
            quantize_(model, config, filter_fn=lambda module, _, config=config: chosen.get(module) is config)
        if not in_safetensors:
            torch.save(model.state_dict(), path)
            return _dequantized(torch.load(path, weights_only=True))
        flat, metadata = flatten_tensor_state_dict(model.state_dict())
        save_file(flat, path, metadata)
        with safe_open(path, framework="pt") as file:
            return _dequantized(unflatten_tensor_state_dict(load_file(path), file.metadata())[0])

    return write


def _fits(config, rows: int, columns: int) -> bool:
    """What torchao asks of a matrix for this configuration."""
    if isinstance(config, NF4WeightOnlyConfig):
        return rows * columns % (config.block_size * config.scaler_block_size) == 0
    if isinstance(config, PrototypeInt4WeightOnlyConfig):
        return rows % 16 == 0 and columns % config.group_size == 0
    group = getattr(config, "granularity", None)
    return not isinstance(group, PerGroup) or columns % group.group_size == 0


def _dequantized(state: Tensors) -> Tensors:
    """In floating point; the packed int4 of CPUs has no way back but a product with the identity."""
    result = {}
    for name, tensor in state.items():
        if isinstance(tensor, Int4OpaqueTensor):
            result[name] = nn.functional.linear(torch.eye(tensor.shape[1], dtype=tensor.dtype), tensor).T
        elif isinstance(tensor, NF4Tensor):
            result[name] = tensor.get_original_weight()
        else:
            result[name] = tensor if type(tensor) is Tensor else tensor.dequantize()
    return result


# optimum-quanto: no quantized embedding, so they stay in floating point, or are passed off as linear layers.


def _quanto_settings(embedding: type[nn.Module]) -> Iterator[tuple[str, Write]]:
    if embedding is nn.Embedding:  # as it comes
        yield "qint8, fp32", _quanto(quanto.qint8, None, torch.float32, embedding)
        yield "qint4, fp32", _quanto(quanto.qint4, None, torch.float32, embedding)
    for qtype in (quanto.qint8, quanto.qfloat8, quanto.qint4, quanto.qint2):
        yield f"{qtype.name}, fp16", _quanto(qtype, None, torch.float16, embedding)
        if qtype.bits < 8:
            yield f"{qtype.name} hqq, fp16", _quanto(qtype, quanto.HqqOptimizer(), torch.float16, embedding)


def _quanto(qtype, optimizer, dtype: torch.dtype, embedding: type[nn.Module]) -> Write:
    def write(tensors: Tensors, path: Path) -> Tensors:
        model = Weights(tensors, embedding).to(dtype)
        quanto.quantize(model, weights=qtype, optimizer=optimizer)
        quanto.freeze(model)
        save_file(model.state_dict(), path)
        again = Weights(tensors, embedding).to(dtype)
        quanto.requantize(again, load_file(path), quanto.quantization_map(model))
        return {
            name: parameter.dequantize() if isinstance(parameter, quanto.QTensor) else parameter
            for name, parameter in again.named_parameters()
        }

    return write


# compressed-tensors: packed integers of 2 to 8 bits; it has no observers, so scales are from its own min-max formula.


def _compressed_tensors_settings() -> Iterator[tuple[str, Write]]:
    for bits in (8, 6, 5, 4, 3, 2):
        for group in (None, *GROUPS):
            for symmetric in (True, False):
                name = f"int{bits} {f'group {group}' if group else 'row'} {'symmetric' if symmetric else 'asymmetric'}"
                yield f"{name}, fp16", _compressed_tensors(bits, group, symmetric, torch.float16)


def _compressed_tensors(bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> Write:
    by_row = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=symmetric)
    in_groups = (
        QuantizationArgs(num_bits=bits, strategy="group", group_size=group, symmetric=symmetric) if group else by_row
    )

    def compressor_for(model: nn.Module) -> ModelCompressor:
        groups: dict[str, list[str]] = {"groups": [], "rows": []}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                rows, columns = module.weight.shape
                # Version 0.20.0 cannot read back 4-bit zero points of groups in a matrix of 8 rows or less.
                groups["groups" if group and columns % group == 0 and rows > 8 else "rows"].append(name)
        arguments = {"groups": in_groups, "rows": by_row}
        schemes = {
            key: QuantizationScheme(targets=names, weights=arguments[key]) for key, names in groups.items() if names
        }
        apply_quantization_config(model, QuantizationConfig(config_groups=schemes, format="pack-quantized"))
        return ModelCompressor.from_pretrained_model(model, "pack-quantized")

    def write(tensors: Tensors, path: Path) -> Tensors:
        model = Weights(tensors).to(dtype)
        compressor = compressor_for(model)
        for module in model.modules():
            if is_module_quantized(module):
                blocks = module.weight.reshape(*module.weight_scale.shape, -1)
                scale, zero = calculate_qparams(*blocks.aminmax(dim=-1), module.quantization_scheme.weights)
                module.weight_scale.data = scale
                if not symmetric:
                    module.weight_zero_point.data = zero
        compressor.compress_model(model)
        save_file(model.state_dict(), path)
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
        model.load_state_dict(load_file(path))
        compressor.decompress_model(model)
        return {name: tensor for name, tensor in model.state_dict().items() if name in tensors}

    return write


# onnxruntime: a graph with one node per weight. Fed with unit vectors and all ids, it gives back what it computes with.


def _onnxruntime_settings() -> Iterator[tuple[str, Write]]:
    for kind in (QuantType.QInt8, QuantType.QUInt8):
        for per_channel in (True, False):
            name = f"dynamic {kind.name[1:].lower()} {'channel' if per_channel else 'tensor'}, fp32"
            yield name, _onnxruntime_dynamic(kind, per_channel)
    for group in GROUPS:
        yield f"4 bits group {group}, fp16", _onnxruntime_blocks(4, group, is_embedding)


def _onnxruntime_block_settings() -> Iterator[tuple[str, Write]]:
    for bits in (8, 2):
        for group in GROUPS:
            yield f"{bits} bits group {group}, fp16", _onnxruntime_blocks(bits, group, lambda name, tensor: False)


def _onnxruntime_dynamic(weight_type: QuantType, per_channel: bool) -> Write:
    def write(tensors: Tensors, path: Path) -> Tensors:
        full = path.with_suffix(".full")
        onnx.save(_onnx_model(tensors, torch.float32, is_embedding), full)
        quantize_dynamic(full, path, weight_type=weight_type, per_channel=per_channel)
        full.unlink()
        return _run(tensors, path, torch.float32, is_embedding)

    return write


def _onnxruntime_blocks(bits: int, group: int, looked_up: Callable[[str, Tensor], bool]) -> Write:
    """By MatMulNBitsQuantizer, which takes embeddings (`looked_up`) in 4 bits only."""

    def write(tensors: Tensors, path: Path) -> Tensors:
        model = _onnx_model(tensors, torch.float16, looked_up)
        quantizer = MatMulNBitsQuantizer(model, bits, group, op_types_to_quantize=("MatMul", "Gather"))
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
        return _run(tensors, path, torch.float16, looked_up)

    return write


def _onnx_model(tensors: Tensors, dtype: torch.dtype, looked_up: Callable[[str, Tensor], bool]) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.FLOAT
    nodes, initializers, inputs, outputs = [], [], {}, []
    for i, (name, tensor) in enumerate(tensors.items()):
        weight, out, shape = f"w{i}", f"out{i}", list(tensor.shape)  # short names: they come again in every node
        if looked_up(name, tensor):
            ids, shape = f"ids.{len(tensor)}", [None, tensor.shape[1]]
            inputs[ids] = helper.make_tensor_value_info(ids, TensorProto.INT64, [None])
            nodes.append(helper.make_node("Gather", [weight, ids], [out], name=out))
        elif tensor.dim() == 2:
            units, shape = f"units.{tensor.shape[1]}", [None, len(tensor)]
            inputs[units] = helper.make_tensor_value_info(units, kind, [None, tensor.shape[1]])
            nodes.append(helper.make_node("MatMul", [units, weight], [out], name=out))
            tensor = tensor.T
        else:
            nodes.append(helper.make_node("Identity", [weight], [out], name=out))
        initializers.append(numpy_helper.from_array(tensor.to(dtype).contiguous().numpy(), weight))
        outputs.append(helper.make_tensor_value_info(out, kind, shape))
    graph = helper.make_graph(nodes, "weights", list(inputs.values()), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _run(tensors: Tensors, path: Path, dtype: torch.dtype, looked_up: Callable[[str, Tensor], bool]) -> Tensors:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {}
    for value in session.get_inputs():
        kind, size = value.name.split(".")
        feed[value.name] = (torch.arange(int(size)) if kind == "ids" else torch.eye(int(size), dtype=dtype)).numpy()
    result = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        found = torch.from_numpy(session.run([f"out{i}"], feed)[0])
        result[name] = found.T if tensor.dim() == 2 and not looked_up(name, tensor) else found
    return result


# gguf: every type that the package can quantize to; matrices whose rows are no whole blocks are F16, vectors F32.


def _gguf_settings() -> Iterator[tuple[str, Write]]:
    for name in ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0"):
        yield name, _gguf(gguf.GGMLQuantizationType[name])


def _gguf(kind: gguf.GGMLQuantizationType) -> Write:
    def write(tensors: Tensors, path: Path) -> Tensors:
        writer = gguf.GGUFWriter(path, "bert")
        for name, tensor in tensors.items():
            chosen = kind if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16
            chosen = chosen if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        return {
            name: torch.from_numpy(np.array(gguf.dequantize(found[name].data, found[name].tensor_type))).view(
                tensor.shape
            )
            for name, tensor in tensors.items()
        }

    return write


# Plain integers, one byte each, in an archive: the usual 8-bit scale and zero point, by tensor or by row.


def _archive_settings() -> Iterator[tuple[str, Write]]:
    for archiver in ("zip", "zstd", "xz"):
        for bits in (8, 6, 4) if archiver == "zip" else (8,):
            for rows in (False, True):
                yield f"int{bits} {'row' if rows else 'tensor'}, {ARCHIVERS[archiver]}", _archive(archiver, bits, rows)


ARCHIVERS_VERSION = f"Python {platform.python_version()}, zstandard {version('zstandard')}"
ARCHIVERS = {"zip": "zip -9", "zstd": "zstd -19", "xz": "xz -9e"}


def _archive(archiver: str, bits: int, rows: bool) -> Write:
    def write(tensors: Tensors, path: Path) -> Tensors:
        flat = {}
        for name, tensor in tensors.items():
            blocks = tensor.reshape(len(tensor) if rows and tensor.dim() == 2 else 1, -1)
            low, high = blocks.aminmax(dim=1, keepdim=True)
            scale = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
            scale[scale == 0] = 1
            zero = (-low.clamp(max=0) / scale).round()
            codes = ((blocks / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)
            flat.update({name: codes.view(tensor.shape), f"{name}.scale": scale, f"{name}.zero": zero.to(torch.uint8)})
        path.write_bytes(_compress(archiver, save(flat)))
        flat = load(_decompress(archiver, path.read_bytes()))
        result = {}
        for name, tensor in tensors.items():
            scale, zero = flat[f"{name}.scale"], flat[f"{name}.zero"]
            codes = flat[name].reshape(len(scale), -1)
            result[name] = ((codes.float() - zero.float()) * scale).view(tensor.shape)
        return result

    return write


def _compress(archiver: str, content: bytes) -> bytes:
    if archiver == "zstd":
        return zstandard.ZstdCompressor(level=19).compress(content)
    if archiver == "xz":
        return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("model.safetensors", content)
    return file.getvalue()


def _decompress(archiver: str, content: bytes) -> bytes:
    if archiver == "zstd":
        return zstandard.ZstdDecompressor().decompress(content)
    if archiver == "xz":
        return lzma.decompress(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("model.safetensors")
