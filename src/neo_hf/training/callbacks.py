"""What the model answers while it learns."""

import os
from pathlib import Path

import torch
from PIL import Image
from transformers import TrainerCallback

from neo_hf.image_processing_neo import NeoImageProcessor
from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.data import IGNORED


def first_turn(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a sample up to its first answer, and those of that answer."""
    learnt = torch.cat([sample["labels"] != IGNORED, torch.tensor([False])])
    start = int(learnt.int().argmax())
    end = start + int((~learnt[start:]).int().argmax())
    return sample["input_ids"][:start], sample["input_ids"][start:end]


def image_from_patches(patches: torch.Tensor, grid: torch.Tensor, image_processor: NeoImageProcessor) -> Image.Image:
    """
    The image as the model sees it.

    Args:
        patches: (rows * columns, 3 * patch_size^2) normalised, channel-major, row by row.
        grid: (rows, columns) in patches.
    """
    rows, columns = grid.tolist()
    side = image_processor.patch_size
    pixels = patches.float().cpu().view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * side, columns * side, 3)
    pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().numpy())


class SampledAnswers(TrainerCallback):
    """
    After each evaluation, answers the first question of some samples and writes them to
    `output_dir/answers/step-N.md`, beside what was to be learnt and the images as the model sees them.

    Args:
        samples: of `load_samples`.
        processor: that of the model.
        max_new_tokens: per answer, which is greedy.
    """

    def __init__(self, samples: list[dict], processor: NeoProcessor, max_new_tokens: int = 128):
        self.samples = samples
        self.processor = processor
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        assert model is not None
        # All processes answer alike, as a model in shards needs all of them; one writes.
        pieces = [f"# Step {state.global_step}"]
        folder = Path(args.output_dir) / "answers"
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(self.samples):
            prompt, answer = first_turn(sample)
            inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
            num_visual = int((prompt == self.processor.image_token_id).sum())
            images: list[Image.Image] = []
            if num_visual:
                image_processor = self.processor.image_processor
                merge = image_processor.spatial_merge_size
                grids = sample["image_grid_hw"]
                grids = grids[grids.prod(-1).cumsum(0) <= num_visual * merge**2]
                sizes = grids.prod(-1).tolist()
                inputs |= {"pixel_values": sample["pixel_values"][: sum(sizes)], "image_grid_hw": grids}
                patches = inputs["pixel_values"].split(sizes)
                images = [image_from_patches(*both, image_processor) for both in zip(patches, grids, strict=True)]
            inputs = {name: value.to(args.device) for name, value in inputs.items()}
            output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            said = self.processor.decode(output[0, len(prompt) :], skip_special_tokens=True)
            expected = self.processor.decode(answer, skip_special_tokens=True)
            asked = self.processor.decode(prompt, skip_special_tokens=True)
            pieces.append(f"## {sample.get('name', number)}")
            for place, image in enumerate(images):
                name = f"{number}-{place}.png"
                if state.is_world_process_zero:
                    image.save(folder / name)
                pieces.append(f"![{name}]({name})")
            pieces += [
                f"{title}\n\n```text\n{text.strip()}\n```"
                for title, text in (("Prompt:", asked), ("Answer:", said), ("To be learnt:", expected))
            ]
        if state.is_world_process_zero:
            path = folder / f"step-{state.global_step}.md"
            path.with_suffix(".tmp").write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)
