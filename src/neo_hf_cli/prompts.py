"""From the options of a command to a model and its inputs."""

import torch

from neo_hf import NeoConfig, NeoForConditionalGeneration, NeoProcessor
from neo_hf.image_processing_neo import load_image
from neo_hf.loading import check_available, choose_dtype, load_model_and_processor
from neo_hf.video_processing_neo import open_video


def load(model_name: str) -> tuple[NeoForConditionalGeneration, NeoProcessor]:
    """Model and processor, on the GPU if there is one, in the dtype that suits the device."""
    check_available(model_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype(NeoConfig.from_pretrained(model_name), device)
    model, processor = load_model_and_processor(model_name, dtype=dtype or "auto")
    return model.to(device), processor


def image_part(file: str) -> dict:
    """Part of a message; reads the image."""
    return {"type": "image", "image": load_image(file)}


def video_part(file: str) -> dict:
    """Part of a message; opens a local video, so that an error shows now and not after the weights are loaded."""
    if not file.startswith(("http://", "https://")):
        open_video(file)
    return {"type": "video", "video": file}


def media_parts(images: list[str], videos: list[str]) -> list[dict]:
    return [*map(image_part, images), *map(video_part, videos)]


def sampling_kwargs(frames: int | None, fps: float | None, start: float | None, end: float | None) -> dict:
    """The options of a video that were given, as arguments of the processor."""
    sampling = {"num_frames": frames, "fps": fps, "start": start, "end": end}
    return {name: value for name, value in sampling.items() if value is not None}


def prepare(processor: NeoProcessor, messages: list[dict], sampling: dict):
    """Inputs of `generate()` for a conversation that the assistant continues."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": sampling},
    )
