"""The pre-Buffer, with the patch embedding, as a checkpoint of its own (NEO paper, section 3.2)."""

from ..configuration_neo import NeoConfig
from ..raw import QWEN3_FIELDS
from .source import display_name, match_names, raise_all, read_config, resolve
from .target import new_folder, write_weights
from .weights import open_checkpoint, sha256

import re
from pathlib import Path

ARCHITECTURE = "NeoPreBuffer"
# Fields of Qwen3 in which a pre-Buffer and an LLM may differ. In all others, the layers of a model are alike.
FREE_FIELDS = {"vocab_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache"}
FREE_FIELDS |= {"attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"}

CARD = """---
library_name: transformers
tags:
- neo
- pre-buffer
---

# {name}

The patch embedding and the pre-Buffer ({depth} layers of width {width}) of a NEO. This is not a model by itself:
together with a Qwen3 LLM of the same width, it initialises another NEO.

```bash
neo-hf pre-buffer graft {name} QWEN3 OUT
```

Extracted from {source} (SHA-256):

{hashes}
"""


def is_in_pre_buffer(name: str, depth: int) -> bool:
    """Whether a tensor, by the model's own name, belongs to the patch embedding or to the first `depth` layers."""
    layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    return name.startswith("model.patch_embed.") or (layer is not None and int(layer[1]) < depth)


def extract_pre_buffer(neo: str | Path, out: str | Path, *, force: bool = False) -> None:
    """
    Extract the patch embedding and the pre-Buffer of a NEO, to initialise another one from them.

    Args:
        neo: Folder or Hub id, raw or in Hub format.
        out: Folder to create: `model.safetensors`, `config.json` (a `NeoConfig` whose only layers are those of the
            pre-Buffer) and a card.
        force: Replace `out` if it exists.

    Raises:
        ValueError: The depth of the pre-Buffer is unknown or 0.
    """
    source = resolve(neo)
    config = read_config(source)
    depth = config.text_config.num_pre_buffer_layers
    if not depth:
        raise ValueError(f"The pre-Buffer of {neo} has {'unknown depth' if depth is None else 'no layers'}.")
    checkpoint = open_checkpoint(source)
    source_names = match_names(checkpoint, config)
    infos = {name: checkpoint.infos[old] for name, old in source_names.items() if is_in_pre_buffer(name, depth)}
    config.text_config.num_hidden_layers = depth
    config.architectures = [ARCHITECTURE]
    config.auto_map = None
    config.dtype = next(iter(infos.values())).dtype
    with new_folder(out, force, [source]) as folder:
        write_weights(folder, infos, lambda name: checkpoint.read(source_names[name]), "5GB")
        card = CARD.format(
            name=Path(out).name,
            depth=depth,
            width=config.text_config.hidden_size,
            source=display_name(neo),
            hashes="\n".join(f"- `{file.name}`: `{sha256(file)}`" for file in checkpoint.files),
        )
        (folder / "README.md").write_text(card)
        config.to_json_file(folder / "config.json")


def adopt_pre_buffer(config: NeoConfig, pre_buffer: str | Path):
    """
    Give the configuration of a NEO the spatial rotary parameters and the patch embedding of a pre-Buffer.

    Raises:
        ValueError: The folder is not a pre-Buffer, or its layers do not match those of the LLM.
    """
    asset = NeoConfig.from_pretrained(pre_buffer)
    if asset.architectures != [ARCHITECTURE]:
        raise ValueError(f"{pre_buffer} is not a pre-Buffer: its architectures are {asset.architectures}.")
    ours, theirs = config.text_config, asset.text_config
    must_agree = {
        name: (getattr(theirs, name), getattr(ours, name)) for name in QWEN3_FIELDS if name not in FREE_FIELDS
    }
    must_agree["temporal rope"] = (theirs.rope_parameters["temporal"], ours.rope_parameters["temporal"])
    differing = [f"{name}: {a} and {b}" for name, (a, b) in must_agree.items() if a != b]
    raise_all(differing, f"The layers of {pre_buffer} and of the LLM differ")
    ours.rope_parameters = theirs.rope_parameters
    config.vision_config = asset.vision_config
