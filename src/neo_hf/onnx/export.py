"""
A NEO to one ONNX graph, which does prefill and decoding.

Inputs, with B rows, L new tokens, S = past + L keys, P patches and N images (or video frames):
    input_ids (B, L), attention_mask (B, S) and position_ids (3, B, L) int64, as in `NeoForConditionalGeneration`;
    pixel_values (P, channels * patch_size^2) float32 and image_grid_hw (N, 2) int64, both empty if there is no image;
    logits_to_keep (K,) int64: the tokens whose logits are computed, -1 being the last;
    past_key_values.N.key (B, K, past, 2d) and past_key_values.N.value (B, K, past, d) of each layer.
Outputs: logits (B, K, vocabulary) float32, and present.N.key and present.N.value (B, K, S, ...).
"""

from ..configuration_neo import NeoConfig
from ..conversion.target import new_folder, write_config
from ..loading import load_model_and_processor
from ..modeling_neo import NeoForConditionalGeneration
from .graph import FILE_SUFFIXES, cache_names, file_name

import copy
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Weights beyond this many bytes go to a file of their own beside the graph: a protobuf holds 2 GB.
MAX_EMBEDDED_BYTES = 2**31 - 2**27
# Columns of a weight that share a scale. What Transformers.js' conversions use, and a divisor of every width of NEO.
BLOCK_SIZE = 32
# Products with quantized weights round activations to 8 bits too: some 80 times as fast in 8 bits on CPUs.
INT8_ACTIVATIONS = 4  # what ONNX Runtime calls it
ATTENTION = "neo_onnx"


class Precision(NamedTuple):
    dtype: torch.dtype  # of weights that are not quantized, activations and cache
    bits: int | None = None  # of the weights of the decoder's and the head's matrix products


DTYPES = {
    "fp32": Precision(torch.float32),
    "fp16": Precision(torch.float16),
    "int8": Precision(torch.float32, bits=8),
    "q4": Precision(torch.float32, bits=4),
    "q4f16": Precision(torch.float16, bits=4),
}
assert DTYPES.keys() == FILE_SUFFIXES.keys()


def attend_in_groups(module, query, key, value, attention_mask: torch.Tensor, scaling: float, **kwargs):
    """
    query (B, A, L, D), key (B, K, S, D), value (B, K, S, V), attention_mask (B, 1, L, S), True where seen ->
    (B, L, A, V), `None`. Keys and values are not repeated for the queries that share them.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # (B, K, A / K, L, D)
    groups = grouped.shape[2]
    scores = ((grouped * scaling).flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, (groups, -1))
    # Finite: padding that sees no key would give NaN and leave NaN in the cache.
    scores = scores.masked_fill(~attention_mask[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights.flatten(2, 3) @ value).unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend_in_groups)


class OnnxGraph(nn.Module):
    """The model with the inputs and outputs of the graph (see above)."""

    def __init__(self, model: NeoForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids, attention_mask, position_ids, pixel_values, image_grid_hw, logits_to_keep, past_key_values
    ):
        temporal = position_ids[0]
        # T never decreases along a row, and only the tokens of an image share it: a token sees those new tokens whose
        # T does not exceed its own, and all cached ones.
        seen = F.pad(temporal[:, None] <= temporal[..., None], (past_key_values[0][0].shape[2], 0), value=True)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=(seen & (attention_mask != 0)[:, None])[:, None],
            position_ids=position_ids,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            cache=(cache := DynamicCache(past_key_values)),
            logits_to_keep=logits_to_keep,
            use_cache=True,
        )
        return outputs.logits.float(), [(layer.keys, layer.values) for layer in cache.layers]


# Operators that ONNX does not have, or that fail on the empty tensors of a step without images, as reductions do in
# ONNX Runtime 1.30.


def searchsorted(sorted_sequence, self, *, out_int32=False, right=False, side=None, sorter=None):
    """`torch.searchsorted(..., right=True)`: how many entries do not exceed each value, as a product with ones."""
    last = op.Constant(value_ints=[-1])
    is_up_to = op.LessOrEqual(sorted_sequence, op.Unsqueeze(self, last))
    ones = op.Unsqueeze(op.Equal(sorted_sequence, sorted_sequence), last)
    count = op.MatMul(*(op.Cast(x, to=onnx.TensorProto.FLOAT) for x in (is_up_to, ones)))
    return op.Squeeze(op.Cast(count, to=onnx.TensorProto.INT64), last)


def product_of_two(self, dim: int, keepdim: bool = False, *, dtype=None):
    """`grid.prod(-1)` of rows and columns."""
    rows, columns = (op.Gather(self, op.Constant(value_int=i), axis=-1) for i in range(2))
    return op.Mul(rows, columns)


TRANSLATIONS: dict[Callable, Callable] = {
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    torch.ops.aten.prod.dim_int: product_of_two,
}


def export_onnx(
    name_or_path: str | Path, out: str | Path, *, dtypes: Iterable[str] = ("fp32",), force: bool = False
) -> None:
    """
    Write a folder that `OnnxNeo` reads, laid out as Optimum and Transformers.js expect: `onnx/model.onnx` and its
    likes (see `DTYPES`), configuration and processor.

    Args:
        name_or_path: Hub id, folder in Hub format or folder of a raw checkpoint.
        out: Folder to create.
        dtypes: Precisions, a file each: "fp32", "fp16", "int8", "q4" and "q4f16".
        force: Replace `out` if it exists.

    Raises:
        ValueError: a precision is unknown, the model cannot be loaded, or `out` exists.
    """
    dtypes = list(dtypes)
    check_dtypes(dtypes)
    sources = [Path(name_or_path)] if Path(name_or_path).is_dir() else []
    with new_folder(out, force, sources) as folder:
        model, processor = load_model_and_processor(name_or_path, dtype=torch.float32)
        export_graphs(model, folder, dtypes)
        processor.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_config(folder, model.config)


def check_dtypes(dtypes: Collection[str]):
    """Raise a ValueError unless these are names of precisions, at least one."""
    if not dtypes:
        raise ValueError(f"dtypes must name at least one of {', '.join(DTYPES)}, got none.")
    for dtype in dtypes:
        file_name(dtype)


def export_graphs(model: NeoForConditionalGeneration, folder: str | Path, dtypes: Collection[str] = ("fp32",)) -> None:
    """
    Write a model as graphs, `folder/onnx/model*.onnx`. Weights of more than 2 GB go to `FILE_data` beside a graph.

    Args:
        model: not modified.
        folder: Folder to write into.
        dtypes: Precisions, keys of `DTYPES`. The weights of "int8", "q4" and "q4f16" are quantized in symmetric blocks
            of 32 (the operator MatMulNBits of ONNX Runtime); token and patch embedding are not.
    """
    check_dtypes(dtypes)
    files = {DTYPES[dtype]: Path(folder) / file_name(dtype) for dtype in dtypes}
    (Path(folder) / "onnx").mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(files), desc="ONNX") as progress, tempfile.TemporaryDirectory(dir=folder) as temporary:
        for dtype in dict.fromkeys(precision.dtype for precision in files):
            graph = trace(model, dtype)
            fold_transposes(graph, shared=False)
            if Precision(dtype) in files:
                save(graph, files[Precision(dtype)])
                progress.update()
            quantized = {x.bits: file for x, file in files.items() if x.dtype == dtype and x.bits}
            if quantized:
                fold_transposes(graph, shared=True)
                source = Path(temporary) / "model.onnx"
                save(graph, source)
            for bits, file in quantized.items():
                save(quantize(source, bits), file)
                progress.update()


def trace(model: NeoForConditionalGeneration, dtype: torch.dtype) -> ir.Model:
    """The graph of a model in float32 or float16."""
    model = copy.deepcopy(model).to("cpu", dtype)
    model.get_decoder().set_attn_implementation(ATTENTION)
    text = model.config.text_config
    layers = text.num_hidden_layers
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            OnnxGraph(model).eval(),
            kwargs=example_inputs(model.config, dtype),
            dynamo=True,
            dynamic_shapes={
                "input_ids": {0: dynamic, 1: dynamic},
                "attention_mask": {0: dynamic, 1: dynamic},
                "position_ids": {1: dynamic, 2: dynamic},
                "pixel_values": {0: dynamic},
                "image_grid_hw": {0: dynamic},
                "logits_to_keep": {0: dynamic},
                "past_key_values": [({0: dynamic, 2: dynamic},) * 2] * layers,
            },
            input_names=[*INPUT_DIMENSIONS, *cache_names("past_key_values", layers)],
            output_names=["logits", *cache_names("present", layers)],
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert program is not None  # as without dynamo
    graph = program.model
    name_dimensions(graph)
    for node in graph.graph:
        node.metadata_props.clear()  # where each node comes from in the source code, a third of a small file
    return graph


INPUT_DIMENSIONS = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": (3, "batch_size", "sequence_length"),
    "pixel_values": ("num_patches", None),
    "image_grid_hw": ("num_images", 2),
    "logits_to_keep": ("num_logits",),
}


def name_dimensions(graph: ir.Model):
    """Name the dynamic dimensions of inputs and outputs."""
    names = INPUT_DIMENSIONS | {"logits": ("batch_size", "num_logits", None)}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        length = ("past" if value.name.startswith("past") else "total") + "_sequence_length"
        dimensions = names.get(value.name, ("batch_size", None, length, None))
        value.shape = ir.Shape(
            [size if name is None else name for name, size in zip(dimensions, value.shape, strict=True)]
        )


def example_inputs(config: NeoConfig, dtype: torch.dtype) -> dict:
    """Inputs to trace the graph with. All dynamic sizes differ and exceed 1, so that none is taken for a constant."""
    text, vision = config.text_config, config.vision_config
    rows, past, merge = 2, 5, vision.spatial_merge_size
    grid = merge * torch.tensor([[1, 2], [2, 1], [3, 3]])
    num_patches = int(grid.prod(-1).sum())
    input_ids = torch.zeros(rows, 11, dtype=torch.long)
    if config.image_token_id is not None:
        input_ids.flatten()[: num_patches // merge**2] = config.image_token_id
    shape = (rows, text.num_key_value_heads, past)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones(rows, past + 11, dtype=torch.long),
        "position_ids": torch.arange(11).expand(3, rows, 11).contiguous(),
        "pixel_values": torch.zeros(num_patches, vision.num_channels * vision.patch_size**2),
        "image_grid_hw": grid,
        "logits_to_keep": torch.arange(7),
        "past_key_values": [
            (torch.zeros(*shape, text.qk_head_dim, dtype=dtype), torch.zeros(*shape, text.head_dim, dtype=dtype))
            for _ in range(text.num_hidden_layers)
        ],
    }


def fold_transposes(graph: ir.Model, shared: bool):
    """
    Store weights transposed where the graph transposes them, so that they are the constants of matrix products.

    Args:
        shared: whether also weights that are used elsewhere, which are then stored twice: a tied head.
    """
    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or (len(weight.uses()) > 1 and not shared):
            continue
        transposed = ir.Value(
            name=f"{weight.name}.T",
            const_value=ir.tensor(weight.const_value.numpy().transpose(*node.attributes["perm"].as_ints()).copy()),
        )
        transposed.shape, transposed.dtype = transposed.const_value.shape, transposed.const_value.dtype
        transposed.const_value.name = transposed.name
        graph.graph.register_initializer(transposed)
        node.outputs[0].replace_all_uses_with(transposed)
        graph.graph.remove(node, safe=True)
        if not weight.uses():
            del graph.graph.initializers[weight.name]


def quantize(file: Path, bits: int) -> ir.Model:
    """The graph in a file, the constants of its matrix products quantized."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)  # the import sends everything that any library logs to standard error
    root.handlers = handlers
    quantizer = MatMulNBitsQuantizer(
        str(file), bits=bits, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
    )
    quantizer.process()
    return ir.from_proto(quantizer.model.model)


def save(graph: ir.Model, file: Path):
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    ir.save(graph, file, external_data=f"{file.name}_data" if size > MAX_EMBEDDED_BYTES else None)
