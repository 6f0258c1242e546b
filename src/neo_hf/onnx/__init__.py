"""NEO as one ONNX graph: export, and greedy decoding on ONNX Runtime (extra `onnx`)."""

try:
    from .export import DTYPES, export_graphs, export_onnx
    from .runtime import OnnxCache, OnnxNeo
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"neo_hf.onnx needs {error.name}: install the extra onnx.", name=error.name) from error

__all__ = ["DTYPES", "OnnxCache", "OnnxNeo", "export_graphs", "export_onnx"]
