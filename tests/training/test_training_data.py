"""Training data: from records to samples, streams, rows and batches."""

import base64
import json
import re
from collections import Counter
from itertools import islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from helpers import GOLDEN, random_prompt
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from neo_hf import NeoImageProcessor, NeoProcessor
from neo_hf.tokenization import add_neo_tokens
from neo_hf.training import (
    PackedCollator,
    PackedDataset,
    PaddedCollator,
    SampleStream,
    Source,
    encode_record,
    fill_rows,
    load_samples,
)

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
        ({"question": "Hi"}, r"one of messages, conversations, input_ids; it has \['question'\]"),
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
        (conversation("Hi", "Yes.", image="a.png"), "has 1 in the column of images, .* 0 places"),
        (conversation("<image>", "Yes."), "has 0 in the column of images, .* 1 places"),
        (conversation("<video>", "Yes.", image="a.png"), "has 1 in the column of images, .* 0 places"),
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


def test_template_without_markers(tokenizer):
    template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no {% generation %}"):
        encode_record(chat("Hi", "Yes."), NeoProcessor(NeoImageProcessor(), tokenizer, chat_template=template))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": "nowhere.jsonl"}, FileNotFoundError, "no data file nowhere.jsonl"),
        ({"data": "data.csv"}, ValueError, r"\.json or \.jsonl, got .*data.csv"),
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
    with pytest.raises(ValueError, match="are bad"):
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
    samples = load_samples([source], processor)
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
    assert set(sample["name"] for sample in drawn) == {sample["name"] for sample in samples}
    assert 3 <= stream.num_skipped <= 4  # those at the very end may not have been read


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
    assert sorted(drawn) == sorted([f"pairs, record {i}" for i in (0, 2, 3)] * 2)
    assert stream.num_skipped in (1, 2)


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


@given(total=st.integers(1, 12), num_shards=st.integers(1, 5), passes=st.integers(1, 3), seed=st.integers(0, 3))
def test_readers_share_each_pass(total, num_shards, passes, seed):
    source = Source(list(range(total)))
    readers = [source.draw(shard, num_shards, seed) for shard in range(num_shards)]
    drawn = [next(readers[position % num_shards])[0] for position in range(total * passes)]
    for number in range(passes):
        assert sorted(drawn[number * total : (number + 1) * total]) == list(range(total))


@pytest.mark.parametrize("streamed", [False, True])
def test_order_changes_from_pass_to_pass(streamed):
    data = datasets.Dataset.from_list([{"number": number} for number in range(50)])
    if streamed:
        data = data.to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=20)
    source = Source(data)
    drawn = [n if record is None else record["number"] for n, record in islice(source.draw(0, 1, seed=0), 100)]
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


def test_resumes_by_skipping_batches(processor):
    sources = [Source(texts(5), weight=2), Source(Reiterable(texts(3)))]
    rows = PackedDataset(SampleStream(sources, processor), max_length=50, buffer_size=4)
    loader = DataLoader(rows, batch_size=2, collate_fn=PackedCollator(0, max_length=50))
    uninterrupted = [batch["sample_names"] for batch in islice(loader, 6)]
    resumed = [batch["sample_names"] for batch in islice(skip_first_batches(loader, 3), 3)]
    assert resumed == uninterrupted[3:]


def test_too_few_shards_for_the_workers(processor):
    data = datasets.Dataset.from_list(texts(8)).to_iterable_dataset(num_shards=1)
    loader = DataLoader(SampleStream([Source(data)], processor), num_workers=2, batch_size=None)
    with pytest.raises(ValueError, match="has 1 shards, too few for the 2 workers"):
        list(islice(loader, 8))


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
