"""A raw checkpoint, or the folder of a trainer, to a Hub repository."""

from ..configuration_neo import NeoConfig
from ..modeling_neo import NeoForConditionalGeneration
from ..publishing.model_card import Provenance, load_release, placeholder_id, read_license, render_model_card
from .source import display_name, match_names, raise_all, read_config, resolve
from .target import make_processor, new_folder, write_config, write_model, write_processor
from .weights import DTYPE_NAMES, TensorInfo, open_checkpoint, sha256

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id


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
    Convert a raw checkpoint to a complete Hub repository: weights, configuration, tokenizer, processor, code and card.

    Args:
        raw: Folder or Hub id of a released or trained checkpoint (see `open_checkpoint`). `config.json` may be in the
            parent folder, as for a Trainer's `checkpoint-N`.
        out: Folder to create.
        tokenizer: Folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`. Defaults to `raw`.
        dtype: Floating-point dtype of the weights. Defaults to that of the checkpoint.
        max_shard_size: Maximum size of a weight file, in bytes or as a string such as "5GB".
        num_pre_buffer_layers: Depth of the pre-Buffer, if the configuration does not give it.
        repo_id: Hub id ("user/name") from which the card's examples load the model. Defaults to a placeholder that
            `push` replaces.
        license: Licence identifier for the card, as the Hub spells it. Defaults to that of the released checkpoint or
            of the source's own card, else "unknown".
        verify: Compare every tensor, and the logits of a fixed prompt, with the source.
        force: Replace `out` if it exists.

    Returns:
        The parts that the repository lacks because no tokenizer was found.

    Raises:
        ValueError: Something about the source does not fit. Nothing is written in that case.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    source = resolve(raw)
    config = read_config(source)
    if dtype is not None and not (dtype in DTYPE_NAMES and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype that safetensors supports, got {dtype}.")
    if num_pre_buffer_layers is not None:
        text = config.text_config.to_dict() | {"num_pre_buffer_layers": num_pre_buffer_layers}
        config = NeoConfig(**config.to_dict() | {"text_config": text})
    checkpoint = open_checkpoint(source)
    source_names = match_names(checkpoint, config)
    processor = make_processor(tokenizer or source, config, required=tokenizer is not None)

    def read(name: str) -> torch.Tensor:
        return checkpoint.read(source_names[name])

    infos = {name: checkpoint.infos[source_name] for name, source_name in source_names.items()}
    if dtype is not None:
        infos = {name: TensorInfo(info.shape, dtype) for name, info in infos.items()}
    config.dtype = infos["model.language_model.norm.weight"].dtype
    with new_folder(out, force, [source]) as folder, ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(lambda: {file.name: sha256(file) for file in checkpoint.files})
        write_model(folder, config, infos, read, max_shard_size, source)
        missing = write_processor(folder, processor)
        provenance = Provenance(source=display_name(raw), sha256=hashes.result())
        released = str(raw) if str(raw) in load_release()["checkpoints"] else None
        card = render_model_card(
            config, repo_id or placeholder_id(out), released, provenance, license or read_license(source)
        )
        card.save(folder / "README.md")
        if verify:
            _verify(folder, config, infos, read)
        write_config(folder, config)
    return missing


def _verify(folder: Path, config: NeoConfig, infos: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]):
    """Compare a converted checkpoint with its source: every tensor, and the logits of a prompt with an image."""
    converted = open_checkpoint(folder)
    differing = [name for name in infos if not torch.equal(converted.read(name), read(name).to(infos[name].dtype))]
    raise_all(differing, "These tensors differ from the source")
    model = NeoForConditionalGeneration.from_pretrained(folder, config=config).eval()
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
