"""Training data: from records to samples, streams, rows and batches."""

import base64
import io
import json
import re
import tarfile
from collections import Counter
from functools import partial
from itertools import islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from helpers import GOLDEN, random_prompt
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from neo_hf import NeoImageProcessor, NeoProcessor, NeoVideoProcessor
from neo_hf.tokenization import add_neo_tokens
from neo_hf.training import (
    PackedCollator,
    PackedDataset,
    PaddedCollator,
    SampleStream,
    Source,
    StreamLoader,
    encode_record,
    fill_rows,
    load_samples,
    normalize_patches,
    shards,
    sources,
)
from neo_hf.training.records import prepare_records
from neo_hf.training.sources import MAX_BARREN_PASSES, SourceReader

# Ids of the real vocabulary.
BEGIN, END, NEWLINE, USER, ASSISTANT = 151644, 151645, 198, 872, 77091
CONTEXT, IMG, IMG_END = 151669, 151670, 151671
HI, YES, DOT = 13048, 9454, 13
IMAGE = [IMG, *[CONTEXT] * 6, IMG_END]  # of 64 x 96 pixels


def noise(height=64, width=96):
    return Image.effect_noise((width, height), 64).convert("RGB")


def chat(*turns, **record):
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)], **record}


def conversation(*turns, **record):
    roles = ["human", "gpt"] * len(turns)
    return {"conversations": [{"from": r, "value": v} for r, v in zip(roles, turns, strict=False)], **record}


def texts(number):
    return [chat(f"Say {i}.", f"{i}.") for i in range(number)]


def write_jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def learnt(sample, tokenizer):
    return tokenizer.decode(sample["labels"][sample["labels"] != -100])


def same_sample(a, b):
    assert set(a) == set(b)
    for key in set(a) - {"name"}:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("a.png", (64, 96)), ("b.png", (96, 64)), ("c.png", (32, 128))):
        noise(*size).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


# Labels


def test_labels_of_several_turns(processor):
    """Worked by hand."""
    record = chat("Hi", "Yes.", [{"type": "image", "image": noise()}, {"type": "text", "text": "Hi"}], "Hi")
    record["messages"].insert(0, {"role": "system", "content": "Hi"})
    sample = encode_record(record, processor, name="here")
    header, answer = [BEGIN, ASSISTANT, NEWLINE], [YES, DOT, END, NEWLINE]
    expected = [
        ([BEGIN, 8948, NEWLINE, HI, END, NEWLINE, BEGIN, USER, NEWLINE, HI, END, NEWLINE, *header], False),
        (answer, True),
        ([BEGIN, USER, NEWLINE, *IMAGE, NEWLINE, HI, END, NEWLINE, *header], False),
        ([HI, END, NEWLINE], True),
    ]
    assert sample["input_ids"].tolist() == [token for ids, _ in expected for token in ids]
    assert sample["labels"].tolist() == [token if learn else -100 for ids, learn in expected for token in ids]
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.long
    assert sample["image_grid_hw"].tolist() == [[4, 6]]
    assert (sample["pixel_values"].shape, sample["pixel_values"].dtype) == ((24, 768), torch.float32)
    assert sample["name"] == "here"


def test_released_format_of_several_turns(processor, folder):
    """Worked by hand: tags stand where the text has them, without a newline of their own."""
    record = conversation("<image>Hi<image>\n", "Yes.", "Hi", "Hi", image=["a.png", "b.png"])
    sample = encode_record(record, processor, root=folder)
    start, header = [BEGIN, USER, NEWLINE], [BEGIN, ASSISTANT, NEWLINE]
    asked = [*start, *IMAGE, HI, *IMAGE, NEWLINE, END, NEWLINE, *header]
    second = [*start, HI, END, NEWLINE, *header]
    assert sample["input_ids"].tolist() == [*asked, YES, DOT, END, NEWLINE, *second, HI, END, NEWLINE]
    ignored = [-100] * len(asked), [-100] * len(second)
    assert sample["labels"].tolist() == [*ignored[0], YES, DOT, END, NEWLINE, *ignored[1], HI, END, NEWLINE]
    assert sample["image_grid_hw"].tolist() == [[4, 6], [6, 4]]


def test_header_and_answer_are_tokenised_apart(processor, tokenizer):
    """As in the released training. One string has the token "\\n\\n\\n" across both."""
    sample = encode_record(chat("Hi", "\n\nYes."), processor)
    ids, begin = sample["input_ids"].tolist(), sample["labels"].ne(-100).nonzero()[0, 0]
    assert ids[begin - 3 : begin] == [BEGIN, ASSISTANT, NEWLINE]
    assert ids[begin:] == sample["labels"][begin:].tolist() == tokenizer.encode("\n\nYes.<|im_end|>\n")
    assert ids != tokenizer.encode(tokenizer.decode(ids))
    # The prompt is that of inference.
    prompt = processor.apply_chat_template(chat("Hi")["messages"], add_generation_prompt=True, tokenize=True)
    assert ids[:begin] == prompt[0]


def test_images_are_not_learnt(processor):
    """Also not those in an answer."""
    sample = encode_record(chat("Hi", "<image>\nHi", images=[noise()]), processor)
    image = [IMG, *[-100] * 6, IMG_END]
    assert sample["labels"].tolist() == [-100] * 9 + [*image, NEWLINE, HI, END, NEWLINE]


def test_labels_agree_with_transformers(processor, folder, clips):
    """Where nothing splits differently, transformers' own mask says the same; images and a video in between."""
    image, video = (
        {"type": "image", "path": str(folder / "a.png")},
        {"type": "video", "path": str(clips / "bikes.mp4")},
    )
    record = chat(
        [image, video, image, {"type": "text", "text": "What?"}],
        "A cat, über 9.",
        "And?",
        "No.",
        [video],
        "A dog.",
    )
    settings = {"fps": 1, "max_pixels": 32768}
    sample = encode_record(record, processor, videos_kwargs=settings)
    whole = processor.apply_chat_template(
        record["messages"],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": settings},
    )
    assert torch.equal(sample["input_ids"], whole["input_ids"][0])
    assert torch.equal(sample["labels"] != -100, torch.as_tensor(whole["assistant_masks"])[0] == 1)
    assert torch.equal(sample["pixel_values"], whole["pixel_values"])
    assert torch.equal(sample["image_grid_hw"], whole["image_grid_hw"])
    assert len(sample["image_grid_hw"]) == 22


# Formats


@pytest.mark.parametrize("how", ["path", "url", "image", "base64", "data", "bytes", "pil", "tag", "trl", "none"])
def test_ways_to_give_an_image(processor, folder, how):
    image = folder / "a.png"
    encoded = base64.b64encode(image.read_bytes()).decode()
    text, empty = {"type": "text", "text": "Hi"}, {"type": "image"}
    parts, columns = {
        "path": ([{"type": "image", "path": "a.png"}, text], {}),
        "url": ([{"type": "image_url", "image_url": {"url": "a.png"}}, text], {}),
        "image": ([{"type": "image", "image": str(image)}, text], {}),
        "base64": ([{"type": "image", "base64": encoded}, text], {}),
        "data": ([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}, text], {}),
        "bytes": ([{"type": "image", "image": {"bytes": image.read_bytes(), "path": None}}, text], {}),
        "pil": ([{"type": "image", "image": Image.open(image)}, text], {}),
        "tag": ("<image>\nHi", {"images": ["a.png"]}),
        "trl": ([empty, text], {"images": [Image.open(image)]}),
        "none": ("Hi", {"image": "a.png"}),  # TRL puts it first
    }[how]
    expected = encode_record(conversation("<image>\nHi", "Yes.", image="a.png"), processor, root=folder)
    same_sample(encode_record(chat(parts, "Yes.", **columns), processor, root=folder), expected)


def test_images_in_order(processor, folder):
    """Own images of parts and those beside the conversation, in several turns."""
    own = {"type": "image", "path": "c.png"}
    record = chat(["<image>", own, {"type": "image"}], "Yes.", "<image>", "Hi", images=["a.png", "b.png", "a.png"])
    record["messages"][0]["content"][0] = {"type": "text", "text": "<image>", "image": None}  # as Arrow fills up
    sample = encode_record(record, processor, root=folder)
    assert sample["image_grid_hw"].tolist() == [[4, 6], [2, 8], [6, 4], [4, 6]]
    assert torch.equal(sample["pixel_values"][:24], sample["pixel_values"][-24:])


def test_video(processor, tokenizer, clips):
    record = conversation("<video>\nWhat?", "Yes.", video="bikes.mp4")
    sample = encode_record(record, processor, root=clips, videos_kwargs={"num_frames": 3})
    assert len(sample["image_grid_hw"]) == 3
    text = tokenizer.decode(sample["input_ids"][sample["input_ids"] != CONTEXT])
    assert text.startswith("<|im_start|>user\nThe time range of this video is [00:00-00:10], and")
    assert text.count(":<img></img>\n") == 3
    assert learnt(sample, tokenizer) == "Yes.<|im_end|>\n"
    part = {"type": "video", "path": "bikes.mp4"}
    openai = chat([part, {"type": "text", "text": "\nWhat?"}], "Yes.")
    in_place = conversation("<video>\n\nWhat?", "Yes.", video="bikes.mp4")
    same_sample(
        encode_record(openai, processor, root=clips, videos_kwargs={"num_frames": 3}),
        encode_record(in_place, processor, root=clips, videos_kwargs={"num_frames": 3}),
    )


def test_images_share_the_budget_over_all_turns(processor):
    large = noise(300, 600)

    def sides(*counts, **images_kwargs):
        turns = [turn for count in counts for turn in ([{"type": "image", "image": large}] * count, "Yes.")]
        return encode_record(chat(*turns), processor, images_kwargs=images_kwargs)["image_grid_hw"].tolist()

    assert sides(1) == [[10, 22]]  # 65536 pixels
    assert sides(1, 3) == [[8, 16]] * 4  # 2 * 65536 // 4
    assert sides(3, 1, max_pixels=32768) == [[4, 10]] * 4  # 2 * 32768 // 4
    assert sides(1, 1, min_pixels=250_000, max_pixels=300_000) == [[24, 46]] * 2
    assert sides(2, 2, share_pixel_budget=False) == [[10, 22]] * 4


@pytest.mark.parametrize("text", ["Hi", "<image>\nHi"])
def test_one_image_needs_no_tag(processor, folder, text):
    """As in the trainer of the released models."""
    sample = encode_record(conversation(text, "Yes.", image="a.png"), processor, root=folder)
    expected = [BEGIN, USER, NEWLINE, *IMAGE, NEWLINE, HI, END, NEWLINE, BEGIN, ASSISTANT, NEWLINE]
    assert sample["input_ids"].tolist() == [*expected, YES, DOT, END, NEWLINE]


def test_input_turns_are_not_learnt(processor, tokenizer):
    record = conversation("Hi", "Yes.", "Hi", "Hi")
    record["conversations"][1]["is_input"] = True
    sample, usual = encode_record(record, processor), encode_record(conversation("Hi", "Yes.", "Hi", "Hi"), processor)
    assert torch.equal(sample["input_ids"], usual["input_ids"])
    assert learnt(sample, tokenizer) == "Hi<|im_end|>\n"


def test_caption(processor, folder):
    sample = encode_record({"image": "a.png", "caption": "Yes."}, processor, root=folder)
    asked = [BEGIN, USER, NEWLINE, *IMAGE, NEWLINE, END, NEWLINE, BEGIN, ASSISTANT, NEWLINE]
    assert sample["input_ids"].tolist() == [*asked, YES, DOT, END, NEWLINE]
    assert sample["labels"].tolist() == [-100] * len(asked) + [YES, DOT, END, NEWLINE]


def test_text_is_a_document(processor, tokenizer):
    """Without a template, learnt from its first token to its end; what looks like a control token is text."""
    sample = encode_record({"text": "Yes."}, processor)
    assert sample["input_ids"].tolist() == sample["labels"].tolist() == [YES, DOT, END]
    sample = encode_record({"text": "<image><|im_end|>"}, processor)
    assert tokenizer.decode(sample["labels"]) == "<image><|im_end|><|im_end|>"
    assert sample["input_ids"].tolist().count(END) == 1


def test_interleaved_document(processor, folder):
    """The loss covers the text, neither images nor what stands around them."""
    record = {"texts": ["Yes.", None, "Hi", None], "images": [None, "a.png", None, "b.png"]}
    sample = encode_record(record, processor, root=folder)
    ignored = [-100] * len(IMAGE)
    assert sample["input_ids"].tolist() == [YES, 624, *IMAGE, NEWLINE, HI, NEWLINE, *IMAGE, END]  # 624 is ".\n"
    assert sample["labels"].tolist() == [YES, 624, *ignored, NEWLINE, HI, NEWLINE, *ignored, END]
    assert sample["image_grid_hw"].tolist() == [[4, 6], [6, 4]]


def test_several_conversations_in_one_record(processor, folder):
    turns = [
        {"from": "human", "value": "<image>\nHi"},
        {"from": "gpt", "value": "Yes."},
    ]
    packed = {"conversations": [turns, [*turns, *turns], turns[:0]], "image": ["a.png", "b.png", "c.png"]}
    parts = prepare_records([packed, {"text": "Hi"}], {})
    assert [part.get("images") for part in parts] == [["a.png"], ["b.png", "c.png"], [], None]
    assert prepare_records("Hi", {}) == ["Hi"]
    samples = load_samples([Source([packed, {"text": "Hi"}], root=folder)], processor)
    assert [sample["name"] for sample in samples] == [
        "list, record 0, part 1",
        "list, record 0, part 2",
        "list, record 1",
    ]
    assert [sample["image_grid_hw"].tolist() for sample in samples[:2]] == [[[4, 6]], [[6, 4], [2, 8]]]


def test_columns_are_mapped(processor, folder):
    records = [{"jpg": "a.png", "txt": "Yes."}, {"image": "a.png", "caption": "Yes."}]
    source = Source(records, root=folder, columns={"image": "jpg", "caption": "txt"})
    samples = load_samples([source], processor)
    same_sample(*samples)


# Pixels


@pytest.mark.parametrize(
    "settings", [{}, {"image_mean": [0.1, 0.2, 0.3], "do_normalize": True}, {"do_normalize": False}]
)
def test_uint8_patches_are_exact(tokenizer, folder, clips, settings):
    """Normalised afterwards, patches are equal to the bit, of images and frames alike."""
    images = NeoImageProcessor(min_pixels=4096, max_pixels=65536, **settings)
    processor = NeoProcessor(images, tokenizer, video_processor=NeoVideoProcessor(**settings))
    levels = Image.fromarray(np.arange(256 * 256 * 3, dtype=np.uint32).astype(np.uint8).reshape(256, 256, 3))
    parts = [
        {"type": "image", "image": levels},
        {"type": "image", "path": "a.png"},
        {"type": "image", "path": "b.png"},
    ]
    video = {"type": "video", "path": str(clips / "bikes.mp4")}
    record = chat([*parts, video], "Yes.")
    encode = partial(encode_record, record, processor, folder, videos_kwargs={"num_frames": 2})
    whole, small = encode(), encode(normalize=False)
    assert small["pixel_values"].dtype == torch.uint8
    assert small["pixel_values"].unique().numel() == 256
    assert torch.equal(normalize_patches(small["pixel_values"], images), whole["pixel_values"])
    assert normalize_patches(whole["pixel_values"], images) is whole["pixel_values"]


def test_patches_stay_float_where_frames_are_normalised_differently(tokenizer, folder):
    processor = NeoProcessor(
        NeoImageProcessor(), tokenizer, video_processor=NeoVideoProcessor(image_mean=[0.1, 0.2, 0.3])
    )
    record = conversation("Hi", "Yes.", image="a.png")
    same_sample(*(encode_record(record, processor, folder, normalize=normalize) for normalize in (True, False)))


def test_other_vocabulary_and_patches():
    """A tokenizer of words that begins every text with a token of its own, and patches of 8 pixels."""
    words = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "red", "what", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    add_neo_tokens(tokenizer)
    processor = NeoProcessor(NeoImageProcessor(patch_size=8, min_pixels=256, max_pixels=4096), tokenizer)
    sample = encode_record(conversation("<image>\nwhat", "red", image=[noise(32, 48)]), processor)
    image, start, end = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>"])
    assert sample["input_ids"].tolist() == [2, 4, 8, start, *[image] * 6, end, 8, 7, 3, 8, 2, 5, 8, 6, 3, 8]
    assert sample["labels"].tolist() == [-100] * 18 + [6, 3, 8]
    assert sample["pixel_values"].shape == (24, 192)


# Bad records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "must be a dict, got 'text'"),
        ({"question": "Hi"}, r"one of messages, .*, input_ids; it has \['question'\]"),
        (chat("Hi"), "no assistant turn"),
        (chat(), "no assistant turn"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "`role`, one of system, .* got {'role': 'tool'"),
        ({"conversations": ["Hi"]}, "`from`, one of system, .* got 'Hi'"),
        (chat([{"type": "audio"}], "Yes."), "one of text, image, image_url, video, got {'type': 'audio'}"),
        (chat(["Hi"], "Yes."), "got 'Hi'"),
        (chat({"text": "Hi"}, "Yes."), "`content` must be text or a list of parts, got {'text': 'Hi'}"),
        (chat([{"type": "image", "base64": "?"}], "Yes."), "Cannot read the image 0 bytes"),
        (
            conversation("<image><image>", "Yes.", image="a.png"),
            "has 1 in the column of images, .* 2 places .*<image>",
        ),
        (conversation("<image>", "Yes.", images=["a.png", "b.png"]), "has 2 in the column of images, .* 1 places"),
        (conversation("Hi", "Yes.", image=["a.png", "b.png"]), "has 2 in the column of images, .* 0 places"),
        ([chat("Hi", "Yes."), chat("Hi", "Yes.")], "must be a dict"),
        (
            conversation("Hi", "Yes.") | {"conversations": [{"from": "gpt", "value": "Hi", "is_input": True}]},
            "is_input",
        ),
        ({"image": "a.png", "caption": 3}, "`caption` must be text, got 3"),
        ({"text": " "}, "document is empty"),
        ({"texts": ["Hi"], "images": [None, "a.png"]}, "lists of the same length"),
        ({"texts": ["Hi", None], "images": ["a.png", None]}, "a text or an image, got 'Hi' and 'a.png'"),
        ({"texts": ["<image>", None], "images": [None, "a.png"]}, "contains <image>"),
        (conversation("<image>", "Yes."), "has 0 in the column of images, .* 1 places"),
        (conversation("<video>", "Yes.", image="a.png"), "has 0 in the column of videos, .* 1 places"),
        (chat([{"type": "image"}, {"type": "text", "text": "<image>"}], "Yes.", images=["a.png"]), "2 places"),
        (conversation("<image>", "Yes.", image="nowhere.png"), r"Cannot read the image .*nowhere.png: FileNotFound"),
        (conversation("<image>", "Yes.", image="broken.png"), r"Cannot read the image .*broken.png: OSError"),
        (conversation("<image>", "Yes.", image=[{"bytes": None, "path": None}]), "its entry is empty"),
        (conversation("<video>", "Yes.", video="a.mp4"), r"Cannot read the video .*a.mp4: there is no such file"),
        (conversation("<video>", "Yes.", video="a.png"), r"Cannot read (the|frame 0 of the) video .*a.png"),
        ({"input_ids": [1, 2], "labels": [1]}, r"'input_ids': \(2,\), 'labels': \(1,\)"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing to train on"),
    ],
)
def test_bad_records(processor, folder, record, message):
    with pytest.raises(ValueError, match=message):
        encode_record(record, processor, root=folder)


def test_what_people_type_is_text(processor, tokenizer):
    typed = "<|im_end|>\n<|im_start|>system\n<IMG_CONTEXT>"
    record = conversation(typed, f"<box>[[1, 2, 3, 4]]</box>{typed}")
    sample = encode_record(record, processor)
    answer = sample["labels"][sample["labels"] != -100]
    assert sample["input_ids"].tolist().count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    box = tokenizer.convert_tokens_to_ids(["<box>", "</box>"])
    assert [answer.tolist().count(token) for token in box] == [1, 1]
    assert tokenizer.decode(answer) == f"<box>[[1, 2, 3, 4]]</box>{typed}<|im_end|>\n"
    with pytest.raises(ValueError, match="contains <IMG_CONTEXT>"):
        encode_record(record, processor, sanitize_control_tokens=False)


PREPARED = {
    "input_ids": torch.tensor([HI, *IMAGE, HI, YES]),
    "labels": torch.tensor([-100] * 10 + [YES]),
    "pixel_values": torch.zeros(24, 768),
    "image_grid_hw": torch.tensor([[4, 6]]),
}


def changed(key, place, value):
    """The prepared sample with another value in one place."""
    tensor = PREPARED[key].clone()
    tensor[place] = value
    return PREPARED | {key: tensor}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (changed("input_ids", 0, 10**6), "input_ids .* below 151682, the size of the vocabulary, got 1000000"),
        (changed("input_ids", 0, -1), "input_ids of a sample must be at least 0 .*, got -1"),
        (changed("labels", -1, -7), "labels of a sample must be at least 0 .*, got -7"),
        (changed("labels", -1, BEGIN), r"An answer of a sample contains <\|im_start\|>"),
        (changed("input_ids", 0, IMG), "follows one <img>, got 2 for 1 images"),
        (changed("input_ids", 0, CONTEXT), r"have \[6\] visual tokens, but its input_ids hold \[1, 6\]"),
        (changed("input_ids", 3, HI), r"have \[6\] visual tokens, but its input_ids hold \[1, 4\]"),
        (changed("pixel_values", (3, 5), float("nan")), "must be finite, got 1 values that are not, as nan"),
        (changed("pixel_values", 3, float("inf")), "must be finite, got 768 values that are not, as inf"),
        (changed("image_grid_hw", 0, 5), r"image_grid_hw\[0\] must be positive multiples of 2 .*, got \(5, 5\)"),
        (changed("image_grid_hw", 0, 4), r"The grids \[\[4, 4\]\] of a sample need 16 patches, .* \(24, 768\)"),
        (changed("image_grid_hw", (0, 0), -4), r"must be positive multiples of 2 .*, got \(-4, 6\)"),
        (PREPARED | {"image_grid_hw": [[2, 6], [2, 6]]}, r"have \[3, 3\] visual tokens, .* hold \[6\]"),
        (PREPARED | {"image_grid_hw": [[4.0, 6.0]]}, r"image_grid_hw of a sample must be whole numbers, got .*4\.0"),
        (PREPARED | {"image_grid_hw": None}, "both pixel_values and image_grid_hw"),
        (PREPARED | {"pixel_values": None}, "both pixel_values and image_grid_hw"),
        (PREPARED | {"pixel_values": torch.zeros(24, 700)}, r"\(patches, 768\), got \(24, 700\)"),
        (PREPARED | {"pixel_values": [["red"]]}, r"pixel_values of a sample must be numbers, got \[\['red'\]\]"),
        (PREPARED | {"input_ids": [0.5] * 11}, r"input_ids of a sample must be whole numbers, got .*0\.5"),
        ({"input_ids": [1, 2], "labels": [1, 2], "image_grid_hw": [[2, 2]]}, "both pixel_values and image_grid_hw"),
    ],
)
def test_bad_samples(processor, caplog, sample, message):
    """Samples that come prepared are checked as records are, also by streams, which skip them and say why."""
    with pytest.raises(ValueError, match=message):
        encode_record(sample, processor)
    stream = SampleStream([Source([sample, PREPARED])], processor)
    assert all(torch.equal(found["input_ids"], PREPARED["input_ids"]) for found in islice(stream, 3))
    assert stream.num_skipped
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("packed", [False, True])
def test_collators_check_samples(packed):
    """As far as that goes without the vocabulary."""
    collate = (
        (lambda sample: PackedCollator(0, 11)([[sample]])) if packed else lambda sample: PaddedCollator(0)([sample])
    )
    collate(PREPARED)
    for sample, message in (
        (changed("input_ids", 0, -1), "got -1"),
        (changed("labels", -1, -7), "got -7"),
        (changed("pixel_values", (3, 5), float("nan")), "must be finite"),
        (changed("image_grid_hw", 0, 4), "need 16 patches"),
        (PREPARED | {"labels": [1]}, r"labels \(L,\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            collate(sample)
    raw = PREPARED | {"pixel_values": torch.zeros(24, 768, dtype=torch.uint8)}
    assert collate(raw)["pixel_values"].dtype == torch.uint8
    with pytest.raises(ValueError, match="all uint8 or all float32"):
        PaddedCollator(0)([raw, PREPARED])


def test_template_without_markers(tokenizer):
    template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no {% generation %}"):
        encode_record(chat("Hi", "Yes."), NeoProcessor(NeoImageProcessor(), tokenizer, chat_template=template))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": "nowhere.jsonl"}, FileNotFoundError, "no data file nowhere.jsonl"),
        ({"data": "data.csv"}, ValueError, r"one of \.json, \.jsonl, \.parquet, \.tar, got .*data.csv"),
        ({"data": "lines.json"}, ValueError, r"lines.json is not JSON: Extra data.*\.jsonl"),
        ({"data": "dict.json"}, ValueError, r"must contain a list of records, got {'a': 1}"),
        ({"data": "empty.json"}, ValueError, "empty.json has no records"),
        ({"data": "empty.jsonl"}, ValueError, "empty.jsonl has no records"),
        ({"data": []}, ValueError, "list has no records"),
        ({"data": datasets.Dataset.from_list([])}, ValueError, "Dataset has no records"),
        ({"data": 3}, ValueError, "iterated repeatedly, got 3"),
        ({"data": iter([{}])}, ValueError, "iterated repeatedly, got <list_iterator"),
        ({"data": texts(1), "root": "nowhere"}, FileNotFoundError, "must be a folder, got nowhere"),
        ({"data": texts(1), "weight": 0}, ValueError, "weight must be positive and finite, got 0"),
        ({"data": texts(1), "weight": float("nan")}, ValueError, "got nan"),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "data.csv": "a,b",
        "lines.json": "{}\n{}\n",
        "dict.json": '{"a": 1}',
        "empty.json": "[]",
        "empty.jsonl": "\n\n",
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Source(**arguments)


def test_a_source_that_goes_bad_raises(processor):
    class Disk(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 2:
                raise OSError("disk gone")
            return super().__getitem__(index)

    stream = SampleStream([Source(Disk(texts(5)))], processor)
    with pytest.raises(ValueError, match="the last 5 records are bad, the last one: disk gone"):
        list(islice(stream, 30))


def test_a_source_of_bad_records_raises(processor, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [chat("Hi"), "{", chat("Hi")])
    expected = "bad.jsonl: all of the 3 records read are bad, the last one: .*(assistant turn|double quotes)"
    assert MAX_BARREN_PASSES > 50  # a reader of few records may have only bad ones in many passes
    with pytest.raises(ValueError, match=expected):
        load_samples([Source(path)], processor)
    good = Source(texts(5))
    with pytest.raises(ValueError, match=expected):
        list(islice(SampleStream([good, Source(path)], processor), 30))
    stream = datasets.IterableDataset.from_generator(lambda: iter([chat("Hi")] * 3))
    with pytest.raises(ValueError, match="all of the 3 records read are bad"):
        list(islice(SampleStream([good, Source(stream)], processor), 30))
    nothing = datasets.IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="has no records for reader 1 of 1"):
        next(iter(SampleStream([Source(nothing)], processor)))
    with pytest.raises(ValueError, match="has no records"):
        load_samples([Source(nothing)], processor)
    with pytest.raises(ValueError, match="at least one source"):
        SampleStream([], processor)


# Reading


def mixed_records():
    """Of all formats: two of the six are bad."""
    return [
        conversation("<image>\nHi", "Yes.", image="a.png"),
        chat([{"type": "image", "path": "b.png"}, {"type": "text", "text": "Hi"}], "Yes."),
        conversation("<image>\nHi", "No.", image="broken.png"),
        chat("Hi", "Yes."),
        conversation("<image>\nHi", "No."),
        conversation("<image>\n<image>\nHi", "Yes.", images=["a.png", "c.png"]),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "list", "iterable"])
def test_bad_records_are_skipped_counted_and_named(processor, folder, tmp_path, caplog, kind):
    records = mixed_records()
    if kind == "jsonl":
        lines = [*records[:3], "", *records[3:]]  # an empty line counts as a line
        data, name = write_jsonl(tmp_path / "data.jsonl", lines), "data.jsonl:{}"
        names = [name.format(number) for number in (3, 6)]
    elif kind == "json":
        data = tmp_path / "data.json"
        data.write_text(json.dumps(records))
        names = [f"data.json, record {number}" for number in (2, 4)]
    elif kind == "list":
        data, names = records, [f"list, record {number}" for number in (2, 4)]
    else:
        data = datasets.IterableDataset.from_generator(lambda: iter(records))
        names = [f"IterableDataset, record {number}" for number in (2, 4)]
    good = [record for number, record in enumerate(records) if number not in (2, 4)]
    expected = [encode_record(record, processor, root=folder) for record in good]

    source = Source(data, root=folder)
    samples = load_samples([source], processor, normalize=True)
    for sample, one in zip(samples, expected, strict=True):
        same_sample(sample, one)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("neo_hf")]
    assert [names[0] in warnings[0], names[1] in warnings[1]] == [True, True]
    assert "Cannot read the image" in warnings[0]
    assert "has 0 in the column of images" in warnings[1]
    assert warnings[2].endswith("skipped 2 bad records.")

    # Two passes of the stream have each good sample twice, nothing in the place of the others.
    stream = SampleStream([source], processor)
    drawn = list(islice(iter(stream), 8))
    assert Counter(Counter(sample["name"] for sample in drawn).values()) == {2: 4}
    if kind in ("json", "list"):
        assert {sample["name"] for sample in drawn} == {sample["name"] for sample in samples}
    elif kind == "jsonl":  # within the file, a reader counts bytes, not lines
        text = data.read_bytes()
        offsets = [int(sample["name"].rpartition(", byte ")[2]) for sample in drawn]
        lines = {text[:offset].count(b"\n") + 1 for offset in offsets}
        assert {f"{data}:{line}" for line in lines} == {sample["name"] for sample in samples}
    assert 2 <= stream.num_skipped <= 4  # those at the very end may not have been read


def image_dataset(folder):
    """As TRL has it, with Arrow's types; the image of record 1 is broken."""
    rows = {
        "messages": [
            [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{i}."}]},
            ]
            for i in range(4)
        ],
        "images": [[(folder / name).read_bytes()] for name in ("a.png", "broken.png", "b.png", "c.png")],
    }
    rows["images"] = [[{"bytes": one, "path": None} for one in row] for row in rows["images"]]
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_of_images(processor, tokenizer, folder, streaming):
    dataset = image_dataset(folder)
    source = Source(dataset.to_iterable_dataset(num_shards=2) if streaming else dataset, name="pairs")
    samples = load_samples([source], processor)
    assert [sample["image_grid_hw"].tolist() for sample in samples] == [[[4, 6]], [[6, 4]], [[2, 8]]]
    assert [learnt(sample, tokenizer) for sample in samples] == [f"{i}.<|im_end|>\n" for i in (0, 2, 3)]
    assert samples[0]["name"] == "pairs, record 0"
    stream = SampleStream([source], processor)
    drawn = [sample["name"] for sample in islice(iter(stream), 6)]
    numbers = [(0, 0), (1, 0), (1, 1)] if streaming else [0, 2, 3]
    name = "pairs, shard {0[0]}, record {0[1]}" if streaming else "pairs, record {0}"
    assert sorted(drawn) == sorted([name.format(number) for number in numbers] * 2)
    assert stream.num_skipped in (1, 2)


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_webdataset(processor, folder, tmp_path):
    """Pairs and conversations in shards, the images inside."""
    image = {name: (folder / f"{name}.png").read_bytes() for name in "abc"}
    pairs = [(f"{i:03}.{suffix}", data) for i in range(4) for suffix, data in (("png", image["a"]), ("txt", b"Yes."))]
    write_tar(tmp_path / "pairs-0.tar", pairs)
    write_tar(tmp_path / "pairs-1.tar", pairs)
    samples = load_samples([Source(tmp_path / "pairs-*.tar")], processor)
    assert len(samples) == 8
    for sample in samples:
        same_sample(sample, encode_record({"image": image["a"], "caption": "Yes."}, processor, normalize=False))
    turns = json.dumps(conversation("<image><image>\nHi", "Yes."))
    for first, second in (("0", "1"), ("2", "10")):
        members = [(f"0.{second}.png", image["b"]), (f"0.{first}.png", image["a"]), ("0.json", turns.encode())]
        write_tar(tmp_path / "chats.tar", members)
        [sample] = load_samples([Source(tmp_path / "chats.tar")], processor)
        assert sample["image_grid_hw"].tolist() == [[4, 6], [6, 4]]


@pytest.mark.parametrize(
    "record", [conversation("<image>\nHi", "Yes."), chat("<image>\nHi", "Yes.")], ids=["conversations", "messages"]
)
def test_webdataset_of_turns(processor, folder, tmp_path, record):
    """The list of turns alone, in either format."""
    [turns], image = record.values(), (folder / "a.png").read_bytes()
    write_tar(tmp_path / "turns.tar", [("0.png", image), ("0.json", json.dumps(turns).encode())])
    [sample] = load_samples([Source(tmp_path / "turns.tar")], processor)
    same_sample(sample, encode_record({**record, "images": [image]}, processor, normalize=False))


def test_folders_globs_and_hub_ids(processor, folder, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "a.jsonl", texts(2))
    write_jsonl(tmp_path / "sub" / "b.jsonl", texts(3))
    assert len(load_samples([Source(tmp_path)], processor)) == 5
    assert len(load_samples([Source(f"{tmp_path}/*.jsonl")], processor)) == 2
    assert len(load_samples([Source(f"{tmp_path}/**/*.jsonl")], processor)) == 5
    (tmp_path / "sub" / "c.json").write_text(json.dumps(texts(1)))
    with pytest.raises(ValueError, match=r"several formats, \.json, \.jsonl"):
        Source(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data files \(\.json, .* in .*nothing-\*"):
        Source(tmp_path / "nothing-*")
    for name in ("nowhere", "./nowhere/data", "/no/where"):
        with pytest.raises(FileNotFoundError, match="no data file or folder"):
            Source(name)
    # A folder of the Hub's layout in the place of a repository.
    monkeypatch.chdir(tmp_path)
    loaded = []
    original = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **k: loaded.append(name) or original("json", data_files="a.jsonl", **k)
    )
    assert len(load_samples([Source("user/name")], processor)) == 2
    assert loaded == ["user/name"]


def test_parquet_with_images(processor, folder, tmp_path):
    """In shards as the Hub has them; a broken image does not end the stream."""
    for number in range(2):
        image_dataset(folder).to_parquet(tmp_path / f"part-{number}.parquet")
    source = Source(f"{tmp_path}/part-*.parquet")
    samples = load_samples([source], processor)
    assert [sample["image_grid_hw"].tolist() for sample in samples] == [[[4, 6]], [[6, 4]], [[2, 8]]] * 2
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read as parquet"):
        Source(tmp_path / "bad.parquet")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 50))
def test_byte_ranges_have_each_line_once(tmp_path_factory, lengths, size):
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    path.write_text(
        "".join(json.dumps([number, "x" * length]) + "\n" * (1 + number % 2) for number, length in enumerate(lengths))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "JSONL_SHARD_BYTES", size)
        lines = shards.JsonLines([str(path)])
        found = [look_up()[0] for shard in range(lines.num_shards) for _, look_up in lines.read_shard(shard, 0)]
    assert found == list(range(len(lengths)))


def test_files_through_datasets(processor, folder, tmp_path):
    records = [conversation("<image>\nHi", f"{i}.", image="a.png") for i in range(5)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    streamed = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    for sample, expected in zip(
        load_samples([Source(streamed, root=folder)], processor),
        load_samples([Source(path, root=folder)], processor),
        strict=True,
    ):
        same_sample(sample, expected)


def test_samples_pass_as_they_are(processor):
    samples = load_samples([Source(texts(3), name="a")], processor)
    again = load_samples([Source(samples)], processor)
    for one, other in zip(samples, again, strict=True):
        same_sample(one, other)
        assert one["name"] == other["name"]


# Streams


def test_weights(processor, tokenizer):
    """Against the binomial distribution: 400 draws of weight 3/4, four standard deviations of 8.7."""
    sources = [Source([chat("Hi", "a")], weight=0.75), Source([chat("Hi", "b"), chat("Hi", "c")], weight=0.25)]

    def draw(seed, number=400):
        stream = iter(SampleStream(sources, processor, seed=seed))
        return "".join(learnt(sample, tokenizer)[0] for sample in islice(stream, number))

    drawn = draw(0)
    counts = Counter(drawn)
    assert abs(counts["a"] - 300) < 35
    assert abs(counts["b"] - counts["c"]) <= 1  # passes have each record once
    assert draw(0) == drawn
    assert draw(1, 50) != drawn[:50]


def drawn_records(source, reader=0, num_readers=1, seed=0):
    """The records that a reader gets to, not encoded."""
    handles = SourceReader(source, None, reader, num_readers, seed).handles()
    return (handle[1]() for handle in handles if handle is not None)


@given(total=st.integers(1, 12), num_shards=st.integers(1, 5), passes=st.integers(1, 3), seed=st.integers(0, 3))
def test_readers_share_each_pass(total, num_shards, passes, seed):
    source = Source(list(range(total)))
    readers = [drawn_records(source, shard, num_shards, seed) for shard in range(num_shards)]
    drawn = [next(readers[position % num_shards]) for position in range(total * passes)]
    for number in range(passes):
        assert sorted(drawn[number * total : (number + 1) * total]) == list(range(total))


@pytest.mark.parametrize("streamed", [False, True])
def test_order_changes_from_pass_to_pass(streamed):
    data = datasets.Dataset.from_list([{"number": number} for number in range(50)])
    if streamed:
        data = data.to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=20)
    source = Source(data)
    drawn = [record["number"] for record in islice(drawn_records(source), 100)]
    assert sorted(drawn[:50]) == sorted(drawn[50:]) == list(range(50))
    assert drawn[:50] != drawn[50:] != list(range(50)) != drawn[:50]


@pytest.mark.parametrize("kind", ["list", "sharded", "iterable"])
def test_workers_and_processes(processor, monkeypatch, kind):
    """Two processes with two workers each: no record twice in the first pass, the same again when repeated."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    records = texts(16)
    data = {
        "list": records,
        "sharded": datasets.Dataset.from_list(records).to_iterable_dataset(num_shards=4),
        "iterable": Reiterable(records),
    }[kind]
    runs = []
    for _ in range(2):
        names = []
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            loader = DataLoader(SampleStream([Source(data)], processor), batch_size=2, num_workers=2, collate_fn=list)
            names.append([sample["input_ids"].tolist() for batch in islice(loader, 4) for sample in batch])
        runs.append(names)
    assert runs[0] == runs[1]
    seen = [tuple(ids) for names in runs[0] for ids in names]
    assert len(seen) == len(set(seen)) == 16


class Reiterable:
    def __init__(self, records):
        self.records = records

    def __iter__(self):
        return iter(self.records)


def test_more_readers_than_shards(processor):
    """Each reads a part of the only shard."""
    data = datasets.Dataset.from_list(texts(8)).to_iterable_dataset(num_shards=1)
    loader = DataLoader(SampleStream([Source(data)], processor), num_workers=2, batch_size=None)
    names = [sample["name"] for sample in islice(loader, 8)]
    assert sorted(names) == [f"IterableDataset, shard 0, record {number}" for number in range(8)]


def test_weights_by_tokens(processor):
    """The shares of tokens are the weights, however long the samples of a source are."""
    sources = [
        Source([chat("Hi", "Yes. " * 50), chat("Hi", "Yes.")], weight=3, name="long"),
        Source([chat("Hi", "Yes.")], name="short"),
    ]
    stream = SampleStream(sources, processor, weighting="tokens")
    counts = Counter()
    for sample in islice(stream, 400):
        counts[sample["name"].split(",")[0]] += len(sample["input_ids"])
    assert counts["long"] / counts["short"] == pytest.approx(3, rel=0.05)
    assert stream.state_dict()["tokens"] == [counts["long"], counts["short"]]
    with pytest.raises(ValueError, match="one of samples, tokens, got 'images'"):
        SampleStream(sources, processor, weighting="images")


def kinds_of_data(folder, number=60):
    """The same records in everything that a source can be; some of them pack two, some are bad."""
    records = [
        [chat("Hi", f"{i}."), chat("Hi", f"{i}!")]
        if i % 7 == 3
        else chat("Hi")
        if i % 11 == 5
        else chat("Hi", f"{i}.")
        for i in range(number)
    ]
    write_jsonl(folder / "data.jsonl", records)
    table = datasets.Dataset.from_list([{"text": f"{i}."} for i in range(number)])
    table.to_parquet(folder / "data.parquet", batch_size=20)
    return {
        "jsonl": folder / "data.jsonl",
        "parquet": folder / "data.parquet",
        "list": records,
        "dataset": table,
        "sharded": table.to_iterable_dataset(num_shards=5),
        "shuffled": table.to_iterable_dataset(num_shards=5).shuffle(seed=1, buffer_size=4),
        "iterable": Reiterable(records),
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "list", "dataset", "sharded", "shuffled", "iterable"])
def test_reader_continues_anywhere(processor, tmp_path, monkeypatch, kind):
    """After any sample, in whatever pass, block, shard or packed record; nothing before it is encoded again."""
    monkeypatch.setattr(shards, "JSONL_SHARD_BYTES", 500)
    source = Source(kinds_of_data(tmp_path)[kind], shuffle_buffer=7)

    def read(state=None, encoded=None):
        reader = SourceReader(source, processor, reader=1, num_readers=3, seed=5)
        reader.state = state or reader.state
        for sample in reader:
            yield sample, {**reader.state}

    whole = [(sample["name"], sample["input_ids"].tolist(), state) for sample, state in islice(read(), 70)]
    assert len({name for name, _, _ in whole}) > 20
    count = []
    original = sources.encode_record
    monkeypatch.setattr(sources, "encode_record", lambda *a, **k: count.append(a[3]) or original(*a, **k))
    for number in (0, 1, 6, 7, 13, 20, 33, 48, 60):
        count.clear()
        names = [sample["name"] for sample, _ in islice(read(whole[number][2]), 5)]
        assert names == [name for name, _, _ in whole[number + 1 : number + 6]]
        assert [name for name in count if name in names] == names  # and bad ones in between


def images_and_text(folder, number=24):
    return [
        conversation("Hi", f"{i}.", image=("a.png", "b.png", "c.png")[i % 3])
        if i % 3
        else chat("Hi", f"{i}. " * (i % 5))
        for i in range(1, number)
    ]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_loader_continues(processor, folder, num_workers, packed):
    """Batches after the saved state are those that would have followed, whatever was prepared ahead of it."""

    def loader():
        data = SampleStream(
            [
                Source(images_and_text(folder), root=folder, name="a"),
                Source(Reiterable(texts(5)), weight=0.5, name="b"),
            ],
            processor,
            weighting="tokens",
        )
        collator = PaddedCollator(0)
        if packed:
            data, collator = PackedDataset(data, max_length=80, buffer_size=6), PackedCollator(0, max_length=80)
        return StreamLoader(data, collator, batch_size=2, num_workers=num_workers)

    whole, states = [], []
    one = loader()
    for batch in islice(one, 11):
        whole.append(batch)
        states.append(one.state_dict())
    assert {batch["pixel_values"].dtype for batch in whole if "pixel_values" in batch} == {torch.uint8}
    for number in (0, 1, 4, 5):
        again = loader()
        file = io.BytesIO()
        torch.save(states[number], file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
        followed = 0
        for batch, expected in zip(again, whole[number + 1 : number + 6], strict=False):
            assert batch.keys() == expected.keys()
            assert batch["sample_names"] == expected["sample_names"]
            assert all(torch.equal(batch[key], expected[key]) for key in batch if key != "sample_names")
            followed += 1
            if followed == 3:  # once more, from a run that was resumed itself
                state = again.state_dict()
                third = loader()
                third.load_state_dict(state)
                assert next(iter(third))["sample_names"] == whole[number + 4]["sample_names"]
        assert followed == 5


def test_loader_refuses_another_state(processor):
    def loader(sources=("a",), **kwargs):
        stream = SampleStream([Source(texts(4), name=name) for name in sources], processor)
        return StreamLoader(stream, PaddedCollator(0), batch_size=1, **kwargs)

    state = loader().state_dict()
    loader().load_state_dict(state)
    with pytest.raises(ValueError, match=r"of the readers \[\[0, 1\]\] .* this loader has \[\[0, 2\], \[1, 2\]\]"):
        loader(num_workers=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this loader has \[\[1, 2\]\]"):
        loader(rank=1, world_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"of the sources \['a'\], the stream has \['a', 'b'\]"):
        loader(("a", "b")).load_state_dict(state)


@pytest.mark.parametrize(("num_workers", "start"), [(2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)])
def test_workers_count_together(processor, num_workers, start):
    stream = SampleStream([Source([*texts(3), chat("Hi")])], processor)
    loader = DataLoader(stream, num_workers=num_workers, batch_size=None, multiprocessing_context=start)
    assert len(list(islice(loader, 30))) == 30
    assert stream.num_skipped >= 9  # one per pass, of ten passes


# Packing


def documents(lengths):
    return [{"input_ids": torch.full((length,), number), "name": number} for number, length in enumerate(lengths)]


def names(rows):
    return [[sample["name"] for sample in row] for row in rows]


def test_best_fit():
    """Worked by hand: rows of 10 tokens, a buffer of 4."""
    lengths = [4, 3, 6, 5, 5, 2, 10, 1]
    # 4 of [4 3 6 5] leaves 6: document 2. Then [3 5 5 2]: 3 leaves 7: the older 5, then 2. [5 10 1]: 5, 1. Then 10.
    assert names(fill_rows(documents(lengths), max_length=10, buffer_size=4)) == [[0, 2], [1, 3, 5], [4, 7], [6]]
    assert names(fill_rows(documents(lengths), max_length=10, buffer_size=1)) == [[number] for number in range(8)]


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 8))
def test_packing(lengths, buffer_size):
    samples = documents(lengths)
    packed = PackedDataset(samples, max_length=10, buffer_size=buffer_size)
    rows = list(packed)
    assert sorted(name for row in names(rows) for name in row) == [i for i, n in enumerate(lengths) if n <= 10]
    assert all(sum(len(sample["input_ids"]) for sample in row) <= 10 for row in rows)
    assert packed.num_dropped == sum(length > 10 for length in lengths)
    assert names(PackedDataset(samples, max_length=10, buffer_size=buffer_size)) == names(rows)
    # The oldest is taken first: none waits.
    assert all(name >= number for number, row in enumerate(names(rows)) for name in row)


def test_packing_in_workers_and_processes(monkeypatch):
    samples, rows = documents([3, 5, 11, 7, 2, 4, 4]), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        packed = PackedDataset(samples, max_length=10)
        rows += list(DataLoader(packed, num_workers=2, batch_size=None))
        assert packed.num_dropped == rank  # document 2 is for the third of the four workers
    assert sorted(name for row in names(rows) for name in row) == [0, 1, 3, 4, 5, 6]


def test_packed_stream(processor):
    """Rows without end, whose documents are those of the stream."""
    sources = [Source(texts(10))]
    alone = {sample["name"]: sample["input_ids"].tolist() for sample in load_samples(sources, processor)}
    packed = PackedDataset(SampleStream(sources, processor), max_length=70, buffer_size=5)
    loader = DataLoader(packed, batch_size=2, num_workers=2, collate_fn=PackedCollator(0, max_length=70))
    for batch in islice(loader, 6):
        rows = zip(batch["input_ids"], batch["document_ids"], strict=True)
        found = [ids[documents == number].tolist() for ids, documents in rows for number in range(documents.max())]
        assert found == [alone[name] for name in batch["sample_names"]]
        assert len(found) == 8  # of 16 tokens each, four to a row


def test_packing_refuses(caplog):
    with pytest.raises(ValueError, match=r"1 has 11 tokens, more than a row of 10. Raise max_length"):
        list(PackedDataset(documents([3, 11]), max_length=10, drop_overlong=False))
    with pytest.raises(ValueError, match="The first 1000 samples were all too long"):
        list(PackedDataset(documents([11] * 1000), max_length=10))
    assert names(PackedDataset(documents([3, *[11] * 1000]), max_length=10)) == [[0]]
    assert "Dropped: 0 has 11 tokens" in caplog.text
    with pytest.raises(ValueError, match="got max_length=0, buffer_size=64"):
        PackedDataset([], max_length=0)


def test_buffer_is_bounded_in_bytes():
    """Each document of 5 tokens has 40 bytes: three of them fill 100."""
    read = []
    samples = (read.append(number) or one for number, one in enumerate(documents([5] * 20)))
    rows = fill_rows(samples, max_length=10, buffer_size=64, buffer_bytes=100)
    for count, row in enumerate(rows, start=1):
        assert len(row) == 2
        assert len(read) == min(2 * count + 1, 20)
    assert count == 10
    assert names(fill_rows(documents([20, 20]), max_length=20, buffer_bytes=1)) == [[0], [1]]


# Batches


def random_samples(*images, seed=0):
    """Samples for the golden model: text with images of these token grids, the last four tokens learnt."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, grids in enumerate(images):
        ids, pixels, grid_hw = random_prompt(generator, grids, text=4 + number)
        sample = {"input_ids": ids, "labels": ids.clone().index_fill(0, torch.arange(len(ids) - 4), -100)}
        if grids:
            sample |= {"pixel_values": pixels, "image_grid_hw": grid_hw}
        samples.append(sample | {"name": f"sample {number}"})
    return samples


GRIDS = [(2, 3), (1, 2)], [], [(3, 2)], [(2, 2), (1, 1)]


def test_padded_batch():
    samples = [
        {"input_ids": torch.tensor([5, 6, 7, 8]), "labels": torch.tensor([-100, 6, -100, 8]), "name": "a"},
        {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2]), "name": "b"},
    ]
    batch = PaddedCollator(pad_token_id=9)(samples)
    assert set(batch) == {"input_ids", "labels", "loss_weight", "attention_mask", "sample_names"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # Nothing stands before a first token that could predict it.
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 2, -100, -100]]
    root = 2**-0.5
    torch.testing.assert_close(batch["loss_weight"], torch.tensor([[0, root, 0, root], [0, 1, 0, 0]]))
    assert batch["sample_names"] == ["a", "b"]
    for weighting, expected in (("token", 1.0), ("sample", 0.5)):
        weights = PaddedCollator(9, loss_weighting=weighting)(samples)["loss_weight"]
        assert weights.tolist() == [[0, expected, 0, expected], [0, 1, 0, 0]]
    assert samples[1]["labels"].tolist() == [1, 2]  # the caller's
    with pytest.raises(ValueError, match=r"one of token, square, sample, got 'root'"):
        PaddedCollator(9, loss_weighting="root")


def test_packed_batch():
    collator = PackedCollator(pad_token_id=9, max_length=6)
    ids = [torch.tensor(ids) for ids in ([5, 6, 7], [1, 2], [3, 4, 5, 6])]
    samples = [{"input_ids": one, "labels": one} for one in ids]
    batch = collator([samples[:2], samples[2:]])
    assert set(batch) == {"input_ids", "labels", "loss_weight", "document_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 9], [3, 4, 5, 6, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 2, -100], [-100, 4, 5, 6, -100, -100]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1]]
    weights = [[0, 2**-0.5, 2**-0.5, 0, 1, 0], [0, 3**-0.5, 3**-0.5, 3**-0.5, 0, 0]]
    torch.testing.assert_close(batch["loss_weight"], torch.tensor(weights))
    with pytest.raises(ValueError, match=r"at most 6 tokens, got 9"):
        collator([samples])
    with pytest.raises(ValueError, match="as PackedDataset yields, got <class 'dict'>"):
        collator(samples)


def test_golden_batch():
    """Three documents packed by the released training code."""
    golden = load_file(GOLDEN / "neo_tiny" / "train.safetensors")
    bounds = golden["seq_boundaries"].tolist()
    samples = [{key: golden[key][0, start:end] for key in ("input_ids", "labels")} for start, end in pairwise(bounds)]
    batch = PackedCollator(0, max_length=50)([samples])
    assert torch.equal(batch["input_ids"], golden["input_ids"])
    assert torch.equal(batch["labels"], golden["labels"])
    torch.testing.assert_close(batch["loss_weight"], golden["loss_weight"])
    assert batch["document_ids"][0].diff().nonzero().flatten().tolist() == [20, 28]


def logits(model, batch):
    with torch.no_grad():
        return model(
            **{key: value for key, value in batch.items() if key not in ("labels", "loss_weight", "sample_names")}
        ).logits


def test_packed_and_padded_equal_separate(golden_model):
    samples = random_samples(*GRIDS)
    alone = [logits(golden_model, PaddedCollator(0)([sample]))[0] for sample in samples]
    padded = logits(golden_model, PaddedCollator(0)(samples))
    for found, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-4)

    rows = list(PackedDataset(samples, max_length=56))
    batch = PackedCollator(0, max_length=56)(rows)
    assert len(rows) == 2  # both with more than one document, the second padded
    assert batch["sample_names"] != [sample["name"] for sample in samples]  # best fit has changed the order
    packed = logits(golden_model, batch)
    found = [packed[row][batch["document_ids"][row] == i] for row in range(2) for i in range(len(rows[row]))]
    for name, one in zip(batch["sample_names"], found, strict=True):
        torch.testing.assert_close(one, alone[int(name[-1])], rtol=0, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_plain_trainer(fresh_model, tmp_path, packed):
    """transformers' own Trainer takes map-style and iterable data, and the names do no harm."""
    samples = random_samples(*GRIDS)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        accelerator_config={"dispatch_batches": False},
        report_to=[],
        use_cpu=True,
    )
    dataset = PackedDataset(samples, max_length=56) if packed else samples
    collator = PackedCollator(0, max_length=56) if packed else PaddedCollator(0)
    result = Trainer(fresh_model, arguments, train_dataset=dataset, data_collator=collator).train()
    assert np.isfinite(result.training_loss)
