"""A Qwen3 LLM to a NEO that is ready for pre-training (NEO paper, section 3.2)."""

from ..configuration_neo import NeoConfig
from ..files import read_json
from ..modeling_neo import NeoForConditionalGeneration
from ..publishing.model_card import Provenance, placeholder_id, read_license, render_model_card
from ..raw import QWEN3_FIELDS, released_token_ids, rope
from .pre_buffer import adopt_pre_buffer, is_in_pre_buffer
from .source import display_name, empty_model, expected_shapes, raise_all, resolve
from .target import make_processor, new_folder, write_config, write_model, write_processor
from .weights import Checkpoint, TensorInfo, open_checkpoint, sha256

import copy
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config


def init_from_qwen3(
    qwen3: str | Path,
    out: str | Path,
    *,
    num_pre_buffer_layers: int,
    pre_buffer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vision_config: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    seed: int = 0,
    force: bool = False,
) -> list[str]:
    """
    Initialise a NEO from a Qwen3 LLM, ready for pre-training (NEO paper, section 3.2).

    Layer `i` of Qwen3 becomes layer `num_pre_buffer_layers + i`; `RULES` says how its tensors come about. With a
    pre-Buffer of 0 layers, the model computes what Qwen3 computes. The pre-Buffer and the patch embedding are
    initialised at random, as `NeoForConditionalGeneration` itself is, unless `pre_buffer` provides them.

    Args:
        qwen3: Folder or Hub id of the LLM.
        out: Folder to create, in Hub format.
        num_pre_buffer_layers: Depth of the pre-Buffer.
        pre_buffer: Folder written by `extract_pre_buffer`.
        tokenizer: Folder of the tokenizer. Defaults to `qwen3`.
        vision_config: Fields of `NeoVisionConfig` that differ from its defaults.
        max_shard_size: Maximum size of a weight file, in bytes or as a string such as "5GB".
        seed: Seed of the random weights.
        force: Replace `out` if it exists.

    Returns:
        The parts that the repository lacks because no tokenizer was found.

    Raises:
        ValueError: The LLM is not a plain Qwen3, or the pre-Buffer does not match its width.
    """
    source = resolve(qwen3)
    config = _neo_config(qwen3, source, num_pre_buffer_layers, vision_config)
    asset = None
    if pre_buffer is not None:
        asset = open_checkpoint(pre_buffer)
        adopt_pre_buffer(config, pre_buffer)
    llm = open_checkpoint(source)
    readers = _plan(config, llm, asset, seed)
    processor = make_processor(tokenizer or source, config, required=tokenizer is not None)
    config.dtype = dtype = llm.infos["model.norm.weight"].dtype
    infos = {name: TensorInfo(shape, dtype) for name, shape in expected_shapes(config).items()}
    sources = [source, *([Path(pre_buffer)] if pre_buffer is not None else [])]
    with new_folder(out, force, sources) as folder:
        write_model(folder, config, infos, lambda name: readers[name](), max_shard_size, source)
        missing = write_processor(folder, processor)
        files = [*llm.files, *(asset.files if asset else [])]
        hashes = {str(file.relative_to(file.parents[1])): sha256(file) for file in files}
        provenance = Provenance(source=display_name(qwen3), sha256=hashes)
        card = render_model_card(config, placeholder_id(out), None, provenance, read_license(source))
        card.save(folder / "README.md")
        write_config(folder, config)
    return missing


def graft_pre_buffer(pre_buffer: str | Path, qwen3: str | Path, out: str | Path, **kwargs) -> list[str]:
    """
    Initialise a NEO from a pre-Buffer written by `extract_pre_buffer` and a Qwen3 LLM of the same width.

    Args:
        pre_buffer: Folder of the pre-Buffer.
        qwen3, out, kwargs: As for `init_from_qwen3`.
    """
    depth = NeoConfig.from_pretrained(pre_buffer).text_config.num_hidden_layers
    return init_from_qwen3(qwen3, out, num_pre_buffer_layers=depth, pre_buffer=pre_buffer, **kwargs)


def _neo_config(
    qwen3: str | Path, source: Path, num_pre_buffer_layers: int, vision_config: dict[str, Any] | None
) -> NeoConfig:
    llm_config = read_json(source / "config.json")
    if llm_config.get("model_type") != "qwen3":
        raise ValueError(f"{qwen3} must be a Qwen3 LLM (model_type 'qwen3'), got {llm_config.get('model_type')!r}.")
    llm = Qwen3Config(**llm_config)
    llm_rope = llm.rope_parameters
    if llm_rope["rope_type"] != "default" or llm.sliding_window is not None:
        raise ValueError(
            f"NEO has neither rope scaling nor a sliding window, got {llm_rope} and {llm.sliding_window}."
        )
    text_config = {name: getattr(llm, name) for name in QWEN3_FIELDS}
    text_config |= {
        "num_hidden_layers": llm.num_hidden_layers + num_pre_buffer_layers,
        "num_pre_buffer_layers": num_pre_buffer_layers,
        "rope_parameters": {
            "temporal": rope(llm_rope["rope_theta"]),
            "height": rope(10_000.0),
            "width": rope(10_000.0),
        },
    }
    return NeoConfig(
        text_config=text_config,
        vision_config=vision_config or {},
        tie_word_embeddings=llm.tie_word_embeddings,
        **released_token_ids(llm.vocab_size),
    )


def spatial_queries(q_proj: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The first and third quarter of each head's rows, for height and again for width."""
    quarters = q_proj.unflatten(0, (-1, 4, head_dim // 4))  # (heads, quarter, head_dim / 4, ...)
    half = torch.cat([quarters[:, 0], quarters[:, 2]], dim=1)
    return torch.cat([half, half], dim=1).flatten(0, 1)


# How the tensors outside of the pre-Buffer come about. The first pattern that matches a name, as Qwen3 would write it,
# gives Qwen3's tensor and what is made of it, a function of that tensor and head_dim.
Rule = Callable[[torch.Tensor, int], torch.Tensor]
RULES: tuple[tuple[str, str, Rule], ...] = (
    (r"(.*)\.q_proj_hw\.(.*)", r"\1.q_proj.\2", spatial_queries),
    (r"(.*)\.k_proj_hw\.(.*)", r"\1.k_proj.\2", lambda k_proj, _: torch.zeros_like(k_proj)),
    (r"(.*\.[qk]_norm)_[hw]\.weight", r"\1.weight", lambda norm, head_dim: torch.ones_like(norm[: head_dim // 2])),
    (r".*", r"\g<0>", lambda tensor, _: tensor),
)


def _plan(
    config: NeoConfig, llm: Checkpoint, asset: Checkpoint | None, seed: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """
    A function for each tensor of a NEO that makes it.

    Raises:
        ValueError: lists all tensors that are missing, left over or of another shape.
    """
    shapes = expected_shapes(config)
    depth, head_dim = config.text_config.num_pre_buffer_layers, config.text_config.head_dim
    model = empty_model(config)
    used = {"lm_head.weight"} if config.tie_word_embeddings else set()
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    problems = []
    for name, shape in shapes.items():
        if is_in_pre_buffer(name, depth):
            readers[name] = partial(_random, model, name, seed) if asset is None else partial(asset.read, name)
            if asset is not None and name not in asset.infos:
                problems.append(f"missing in the pre-Buffer: {name}")
            continue
        qwen3_name = re.sub(
            r"^(model\.layers\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) - depth}", name.replace("language_model.", "")
        )
        pattern, source, rule = next(entry for entry in RULES if re.fullmatch(entry[0], qwen3_name))
        source = re.sub(f"^{pattern}$", source, qwen3_name)
        used.add(source)
        if source not in llm.infos:
            problems.append(f"missing: {source}")
        elif source == qwen3_name and llm.infos[source].shape != shape:
            problems.append(f"shape of {source}: {llm.infos[source].shape}, expected {shape}")
        readers[name] = partial(_make, llm, source, rule, head_dim)
    problems += [f"left over: {name}" for name in llm.infos if name not in used]
    for name, info in asset.infos.items() if asset else ():
        if info.shape != shapes.get(name):
            problems.append(f"shape of {name} in the pre-Buffer: {info.shape}, expected {shapes.get(name)}")
    raise_all([*dict.fromkeys(problems)], "The weights do not fit")
    return readers


def _make(llm: Checkpoint, source: str, rule: Rule, head_dim: int) -> torch.Tensor:
    return rule(llm.read(source), head_dim)


def _random(model: NeoForConditionalGeneration, name: str, seed: int) -> torch.Tensor:
    """A tensor as the model initialises it. Only the module that it belongs to is in memory at a time."""
    module_name, _, tensor_name = name.rpartition(".")
    module = copy.deepcopy(model.get_submodule(module_name)).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(module_name.encode()))
        model._init_weights(module)
    return getattr(module, tensor_name).detach()
