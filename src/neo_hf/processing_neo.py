"""Prompts with pictures: chat template, placeholders, tokens and patches in one call."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)
from .image_processing_neo import NeoImageProcessor  # noqa: F401  (ships along, as AutoImageProcessor needs it)
from .indexing_neo import allocate_position_ids

from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

# ChatML. A picture is `<image>` on a line of its own; an empty system text gives no system block. The generation
# markers enclose what is learnt: the assistant's words with the end of turn.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
{%- if part.type == 'text' -%}
{{- part.text -}}
{%- elif part.type in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- else -%}
{{- raise_exception("A message part must be of type 'text' or 'image', got " ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- text + '<|im_end|>\\n' -}}
{%- endgeneration -%}
{%- elif message.role != 'system' or text -%}
{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class NeoProcessorKwargs(ProcessingKwargs, total=False):
    r"""
    return_position_ids (`bool`, *optional*, defaults to `False`):
        Whether to return the T, H and W indices as `position_ids` (3, B, L); needs `return_tensors="pt"`.
    """

    return_position_ids: bool


class NeoProcessor(ProcessorMixin):
    """
    Image processor, tokenizer and chat template of NEO.

    Each `<image>` in a text stands for a picture and becomes `<img>`, one `<IMG_CONTEXT>` per visual token, `</img>`.
    Returns `input_ids` and `attention_mask` (B, L), and with pictures `pixel_values` (P, 3 * patch_size^2) and
    `image_grid_hw` (N, 2) in patches, in prompt order, row after row of the batch. Pixel budgets can be set per call
    (`min_pixels`, `max_pixels`, `share_pixel_budget`).
    """

    valid_processor_kwargs = NeoProcessorKwargs
    text_kwargs = {"padding": True}
    return_position_ids = False

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<image>"
        self.image_context_token = "<IMG_CONTEXT>"
        self.image_start_token = "<img>"
        self.image_end_token = "</img>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        self.image_token_id = self._token_id(self.image_context_token)
        self.image_start_token_id = self._token_id(self.image_start_token)
        self.image_end_token_id = self._token_id(self.image_end_token)

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no {token}. Add NEO's special tokens to it before use.")
        return token_id

    def __call__(
        self, images=None, text=None, videos=None, audio=None, **kwargs: Unpack[NeoProcessorKwargs]
    ) -> BatchFeature:
        """
        Args:
            images: pictures (Pillow, numpy, torch, path, URL, base64) in prompt order: one, some, or a list per text.
            text: a prompt or a list of prompts with `<image>` where a picture stands.

        Raises:
            ValueError: placeholders and pictures differ in number, truncation cut through a picture, or a picture
                cannot be read or has an impossible size.
        """
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if kwargs.get("return_position_ids", self.return_position_ids):
            if not hasattr(inputs.get("input_ids"), "shape"):
                raise ValueError('return_position_ids needs text and return_tensors="pt".')
            inputs["position_ids"] = allocate_position_ids(
                inputs["input_ids"],
                inputs.get("image_grid_hw"),
                image_token_id=self.image_token_id,
                image_start_token_id=self.image_start_token_id,
                spatial_merge_size=self.image_processor.spatial_merge_size,
                attention_mask=inputs["attention_mask"],
            )
        return inputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        if images is not None and not _is_nested(images):
            # A list per prompt, so that counts are compared and budgets shared prompt by prompt.
            flat = list(make_flat_list_of_images(images)) if not isinstance(images, list) or images else []
            counts = [sample.count(self.image_token) for sample in text or []]
            if len(counts) > 1 and sum(counts) == len(flat):
                ends = [sum(counts[: i + 1]) for i in range(len(counts))]
                images = [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]
            else:
                images = [flat]
        if images is not None and not any(images):
            images = None
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and all(isinstance(sample, str) for sample in text):
            counts = [sample.count(self.image_token) for sample in text]
            given = [len(sample) for sample in images or [[]] * len(text)]
            if counts != given:
                raise ValueError(
                    f"Pictures and {self.image_token} placeholders must match prompt by prompt: the prompts have "
                    f"{counts} placeholders, but {given} pictures were given."
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        rows, columns = (int(side) for side in image_inputs["image_grid_hw"][image_idx])
        merge_size = kwargs.get("spatial_merge_size", self.image_processor.spatial_merge_size)
        num_tokens = rows * columns // merge_size**2
        return self.image_start_token + self.image_context_token * num_tokens + self.image_end_token

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]):
        expected = [sample.count(self.image_context_token) for sample in text]
        ids = text_inputs["input_ids"]
        found = [list(row).count(self.image_token_id) for row in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if found != expected:
            raise ValueError(
                f"Truncation cut through a picture: the prompts hold {expected} image tokens, of which {found} are "
                "left. Raise max_length or turn truncation off."
            )

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Visual tokens and patches of pictures of the given sizes.

        Args:
            image_sizes: (height, width) in pixels of each picture.
            kwargs: pixel budgets, as in a call.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        merge_size = images_kwargs.get("spatial_merge_size", self.image_processor.spatial_merge_size)
        patches = [
            self.image_processor.get_number_of_image_patches(height, width, images_kwargs)
            for height, width in image_sizes
        ]
        tokens = [count // merge_size**2 for count in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)


def _is_nested(images) -> bool:
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(x, (list, tuple)) for x in images)


__all__ = ["NeoProcessor"]
