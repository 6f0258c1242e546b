"""What a conversion reads: the source folder, its configuration, and the tensor behind each of the model's names."""

from ..configuration_neo import NeoConfig
from ..files import read_json
from ..loading import check_available
from ..modeling_neo import NeoForConditionalGeneration
from ..raw import IGNORED_TENSORS, raw_to_neo_name
from .weights import Checkpoint

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

# Prefixes that trainers add to all names.
WRAPPERS = ("", "model.", "module.", "_orig_mod.")


# The files of a Hub repository that a conversion reads. Of the forms of the weights, the first that a repository has
# is taken: where it has safetensors, no pickle is downloaded.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    (".metadata", "__*.distcp", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/*.distcp"),
    ("latest", "*_model_states.pt", "*_optim_states.pt"),
)


def resolve(name_or_path: str | Path) -> Path:
    """A local folder. Of a Hub id, the files that a conversion reads are downloaded."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or str(name_or_path).startswith((".", "/", "~")):
        raise ValueError(f"{name_or_path} is neither a folder nor a Hub id.")
    check_available(name_or_path)
    for weights in WEIGHT_FILES:
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=[*TEXT_FILES, *weights]))
        if any(any(folder.glob(pattern)) for pattern in weights):
            break
    return folder


def display_name(name_or_path: str | Path) -> str:
    """What a card may disclose of a source: a Hub id, or the last part of a path."""
    return str(name_or_path) if not Path(name_or_path).exists() else Path(name_or_path).resolve().name


def read_config(folder: Path) -> NeoConfig:
    """The configuration of a folder, or of its parent, in either layout."""
    for place in (folder, folder.parent):
        if (place / "config.json").exists():
            read_json(place / "config.json")
            try:
                return NeoConfig.from_pretrained(place)
            except Exception as error:  # a broken file breaks transformers' reader in many ways
                raise ValueError(f"{place / 'config.json'} is not a NEO configuration: {error}") from error
    raise ValueError(f"Neither {folder} nor its parent folder holds a config.json.")


def empty_model(config: NeoConfig) -> NeoForConditionalGeneration:
    """The model without memory for its weights, on the meta device."""
    with torch.device("meta"):
        return NeoForConditionalGeneration(config)


def expected_shapes(config: NeoConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a checkpoint of this configuration, without that of a tied head."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def match_names(checkpoint: Checkpoint, config: NeoConfig) -> dict[str, str]:
    """
    The name in a checkpoint of each of the model's tensors, whether it uses raw names or the model's own.

    A head that is missing is tied to the embedding, in the configuration too. A tied head that is stored all the same
    is kept.

    Raises:
        ValueError: Lists all tensors that are missing, left over, or of another shape or kind of dtype.
    """
    expected = expected_shapes(config)
    optional = {}
    if config.tie_word_embeddings:
        optional["lm_head.weight"] = expected["model.language_model.embed_tokens.weight"]
    known = expected | optional

    def translate(wrapper: str) -> dict[str, str]:
        return {raw_to_neo_name(name.removeprefix(wrapper)): name for name in checkpoint.infos}

    names = max((translate(wrapper) for wrapper in WRAPPERS), key=lambda found: len(known.keys() & found.keys()))
    problems = [f"missing: {name}" for name in expected if name not in names]
    matched = {}
    for name, source_name in names.items():
        info = checkpoint.infos[source_name]
        if any(re.fullmatch(pattern, name) for pattern in IGNORED_TENSORS):
            continue
        if name not in known:
            problems.append(f"left over: {source_name}")
        elif info.shape != known[name]:
            problems.append(f"shape of {source_name}: {info.shape}, expected {known[name]}")
        elif not info.dtype.is_floating_point:
            problems.append(f"dtype of {source_name}: {info.dtype}, expected floating point")
        else:
            matched[name] = source_name
    if not config.tie_word_embeddings and problems == ["missing: lm_head.weight"]:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        problems = []
    raise_all(problems, "The checkpoint does not fit its configuration")
    if "lm_head.weight" in matched and config.tie_word_embeddings:
        head, embedding = (
            checkpoint.read(matched[name]) for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        )
        if not torch.equal(head, embedding):
            raise ValueError(
                "tie_word_embeddings is true, but lm_head and embed_tokens differ: correct the configuration."
            )
    return matched


def raise_all(problems: list[str], summary: str):
    """Raise one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"{summary}:\n  " + "\n  ".join(problems))
