"""`model.chat()` as the released checkpoints define it, for code written against them."""

from .chat_template_neo import GENERATION_PROMPT, IM_END, mark_control_tokens, render_turn

from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerationMixin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NeoChatMixin(GenerationMixin):
    """Adds `chat()` and the attributes that go with it."""

    template = "neo1_0"
    system_message: str | None = ""

    @torch.no_grad()
    def chat(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        pixel_values: torch.Tensor | None = None,
        question: str = "",
        generation_config: dict[str, Any] | None = None,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        grid_hw: torch.Tensor | None = None,
        verbose: bool = False,
        sanitize_control_tokens: bool = True,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """
        Answer one turn of a conversation, with the signature of the released checkpoints. New code should use
        `apply_chat_template` and `generate`, which also support batches, streaming and videos.

        Args:
            tokenizer: a tokenizer with NEO's special tokens.
            pixel_values: (P, channels * patch_size * patch_size) patches of all images in the conversation.
            question: the user's text. Each `<image>` in it and in `history` stands for an image. If images are given
                without a history and without a placeholder, `<image>\\n` is prepended.
            generation_config: keyword arguments for `generate()`; not modified.
            history: earlier (question, answer) pairs; not modified.
            return_history: whether to also return the history with this turn appended.
            grid_hw: (N, 2) rows and columns of each image in patches.
            verbose: whether to print the question and the answer.
            sanitize_control_tokens: whether special tokens in the question and in `history` are plain text, except
                those of boxes in answers. If not, they are control tokens, as in the released checkpoints.

        Returns:
            The answer, or the answer and the new history.

        Raises:
            ValueError: if the question is empty, the numbers of placeholders and images differ, or `grid_hw` is
                missing.
        """
        if history is None and pixel_values is not None and "<image>" not in question:
            question = f"<image>\n{question}"
        turns = list(history or [])
        if not question:
            raise ValueError(f"chat needs a question, got {question!r}.")
        written = [turn for asked, answered in turns for turn in (("user", asked), ("assistant", answered))]
        written.append(("user", question))
        if sanitize_control_tokens:
            written = [(role, mark_control_tokens(text, tokenizer, role)) for role, text in written]
        prompt = render_turn("system", self.system_message)
        prompt += "".join(render_turn(role, text) for role, text in written) + GENERATION_PROMPT

        kwargs = dict(generation_config or {})
        if pixel_values is not None:
            if grid_hw is None:
                raise ValueError("pixel_values need grid_hw, the (rows, columns) of each image in patches.")
            sizes = grid_hw.prod(-1) // self.config.vision_config.spatial_merge_size**2
            head, *tails = prompt.split("<image>")
            if len(tails) != len(sizes):
                raise ValueError(
                    f"The prompt has {len(tails)} <image> placeholders, but grid_hw describes {len(sizes)} images."
                )
            images = [f"<img>{'<IMG_CONTEXT>' * size}</img>" for size in sizes.tolist()]
            prompt = head + "".join(image + tail for image, tail in zip(images, tails, strict=True))
            kwargs["pixel_values"] = pixel_values.to(self.device)
            kwargs["image_grid_hw"] = grid_hw.to(self.device)

        end = tokenizer.convert_tokens_to_ids(IM_END)
        kwargs["eos_token_id"] = end
        kwargs.setdefault("pad_token_id", end)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.device)
        output = self.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **kwargs)
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if verbose:
            print(f"{question}\n{answer}")
        return (answer, [*turns, (question, answer)]) if return_history else answer
