"""Random prompts of text, images and videos, what `generate()` gives for them, and how far vLLM is from it."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

WORDS = [
    "What",
    "is",
    "the",
    "shape",
    "color",
    "red",
    "green",
    "blue",
    "how",
    "many",
    "circle",
    "square",
    "digit",
    "left",
    "right",
    "of",
    "in",
    "image",
    "Describe",
]
NEW_TOKENS = 4


@dataclass
class Prompt:
    messages: list[dict]
    images: list[Image.Image]
    videos: list[tuple[np.ndarray, dict]]  # frames (frames, height, width, 3) and what is known about them
    text: str
    input_ids: list[int]
    prompt_log_probs: torch.Tensor  # (L, vocabulary), after each token
    causal_log_probs: torch.Tensor  # the same under a causal mask
    new_ids: list[int]
    new_log_probs: torch.Tensor  # (NEW_TOKENS, vocabulary)

    def for_vllm(self) -> dict:
        media = {"image": self.images, "video": self.videos}
        return {"prompt": self.text, "multi_modal_data": {kind: data for kind, data in media.items() if data}}


def random_prompts(model, processor, count: int, sides: tuple[int, int], seed: int = 0) -> list[Prompt]:
    """A quarter each of text, one to three images, four to six images, and videos, some with an image."""
    rng = np.random.default_rng(seed)
    torch.set_num_threads(1)

    def words() -> dict:
        return {"type": "text", "text": " ".join(rng.choice(WORDS, rng.integers(1, 12)))}

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, *rng.integers(*sides, 2), 3), dtype=np.uint8)

    def image() -> dict:
        return {"type": "image", "image": Image.fromarray(pixels())}

    prompts = []
    for number in range(count):
        content: list[dict] = []
        if number % 4 in (1, 2):
            for _ in range(rng.integers(1, 4) if number % 4 == 1 else rng.integers(4, 7)):
                content += [image(), words()][: rng.integers(1, 3)]
        if number % 4 == 3:
            frames = pixels(int(rng.integers(1, 6)))
            known = {"fps": 2.0, "total_num_frames": len(frames), "frames_indices": [*range(len(frames))]}
            content += [{"type": "video", "video": frames, "metadata": known}, image()][: rng.integers(1, 3)]
        prompts.append(expect(model, processor, [{"role": "user", "content": [*content, words()]}]))
    return prompts


def expect(model, processor, messages: list[dict]) -> Prompt:
    parts = [part for message in messages for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [(part["video"], part["metadata"]) for part in parts if part["type"] == "video"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    media = {"images": images or None, "videos": [frames for frames, _ in videos] or None}
    if videos:
        media["video_metadata"] = [known for _, known in videos]
    inputs = processor(text=text, return_tensors="pt", **media)
    inputs.pop("video_metadata", None)
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        logits = [
            model(**(inputs | {"attention_mask": mask})).logits[0] for mask in (inputs["attention_mask"], causal)
        ]
    return Prompt(
        messages,
        images,
        videos,
        text,
        inputs["input_ids"][0].tolist(),
        *(each.log_softmax(-1) for each in logits),
        output.sequences[0, length:].tolist(),
        torch.cat(output.logits).log_softmax(-1),
    )


def differences(found: list[dict], expected: torch.Tensor) -> list[float]:
    """Between vLLM's log-probabilities of some tokens at each position and those of the vocabulary (positions, E)."""
    return [
        abs(entry.logprob - float(expected[position, token]))
        for position, tokens in enumerate(found)
        for token, entry in (tokens or {}).items()
    ]


def check(outputs, prompts: list[Prompt], tolerance: float = 1e-4):
    """Compare vLLM's outputs with what is expected: token ids, and all log-probabilities that they hold."""
    assert len(outputs) == len(prompts)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert list(output.prompt_token_ids) == prompt.input_ids
        in_prompt = differences((output.prompt_logprobs or [])[1:], prompt.prompt_log_probs)
        assert max(in_prompt, default=0) < tolerance
        (completion,) = output.outputs
        assert list(completion.token_ids) == prompt.new_ids
        in_answer = differences(completion.logprobs, prompt.new_log_probs)
        assert max(in_answer) < tolerance
