"""Model cards of the released checkpoints and of any other, from one template and one data file in `templates/`."""

from .._version import __version__
from ..configuration_neo import NeoConfig
from ..modeling_neo import NeoForConditionalGeneration

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATES = files(__package__) / "templates"

# The line of the card's examples that says where they load the model from.
MODEL_ID_LINE = re.compile(r'^model_id = "(.*)"$', flags=re.MULTILINE)


@dataclass(frozen=True)
class Provenance:
    """
    Where converted weights come from.

    source: Hub id or path of the source, as the card shows it.
    sha256: Hexadecimal SHA-256 of each input file, by file name.
    converter: Name and version of the converter.
    """

    source: str
    sha256: Mapping[str, str]
    converter: str = f"neo-hf {__version__}"


@dataclass(frozen=True)
class TrainingRun:
    """
    A training run, as its model's card tells it.

    base_model: Hub id or folder of the model it started from.
    data: Hub ids or files of the training data.
    recipe: The settings that decide what is learnt, by name.
    history: A row of a table per evaluation, or one for the end where there was none.
    scores: Metrics of the last evaluation other than the loss, by name.
    versions: Versions of the libraries, by name.
    """

    base_model: str
    data: Sequence[str]
    recipe: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    scores: Mapping[str, float]
    versions: Mapping[str, str]


@cache
def load_release() -> dict[str, Any]:
    """The data file; its `checkpoints` are the released ones by Hub id."""
    return yaml.safe_load((TEMPLATES / "released_checkpoints.yaml").read_text(encoding="utf-8"))


def released_config(checkpoint: str) -> NeoConfig:
    """
    Configuration of a released checkpoint, e.g. "Paranioar/NEO1_0-2B-SFT".

    Raises:
        ValueError: There is no such checkpoint.
    """
    return NeoConfig(**load_release()["sizes"][_released(checkpoint)["size"]]["config"])


def count_parameters(config: NeoConfig) -> dict[str, int]:
    """
    Parameters of the model (`total`) and of its parts, in order, without allocating them. A tied head counts once, as
    the token embedding. If the depth of the pre-Buffer is unknown, `layers` replaces `pre_buffer` and `post_llm`.
    """
    with torch.device("meta"):
        model = NeoForConditionalGeneration(config)
    decoder = model.model.language_model
    parts: dict[str, torch.nn.Module] = {"patch_embedding": model.model.patch_embed}
    parts["token_embedding"] = decoder.embed_tokens
    if config.text_config.num_pre_buffer_layers is None:
        parts["layers"] = decoder.layers
    else:
        parts |= {"pre_buffer": model.pre_buffer, "post_llm": model.post_llm}
    parts["norm"] = decoder.norm
    if not config.tie_word_embeddings:
        parts["head"] = model.lm_head
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    return {"total": sum(counts.values()), **counts}


def render_model_card(
    config: NeoConfig,
    model_id: str,
    released: str | None = None,
    provenance: Provenance | None = None,
    license: str | None = None,
    training: TrainingRun | None = None,
) -> ModelCard:
    """
    The model card of a checkpoint in the layout of `save_pretrained`.

    Args:
        config: Configuration of the checkpoint, from which the figures of the architecture follow.
        model_id: Hub id or folder from which the card's examples load it; its last part is the title.
        released: Hub id of the released checkpoint whose weights these are: the card then has its licence, training
            data and published results. `None`: the card only says what follows from `config` and `provenance`.
        provenance: Origin of converted weights.
        license: Licence identifier, as the Hub spells it. Defaults to that of the released checkpoint, else "unknown".
        training: The run that made the weights.

    Raises:
        ValueError: `released` is not a released checkpoint.
    """
    release = load_release()
    name = Path(model_id).name
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": license or (release["license"] if released is not None else "unknown"),
        "widget": release["widget"],
    }
    tags = ["neo", "multimodal", "vision-language", "encoder-free"]
    context: dict[str, Any] = {}
    if released is not None:
        checkpoint = _released(released)
        family, size = release["families"][checkpoint["family"]], release["sizes"][checkpoint["size"]]
        names = list(family["stages"])
        stages = {stage: family["stages"][stage] for stage in names[: names.index(checkpoint["stage"]) + 1]}
        results = checkpoint.get("results", [])
        context = {
            "family": family,
            "family_name": checkpoint["family"],
            "size": size,
            "size_name": checkpoint["size"],
            "stage": checkpoint["stage"],
            "stages": stages,
            "results": results,
        }
        tags += ["video-text-to-text"] if family["video"] else []
        data |= {
            "language": family["languages"],
            "base_model": f"Qwen/{size['llm']}-Base",
            "base_model_relation": "finetune",
            "datasets": [dataset for stage in stages.values() for dataset in stage["datasets"]] or None,
        }
        if results:
            data["model_name"] = name
            data["eval_results"] = [
                EvalResult(
                    task_type="image-text-to-text",
                    task_name=group["domain"],
                    dataset_type=benchmark.lower(),
                    dataset_name=benchmark,
                    metric_type="score",
                    metric_name="VLMEvalKit score, as published",
                    metric_value=score,
                    source_name=release["sources"][group["source"]]["name"],
                    source_url=release["sources"][group["source"]]["url"],
                )
                for group in results
                for benchmark, score in group["scores"].items()
            ]
    if training is not None:
        tags += ["generated_from_trainer"]
        data |= {
            "base_model": training.base_model if _is_hub_id(training.base_model) else None,
            "base_model_relation": "finetune" if _is_hub_id(training.base_model) else None,
            "datasets": [name for name in training.data if _is_hub_id(name)] or None,
        }
        if training.scores:
            data["model_name"] = name
            data["eval_results"] = [
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type="held-out",
                    dataset_name="held-out data",
                    metric_type=metric,
                    metric_value=score,
                )
                for metric, score in training.scores.items()
            ]
    return ModelCard.from_template(
        ModelCardData(tags=tags, **data),
        template_str=(TEMPLATES / "model_card.md.jinja").read_text(encoding="utf-8"),
        name=name,
        model_id=model_id,
        text=config.text_config,
        vision=config.vision_config,
        parameters=count_parameters(config),
        released=released,
        license=data["license"],
        provenance=provenance,
        training=training,
        shown=lambda name: name if _is_hub_id(name) else Path(name).name,
        release=release,
        **context,
    )


def placeholder_id(folder: str | Path) -> str:
    """Hub id for the card of a folder that nobody has named yet."""
    return f"your-username/{Path(folder).resolve().name}"


def read_license(folder: Path) -> str | None:
    """Identifier of the licence in the metadata of a folder's own card, or `None`."""
    try:
        return ModelCard.load(folder / "README.md").data.get("license")
    except (OSError, ValueError, yaml.YAMLError):  # no card, or none that the Hub could read
        return None


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def set_model_id(card: str, model_id: str) -> str:
    """The text of a card whose examples load the model from `model_id`; the rest stays as it is."""
    return MODEL_ID_LINE.sub(lambda _: f'model_id = "{model_id}"', card)


def _released(checkpoint: str) -> dict[str, Any]:
    checkpoints = load_release()["checkpoints"]
    if checkpoint not in checkpoints:
        raise ValueError(f"{checkpoint!r} is not a released checkpoint. Those are {', '.join(checkpoints)}.")
    return checkpoints[checkpoint]
