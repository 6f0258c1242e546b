"""NEO as one ONNX graph: export, and greedy decoding on ONNX Runtime. Needs the extra `onnx`."""

from .export import DTYPES, export_graphs, export_onnx
from .runtime import OnnxCache, OnnxNeo

__all__ = ["DTYPES", "OnnxCache", "OnnxNeo", "export_graphs", "export_onnx"]
