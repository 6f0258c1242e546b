"""Between layouts: raw and Hub format, Qwen3 to NEO, and the pre-Buffer as a checkpoint of its own."""

from .checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo, new_folder, open_checkpoint, sha256, write_shards
from .configuration_neo import NeoConfig
from .loading import check_available, default_image_processor
from .model_card import Provenance, load_release, placeholder_id, read_license, render_model_card
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor
from .raw import IGNORED_TENSORS, QWEN3_FIELDS, neo_config_to_raw, neo_to_raw_name, raw_to_neo_name
from .tokenization import add_neo_tokens, load_tokenizer

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig, PreTrainedConfig, Qwen3Config

# Prefixes that trainers put in front of all names.
WRAPPERS = ("", "model.", "module.", "_orig_mod.")
PRE_BUFFER_ARCHITECTURE = "NeoPreBuffer"
# In which a pre-Buffer and an LLM may differ; in the rest of Qwen3's fields all layers of a model are alike.
FREE_FIELDS = {"vocab_size", "num_hidden_layers", "max_position_embeddings", "initializer_range", "use_cache"}
FREE_FIELDS |= {"attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"}


def convert_raw_to_hub(
    raw: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    num_pre_buffer_layers: int | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    verify: bool = False,
    force: bool = False,
) -> list[str]:
    """
    Make a complete Hub repository of a raw checkpoint: weights, configuration, tokenizer, processor, code and card.

    Args:
        raw: folder or Hub id of a released or trained checkpoint (see `open_checkpoint`); its `config.json` may lie in
            the folder above, as it does for a Trainer's `checkpoint-N`.
        out: folder to make.
        tokenizer: folder with `tokenizer.json`, or `vocab.json` and `merges.txt`. Defaults to `raw`.
        dtype: of the weights. Defaults to that of the checkpoint.
        max_shard_size: of a file of weights, in bytes or as "5GB".
        num_pre_buffer_layers: where the configuration does not say.
        repo_id: Hub id ("user/name") from which the card's examples load the model. Defaults to a placeholder, which
            `push` replaces.
        license: identifier of the licence for the card, as the Hub writes it. Defaults to that of the released
            checkpoint or of the source's own card, else "unknown".
        verify: compare each tensor, and logits on a fixed prompt, with the source.
        force: replace `out`.

    Returns:
        What the repository lacks, where there is no tokenizer.

    Raises:
        ValueError: anything about the source that does not fit; nothing is written then.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    source = _resolve(raw)
    config = _read_config(source)
    if dtype is not None and dtype not in DTYPE_NAMES.keys() - {torch.int64, torch.int32, torch.uint8, torch.bool}:
        raise ValueError(f"dtype must be floating point, one that safetensors has, got {dtype}.")
    if num_pre_buffer_layers is not None:
        text = config.text_config.to_dict() | {"num_pre_buffer_layers": num_pre_buffer_layers}
        config = NeoConfig(**config.to_dict() | {"text_config": text})
    checkpoint = open_checkpoint(source)
    source_names = _match_names(checkpoint, config)
    processor = _make_processor(tokenizer or source, config, required=tokenizer is not None)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(source_names[name])

    infos = {name: checkpoint.infos[source_name] for name, source_name in source_names.items()}
    if dtype is not None:
        infos = {name: TensorInfo(info.shape, dtype) for name, info in infos.items()}
    config.dtype = infos["model.language_model.norm.weight"].dtype
    with new_folder(out, force, [source]) as folder, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(lambda: {file.name: sha256(file) for file in checkpoint.files})
        _write_model(folder, config, infos, read, max_shard_size, source)
        missing = _write_processor(folder, processor)
        provenance = Provenance(source=_display_name(raw), sha256=hashes.result())
        released = str(raw) if str(raw) in load_release()["checkpoints"] else None
        card = render_model_card(
            config, repo_id or placeholder_id(out), released, provenance, license or read_license(source)
        )
        card.save(folder / "README.md")
        if verify:
            _verify(folder, infos, read)
    return missing


def convert_hub_to_raw(
    hub: str | Path, out: str | Path, *, max_shard_size: int | str = "5GB", force: bool = False
) -> None:
    """
    Write a NEO in the layout of the released checkpoints, for programs that know only that one.

    Args:
        hub: folder in Hub format, or Hub id.
        out: folder to make.
        max_shard_size: of a file of weights, in bytes or as "5GB".
        force: replace `out`.

    Raises:
        ValueError: as `convert_raw_to_hub`, or the raw layout cannot say what the configuration says.
    """
    source = _resolve(hub)
    config = _read_config(source)
    checkpoint = open_checkpoint(source)
    source_names = _match_names(checkpoint, config)
    infos = {neo_to_raw_name(name): checkpoint.infos[old] for name, old in source_names.items()}
    config.dtype = infos["language_model.model.norm.weight"].dtype
    raw_config = neo_config_to_raw(config)
    tokenizer = load_tokenizer(source)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(source_names[raw_to_neo_name(name)])

    with new_folder(out, force, [source]) as folder:
        _write_weights(folder, infos, read, max_shard_size)
        _write_json(folder / "config.json", raw_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if (source / "generation_config.json").exists():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


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
    Start a NEO from a Qwen3 LLM, ready for pre-training (NEO paper, section 3.2).

    Post-LLM layer `i + num_pre_buffer_layers` takes Qwen3's layer `i`. Its spatial queries are the first and third
    quarter of each head's query rows, for height and for width alike; its spatial keys are 0 and its new norms 1, so
    that with a pre-Buffer of 0 layers it writes what Qwen3 writes. The pre-Buffer is random, and so is the patch
    embedding, unless `pre_buffer` gives both.

    Args:
        qwen3: folder or Hub id of the LLM.
        out: folder to make, in Hub format.
        num_pre_buffer_layers: depth of the pre-Buffer.
        pre_buffer: folder made by `extract_pre_buffer`.
        tokenizer: folder of the tokenizer. Defaults to `qwen3`.
        vision_config: fields of `NeoVisionConfig` that differ from its defaults.
        max_shard_size: of a file of weights, in bytes or as "5GB".
        seed: of what is random.
        force: replace `out`.

    Returns:
        What the repository lacks, where there is no tokenizer.

    Raises:
        ValueError: the LLM is no plain Qwen3, or the pre-Buffer was made for another width.
    """
    source = _resolve(qwen3)
    llm_config = PreTrainedConfig.get_config_dict(source)[0]
    if llm_config.get("model_type") != "qwen3":
        raise ValueError(f"{qwen3} must be a Qwen3 LLM (model_type 'qwen3'), got {llm_config.get('model_type')!r}.")
    llm = Qwen3Config(**llm_config)
    rope = llm.rope_parameters
    if rope["rope_type"] != "default" or llm.sliding_window is not None:
        raise ValueError(f"NEO has neither rope scaling nor a sliding window, got {rope} and {llm.sliding_window}.")
    text = {name: getattr(llm, name) for name in QWEN3_FIELDS}
    text |= {
        "num_hidden_layers": llm.num_hidden_layers + num_pre_buffer_layers,
        "num_pre_buffer_layers": num_pre_buffer_layers,
        "rope_parameters": {
            "temporal": {"rope_type": "default", "rope_theta": float(rope["rope_theta"])},
            "height": {"rope_type": "default", "rope_theta": 10_000.0},
            "width": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }
    ids: dict[str, Any] = {}
    if llm.vocab_size < 151_672:  # no room for the released ids
        ids = dict.fromkeys(("image_token_id", "image_start_token_id", "image_end_token_id"))
    config = NeoConfig(
        text_config=text, vision_config=vision_config or {}, tie_word_embeddings=llm.tie_word_embeddings, **ids
    )
    asset = None
    if pre_buffer is not None:
        asset = open_checkpoint(pre_buffer)
        config = _graft_config(config, pre_buffer)
    llm_checkpoint = open_checkpoint(source)
    recipes = _qwen3_recipes(config, llm_checkpoint, asset)
    processor = _make_processor(tokenizer or source, config, required=tokenizer is not None)
    dtype = llm_checkpoint.infos["model.norm.weight"].dtype
    shapes = _expected_shapes(config)
    infos = {name: TensorInfo(shapes[name], dtype) for name in recipes}
    config.dtype = dtype
    generator = torch.Generator().manual_seed(seed)
    sources = [source, *([Path(pre_buffer)] if pre_buffer is not None else [])]
    with new_folder(out, force, sources) as folder:
        _write_model(folder, config, infos, lambda name: recipes[name](generator).to(dtype), max_shard_size, source)
        missing = _write_processor(folder, processor)
        files = [*llm_checkpoint.files, *(asset.files if asset else [])]
        hashes = {str(file.relative_to(file.parents[1])): sha256(file) for file in files}
        provenance = Provenance(source=_display_name(qwen3), sha256=hashes)
        card = render_model_card(config, placeholder_id(out), None, provenance, read_license(source))
        card.save(folder / "README.md")
    return missing


Recipe = Callable[[torch.Generator], torch.Tensor]


def _qwen3_recipes(config: NeoConfig, llm: Checkpoint, asset: Checkpoint | None) -> dict[str, Recipe]:
    """How each tensor of a NEO comes about."""
    shapes = _expected_shapes(config)
    depth, d = config.text_config.num_pre_buffer_layers, config.text_config.head_dim
    used: set[str] = set()
    problems: list[str] = []

    def take(name: str, shape: tuple[int, ...] | None = None) -> Recipe:
        used.add(name)
        if name not in llm.infos:
            problems.append(f"missing: {name}")
        elif shape is not None and llm.infos[name].shape != shape:
            problems.append(f"shape of {name}: {llm.infos[name].shape}, expected {shape}")
        return lambda _: llm.read(name)

    def graft(name: str) -> Recipe:
        assert asset is not None
        if name not in asset.infos:
            problems.append(f"missing in the pre-Buffer: {name}")
        return lambda _: asset.read(name)

    def spatial_queries(name: str) -> Recipe:
        def make(_: torch.Generator) -> torch.Tensor:
            quarters = llm.read(name).unflatten(0, (-1, 4, d // 4))  # (heads, quarter, d/4, E)
            half = torch.cat([quarters[:, 0], quarters[:, 2]], dim=1)
            return torch.cat([half, half], dim=1).flatten(0, 1)

        return make

    def constant(value: float, shape: tuple[int, ...]) -> Recipe:
        return lambda _: torch.full(shape, value)

    def normal(shape: tuple[int, ...]) -> Recipe:
        return lambda generator: 0.02 * torch.randn(shape, generator=generator)

    def uniform(shape: tuple[int, ...], fan_in: int) -> Recipe:
        # PyTorch's default for Conv2d, weight and bias.
        return lambda generator: (2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5

    recipes: dict[str, Recipe] = {}
    for name, shape in shapes.items():
        layer = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.(.*)", name)
        if name.startswith("model.patch_embed.") or (layer and int(layer[1]) < depth):
            if asset is not None:
                recipes[name] = graft(name)
            elif layer:
                recipes[name] = constant(1.0, shape) if "norm" in name else normal(shape)
            else:
                weight = shapes[name.rsplit(".", 1)[0] + ".weight"]
                recipes[name] = uniform(shape, fan_in=torch.Size(weight[1:]).numel())
        elif layer:
            here, part = f"model.layers.{int(layer[1]) - depth}.", layer[2]
            if part.endswith("q_proj_hw.weight"):
                recipes[name] = spatial_queries(f"{here}self_attn.q_proj.weight")
            elif part.endswith("k_proj_hw.weight"):
                recipes[name] = constant(0.0, shape)
            elif re.search(r"[qk]_norm_[hw]", part):
                recipes[name] = constant(1.0, shape)
            else:
                recipes[name] = take(here + part, shape)
        else:
            recipes[name] = take(name.replace("language_model.", ""), shape)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems += [f"left over: {name}" for name in llm.infos if name not in used | ignored]
    for name, info in asset.infos.items() if asset else ():
        if info.shape != shapes.get(name):
            problems.append(f"shape of {name} in the pre-Buffer: {info.shape}, expected {shapes.get(name)}")
    _raise_all(problems, "The weights do not fit")
    return recipes


def extract_pre_buffer(neo: str | Path, out: str | Path, *, force: bool = False) -> None:
    """
    Lift patch embedding and pre-Buffer out of a NEO, to start another from them (NEO paper, section 3.2).

    Args:
        neo: folder or Hub id, raw or in Hub format.
        out: folder to make: `model.safetensors`, `config.json` (a `NeoConfig` whose only layers are the pre-Buffer's)
            and a card.
        force: replace `out`.

    Raises:
        ValueError: the depth of the pre-Buffer is unknown or 0.
    """
    source = _resolve(neo)
    config = _read_config(source)
    depth = config.text_config.num_pre_buffer_layers
    if not depth:
        raise ValueError(f"The pre-Buffer of {neo} has {'unknown depth' if depth is None else 'no layers'}.")
    checkpoint = open_checkpoint(source)
    kept = {}
    for name, source_name in _match_names(checkpoint, config).items():
        layer = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
        if name.startswith("model.patch_embed.") or (layer and int(layer[1]) < depth):
            kept[name] = source_name
    infos = {name: checkpoint.infos[source_name] for name, source_name in kept.items()}
    config.text_config.num_hidden_layers = depth
    config.architectures = [PRE_BUFFER_ARCHITECTURE]
    config.auto_map = None
    config.dtype = next(iter(infos.values())).dtype
    with new_folder(out, force, [source]) as folder:
        _write_weights(folder, infos, lambda name: checkpoint.read(kept[name]), "5GB")
        config.to_json_file(folder / "config.json")
        hashes = "\n".join(f"- `{file.name}`: `{sha256(file)}`" for file in checkpoint.files)
        (folder / "README.md").write_text(
            f"""---
library_name: transformers
tags:
- neo
- pre-buffer
---

# {Path(out).name}

Patch embedding and pre-Buffer ({depth} layers of width {config.text_config.hidden_size}) of a NEO. Not a model by
itself: it starts another NEO, with a Qwen3 LLM of the same width.

```bash
neo-hf pre-buffer graft {Path(out).name} QWEN3 OUT
```

Lifted out of {_display_name(neo)} (SHA-256):

{hashes}
"""
        )


def _graft_config(config: NeoConfig, pre_buffer: str | Path) -> NeoConfig:
    """The configuration of a NEO that starts from a pre-Buffer; refuses one that was made for another LLM."""
    asset = NeoConfig.from_pretrained(pre_buffer)
    if asset.architectures != [PRE_BUFFER_ARCHITECTURE]:
        raise ValueError(f"{pre_buffer} is no pre-Buffer: its architectures are {asset.architectures}.")
    ours, theirs = config.text_config, asset.text_config
    must_agree = {
        name: (getattr(theirs, name), getattr(ours, name)) for name in QWEN3_FIELDS if name not in FREE_FIELDS
    }
    must_agree["temporal rope"] = (theirs.rope_parameters["temporal"], ours.rope_parameters["temporal"])
    differing = [f"{name}: {a} against {b}" for name, (a, b) in must_agree.items() if a != b]
    _raise_all(differing, f"The layers of {pre_buffer} and of the LLM would not fit into one stack")
    ours.rope_parameters |= {axis: theirs.rope_parameters[axis] for axis in ("height", "width")}
    config.vision_config = asset.vision_config
    return config


def graft_pre_buffer(pre_buffer: str | Path, qwen3: str | Path, out: str | Path, **kwargs) -> list[str]:
    """
    Start a NEO from a pre-Buffer made by `extract_pre_buffer` and a Qwen3 LLM of the same width.

    Args:
        pre_buffer: folder of the pre-Buffer.
        qwen3, out, kwargs: as `init_from_qwen3`.
    """
    depth = NeoConfig.from_pretrained(pre_buffer).text_config.num_hidden_layers
    return init_from_qwen3(qwen3, out, num_pre_buffer_layers=depth, pre_buffer=pre_buffer, **kwargs)


# Shared parts


def _resolve(name_or_path: str | Path) -> Path:
    """A local folder; a Hub id is downloaded."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or str(name_or_path).startswith((".", "/", "~")):
        raise ValueError(f"{name_or_path} is neither a folder nor a Hub id.")
    check_available(name_or_path)
    return Path(snapshot_download(str(name_or_path)))


def _display_name(name_or_path: str | Path) -> str:
    """What a card may tell of a source: a Hub id, or the last part of a path."""
    return str(name_or_path) if not Path(name_or_path).exists() else Path(name_or_path).resolve().name


def _read_config(folder: Path) -> NeoConfig:
    for place in (folder, folder.parent):
        if (place / "config.json").exists():
            try:
                return NeoConfig.from_pretrained(place)
            except Exception as error:  # a broken file breaks transformers' reader in many ways
                raise ValueError(f"{place / 'config.json'} is no configuration of NEO: {error}") from error
    raise ValueError(f"Neither {folder} nor the folder above holds a config.json.")


def _expected_shapes(config: NeoConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a checkpoint of this configuration holds; that of a tied head is left out."""
    with torch.device("meta"):
        model = NeoForConditionalGeneration._from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def _match_names(checkpoint: Checkpoint, config: NeoConfig) -> dict[str, str]:
    """
    The tensor of a checkpoint that goes by each of the model's own names, whether it has raw names or those.

    Raises:
        ValueError: lists all tensors that are missing, left over, or of another shape or kind of dtype.
    """
    expected = _expected_shapes(config)
    optional = {}
    if config.tie_word_embeddings:  # it may be there all the same, and is kept where it is
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
        # Where there is no head, it is the embedding.
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        problems = []
    _raise_all(problems, "The checkpoint does not fit its configuration")
    if "lm_head.weight" in matched and config.tie_word_embeddings:
        head, embedding = (
            checkpoint.read(matched[name]) for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        )
        if not torch.equal(head, embedding):
            raise ValueError(
                "tie_word_embeddings is true, but lm_head and embed_tokens differ: correct the configuration."
            )
    return matched


def _raise_all(problems: list[str], summary: str):
    if problems:
        raise ValueError(f"{summary}:\n  " + "\n  ".join(problems))


def _write_weights(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
):
    """Write weights and refuse those that are not finite, by name."""
    broken = []

    def checked(name: str) -> torch.Tensor:
        tensor = read(name).to(infos[name].dtype)
        # NaN goes through to both extremes; isfinite on all numbers would take twenty times as long.
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            broken.append(name)
        return tensor

    write_shards(folder, infos, checked, max_shard_size)
    _raise_all(broken, "These tensors hold numbers that are not finite")


def _write_json(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_model(
    folder: Path,
    config: NeoConfig,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    max_shard_size: int | str,
    source: Path,
):
    """Weights, configuration, generation configuration and code; then read back what a loader will look at."""
    _write_weights(folder, infos, read, max_shard_size)
    generation_config = GenerationConfig.from_model_config(config)
    if (source / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(source)
    generation_config.save_pretrained(folder)
    config.architectures = [NeoForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    code = Path(__file__).parent
    for file in sorted(code.glob("*_neo.py")):
        shutil.copyfile(file, folder / file.name)
    written = open_checkpoint(folder)
    assert written.infos == dict(infos), "what was written is not what was to be written"
    assert NeoConfig.from_pretrained(folder).to_diff_dict() == config.to_diff_dict(), "the configuration changed"


def _make_processor(folder: str | Path, config: NeoConfig, required: bool) -> NeoProcessor | None:
    """The processor of a tokenizer folder; fills in the special token ids that the configuration does not know."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        if required:
            raise ValueError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json and merges.txt.")
        return None
    add_neo_tokens(tokenizer)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with NEO's own, but the vocabulary of the model "
            f"{config.text_config.vocab_size}."
        )
    processor = NeoProcessor(default_image_processor(config), tokenizer)
    for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        known, found = getattr(config, name), getattr(processor, name)
        if known is not None and known != found:
            raise ValueError(f"{name} is {known} in the configuration, but {found} in the tokenizer.")
        setattr(config, name, found)
    return processor


def _write_processor(folder: Path, processor: NeoProcessor | None) -> list[str]:
    if processor is None:
        return ["tokenizer", "processor", "chat template"]
    processor.save_pretrained(folder)
    return []


def _verify(folder: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]):
    """Compare a converted checkpoint with its source: each tensor, and logits with an image."""
    converted = open_checkpoint(folder)
    differing = [name for name in infos if not torch.equal(converted.read(name), read(name).to(infos[name].dtype))]
    _raise_all(differing, "These tensors differ from their source")
    model = NeoForConditionalGeneration.from_pretrained(folder).eval()
    config = model.config
    ids = torch.arange(1, 17)[None] % config.text_config.vocab_size
    inputs: dict[str, torch.Tensor] = {}
    if config.image_token_id is not None:
        merge, vision = config.vision_config.spatial_merge_size, config.vision_config
        pixels = vision.num_channels * vision.patch_size**2
        image = [config.image_start_token_id, *[config.image_token_id] * 6, config.image_end_token_id]
        ids = torch.cat([ids, torch.tensor([image]), ids], dim=1)
        grid = torch.tensor([[2 * merge, 3 * merge]])
        generator = torch.Generator().manual_seed(0)
        inputs = {"pixel_values": torch.randn(6 * merge**2, pixels, generator=generator), "image_grid_hw": grid}
    with torch.no_grad():
        found = model(input_ids=ids, **inputs).logits
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
        expected = model(input_ids=ids, **inputs).logits
    if not torch.equal(found, expected):
        raise ValueError(f"Logits differ from those of the source by up to {(found - expected).abs().max()}.")
