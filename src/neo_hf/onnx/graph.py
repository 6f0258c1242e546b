"""The interface of the graph: names of its inputs and outputs, and of the files that hold it."""

# Name of a precision, as in Transformers.js -> suffix of its file.
FILE_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4", "q4f16": "_q4f16"}


def file_name(dtype: str) -> str:
    """
    Path of a graph in its repository, as Optimum and Transformers.js look for it.

    Raises:
        ValueError: the precision is unknown.
    """
    if dtype not in FILE_SUFFIXES:
        raise ValueError(f"dtype must be one of {', '.join(FILE_SUFFIXES)}, got {dtype!r}.")
    return f"onnx/model{FILE_SUFFIXES[dtype]}.onnx"


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Names of the cached keys and values, layer by layer; `prefix` is `past_key_values` or `present`."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
