"""Callbacks: answers during training, and what to do where the loss jumps."""

import logging
import os
import statistics
from pathlib import Path

import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.samples import normalize_patches
from neo_hf.visualize.prompt import patches_to_image

logger = logging.getLogger(__name__)


def first_turn(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a sample before its first answer, and those of that answer."""
    is_answer = torch.cat([sample["labels"] != IGNORE_INDEX, torch.tensor([False])])
    start = int(is_answer.int().argmax())
    end = start + int((~is_answer[start:]).int().argmax())
    return sample["input_ids"][:start], sample["input_ids"][start:end]


class SampledAnswers(TrainerCallback):
    """
    After each evaluation, generate answers to the first question of some samples, and write them to
    `output_dir/answers/step-N.md` next to the expected answers and the images as the model sees them. The number of
    those exactly as expected is logged.

    Args:
        samples: from `load_samples`.
        processor: the model's.
        max_new_tokens: per answer. Decoding is greedy.
    """

    def __init__(self, samples: list[dict], processor: NeoProcessor, max_new_tokens: int = 128):
        self.samples = samples
        self.processor = processor
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        assert model is not None
        # All processes generate, since a sharded model needs all of them; one writes.
        pieces, num_right = [], 0
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
                pixel_values = normalize_patches(sample["pixel_values"][: sum(sizes)], image_processor)
                inputs |= {"pixel_values": pixel_values, "image_grid_hw": grids}
                patches = pixel_values.split(sizes)
                images = [
                    Image.fromarray(patches_to_image(its_patches, rows, columns, image_processor))
                    for its_patches, (rows, columns) in zip(patches, grids.tolist(), strict=True)
                ]
            inputs = {name: value.to(args.device) for name, value in inputs.items()}
            output = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            answered = self.processor.decode(output[0, len(prompt) :], skip_special_tokens=True)
            expected = self.processor.decode(answer, skip_special_tokens=True)
            num_right += answered.strip() == expected.strip()
            asked = self.processor.decode(prompt, skip_special_tokens=True)
            pieces.append(f"## {sample.get('name', number)}")
            for place, image in enumerate(images):
                name = f"{number}-{place}.png"
                if state.is_world_process_zero:
                    image.save(folder / name)
                pieces.append(f"![{name}]({name})")
            pieces += [
                f"{title}\n\n```text\n{text.strip()}\n```"
                for title, text in (("Prompt:", asked), ("Answer:", answered), ("Expected:", expected))
            ]
        summary = f"{num_right} of {len(self.samples)} answers are exactly as expected."
        logger.info("Step %d: %s", state.global_step, summary)
        if state.is_world_process_zero:
            pieces = [f"# Step {state.global_step}", summary, *pieces]
            path = folder / f"step-{state.global_step}.md"
            path.with_suffix(".tmp").write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)


class ShareOfStream(TrainerCallback):
    """`epoch` in the log of an endless stream: the share of the run that is done, also after resuming."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class LossSpikeError(RuntimeError):
    """The loss jumped; the message says from where to where."""


class _LossSpikes:
    """Tells losses of more than `ratio` times the median of the last `window`, among which it does not count them."""

    def __init__(self, ratio: float, window: int = 20):
        if not ratio > 1:
            raise ValueError(f"The ratio of a loss spike must be more than 1, got {ratio}.")
        self.ratio = ratio
        self.window = window
        self.losses: list[float] = []

    def explain_spike(self, step: int, loss: float) -> str | None:
        """What is wrong with this loss; `None` if it is not a spike, which is then remembered."""
        median = statistics.median(self.losses) if self.losses else loss
        if len(self.losses) == self.window and loss > self.ratio * median:
            return (
                f"The loss of step {step} is {loss:.4g}, more than {self.ratio:g} times {median:.4g}, the median of "
                f"the last {self.window}"
            )
        self.losses = [*self.losses, loss][-self.window :]
        return None


class StopOnLossSpike(_LossSpikes, TrainerCallback):
    """
    Raise a `LossSpikeError` when a logged loss exceeds `ratio` times the median of those before. Nothing is saved: run
    again to go on from the last checkpoint, for instance with a lower learning rate.

    Args:
        ratio: more than 1.
        window: how many logged losses the median is over, and how many there must be before it counts.

    Raises:
        ValueError: `ratio` is not more than 1.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and (problem := self.explain_spike(state.global_step, logs["loss"])):
            raise LossSpikeError(f"{problem} logged. Saved checkpoints in {args.output_dir} are unaffected.")


class SkipOnLossSpike(_LossSpikes, TrainerCallback, ExportableState):
    """
    Drop the gradients of a step whose loss exceeds `ratio` times the median of the steps before: weights and optimizer
    stay as they are, the data and the learning rate's schedule go on. The loss is that of all processes, which
    therefore decide alike, and is read from the device once per step. A resumed run continues with the losses of its
    checkpoint.

    Args:
        ratio: more than 1.
        window: how many losses the median is over, and how many steps there must be before it counts.

    Raises:
        ValueError: `ratio` is not more than 1; at the start of training, DeepSpeed is used, which updates the weights
            before a callback can stop it.
        LossSpikeError: `window` steps in a row were skipped.
    """

    def __init__(self, ratio: float, window: int = 20):
        super().__init__(ratio, window)
        self.num_skipped_in_row = 0
        self._loss: torch.Tensor | float = 0.0

    def state(self) -> dict:
        attributes = {"losses": self.losses, "num_skipped_in_row": self.num_skipped_in_row}
        return {"args": {"ratio": self.ratio, "window": self.window}, "attributes": attributes}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert model is not None
        if args.deepspeed:
            raise ValueError("SkipOnLossSpike cannot skip a step of DeepSpeed, whose engine updates weights itself.")
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.losses, self.num_skipped_in_row = saved["losses"], saved["num_skipped_in_row"]
        self._hook = model.register_forward_hook(self._add_loss)

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    def _add_loss(self, model, args, output):
        if model.training:
            self._loss = self._loss + output["loss"].detach().float()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        # Of each process and accumulation step, the loss is a part of the whole: it is divided by what all have.
        loss, self._loss = torch.as_tensor(self._loss), 0.0
        if args.world_size > 1:
            torch.distributed.all_reduce(loss)
        problem = self.explain_spike(state.global_step + 1, loss.item())
        if problem is None:
            self.num_skipped_in_row = 0
            return
        self.num_skipped_in_row += 1
        if self.num_skipped_in_row == self.window:
            raise LossSpikeError(f"{problem} that were not skipped. The last {self.window} steps were all skipped.")
        if state.is_world_process_zero:
            logger.warning("%s. Its update is skipped.", problem)
        model.zero_grad(set_to_none=True)  # optimizers leave parameters without gradients alone
