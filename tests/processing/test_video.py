"""Videos: which frames, which words, which patches."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from neo_hf import NeoImageProcessor, NeoProcessor, NeoVideoProcessor, video_reading_neo
from neo_hf.processing_neo import serialize_video
from neo_hf.video_processing_neo import flatten_videos, sample_frames
from neo_hf.video_reading_neo import DecordReader, PyAVReader

av = pytest.importorskip("av")
IMAGE, START, END = 151669, 151670, 151671


def metadata(total, fps, indices=None, **kwargs):
    return VideoMetadata(total_num_frames=total, fps=fps, frames_indices=indices, **kwargs)


def sample(total, video_fps, **settings):
    return sample_frames(metadata(total, video_fps), **settings)


def gray(number, height=32, width=64):
    """A frame that knows its number, as far as a byte does."""
    return np.full((height, width, 3), number % 256, dtype=np.uint8)


def write_video(path, frames, codec="mpeg4", rate=25, times=None):
    """`times` in milliseconds give a variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def prefix(span, count, fps):
    return (
        f"The time range of this video is {span}, and the following is a series of {count} frames sampled at {fps} "
        "FPS.\n"
    )


# Which frames


def test_by_count():
    # step = 250 / 9 = 27.78
    assert sample(250, 25, num_frames=8) == [27, 55, 83, 111, 138, 166, 194, 222]
    assert sample(2, 25, num_frames=1) == [1]
    assert sample(2, 25, num_frames=2) == [0, 1]
    assert sample(2, 25, num_frames=8) == [0, 0, 0, 0, 1, 1, 1, 1]  # repeats what there is
    assert sample(100, None, num_frames=3) == [25, 50, 75]  # no rate needed


def test_by_rate():
    assert sample(250, 25, fps=1, max_frames=128) == [0, 25, 50, 75, 100, 125, 150, 175, 200, 225]
    # 29.97 frames per second for 4.004 seconds: step 29.97 and 14.985.
    assert sample(120, 30000 / 1001, fps=1) == [0, 29, 59, 89]
    assert sample(120, 30000 / 1001, fps=2) == [0, 14, 29, 44, 59, 74, 89, 104]
    assert sample(2, 25, fps=1) == [0]  # 0.08 seconds: one at least
    assert sample(3, 2, fps=30) == [int(i / 15) for i in range(45)]
    # 10 frames do not fit in 4: step = 250 / 5 from the first frame on.
    assert sample(250, 25, fps=1, max_frames=4) == [0, 50, 100, 150]
    assert sample(250, 25, fps=1, max_frames=10) == sample(250, 25, fps=1, max_frames=None)
    # An hour and a minute at 30 frames per second: 3660 frames wanted.
    assert sample(109_800, 30, fps=1)[-1] == 109_770
    limited = sample(109_800, 30, fps=1, max_frames=128)
    assert limited[:3] + limited[-1:] == [0, 851, 1702, 108_097]


def test_other_sampling():
    assert sample(100, 25, num_frames=4, segment_centers=True) == [12, 37, 62, 87]
    assert sample(100, 25, frames_indices=[7, 3, 99]) == [7, 3, 99]
    # Seconds 2 to 4 are frames 50 to 99.
    assert sample(250, 25, num_frames=4, start=2, end=4) == [60, 70, 80, 90]
    assert sample(250, 25, fps=2, start=2, end=4) == [50, 62, 75, 87]
    assert sample(250, 25, fps=1, start=8) == [200, 225]
    assert sample(250, 25, fps=1, end=0.04) == [0]
    assert sample(30, 10, fps=10, start=0.7, end=1.1) == [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("total", "fps", "settings", "message"),
    [
        (100, 25, {"frames_indices": [3, 100]}, r"0 to 99, got \[100\]"),
        (100, 25, {"frames_indices": []}, r"0 to 99, got \[\]"),
        (100, 25, {"num_frames": 0}, "at least 1, got 0"),
        (100, 25, {"fps": 0}, "got fps=0"),
        (100, None, {"fps": 1}, "a video of None frames per second"),
        (100, None, {"num_frames": 1, "start": 1}, "needs the frame rate"),
        (100, 25, {"num_frames": 1, "start": 4}, "0 to 4.00 seconds .* got start=4, end=4.0"),
        (100, 25, {"num_frames": 1, "end": 5}, "got start=0.0, end=5"),
        (100, 25, {"num_frames": 1, "start": -1}, "got start=-1, end=4.0"),
        (100, 25, {"num_frames": 1, "start": 3, "end": 2}, "got start=3, end=2"),
        (100, 25, {"num_frames": 1, "start": 1.01, "end": 1.02}, "must hold a frame"),
    ],
)
def test_bad_sampling(total, fps, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(total, fps, **settings)


# Which words


def test_timestamps():
    assert serialize_video(metadata(250, 25, [27, 138])) == (
        prefix("[00:00-00:10]", 2, "0.2") + "[00:01.08]:<image>\n[00:05.52]:<image>\n"
    )
    assert serialize_video(metadata(120, 30000 / 1001, [0, 29, 59, 89])) == (
        prefix("[00:00-00:04]", 4, "1.0")
        + "[00:00.00]:<image>\n[00:00.97]:<image>\n[00:01.97]:<image>\n[00:02.97]:<image>\n"
    )
    # A clip of two frames: 0.08 seconds.
    assert serialize_video(metadata(2, 25, [0, 1])) == (
        prefix("[00:00-00:00]", 2, "25.0") + "[00:00.00]:<image>\n[00:00.04]:<image>\n"
    )
    # Two hours: minutes count on.
    assert serialize_video(metadata(216_000, 30, [0, 108_015, 215_999])) == (
        prefix("[00:00-120:00]", 3, "0.0") + "[00:00.00]:<image>\n[60:00.50]:<image>\n[119:59.97]:<image>\n"
    )
    # 59.998 seconds round up within their minute, as in training.
    assert "[00:60.00]:" in serialize_video(metadata(100_000, 1000, [59_998]))


def test_other_styles():
    known, unknown = metadata(100, 25, [25, 50]), metadata(100, None, [25, 50])
    spatial = "Frame1 is at [00:01.00]:<image>\nFrame2 is at [00:02.00]:<image>\n"
    assert serialize_video(known, "spatial_timestamps") == prefix("[00:00-00:04]", 2, "0.5") + spatial
    bare, numbered = "<image>\n<image>\n", "Frame-1: <image>\nFrame-2: <image>\n"
    assert serialize_video(known, "bare") == serialize_video(unknown, "timestamps") == bare
    assert serialize_video(known, "spatial") == serialize_video(unknown, "spatial_timestamps") == numbered
    assert serialize_video(metadata(250, 25, [50, 75]), start=2, end=4).startswith(prefix("[00:02-00:04]", 2, "1.0"))


def test_chat(processor, tokenizer):
    frames = np.stack([gray(number) for number in range(50)])
    image = Image.fromarray(gray(200, 64, 32))
    content = [
        {"type": "image", "image": image},
        {"type": "video", "video": frames},
        {"type": "text", "text": "Compare with "},
        {"type": "image", "image": image},
        {"type": "video", "video": [image, image]},
        {"type": "text", "text": "What?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [{"fps": 25, "total_num_frames": 50}, {}], "return_metadata": True},
    )
    assert [m.frames_indices for m in inputs.pop("video_metadata")] == [[0, 25], [0, 1]]
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "image_grid_hw"}
    # 32 x 64 pixels grow to 4096 at least, and the image of 64 x 32 likewise.
    assert inputs["image_grid_hw"].tolist() == [[6, 4]] + [[4, 6]] * 2 + [[6, 4]] * 3
    text = tokenizer.decode(inputs["input_ids"][0]).replace("<IMG_CONTEXT>" * 6, "6")
    assert text == (
        "<|im_start|>user\n<img>6</img>\n"
        + prefix("[00:00-00:02]", 2, "1.0")
        + "[00:00.00]:<img>6</img>\n[00:01.00]:<img>6</img>\n"
        "Compare with <img>6</img>\n<img>6</img>\n<img>6</img>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    # One stream in prompt order: each patch is of one gray.
    raw = inputs["pixel_values"][:, 0] * 0.229 * 255 + 0.485 * 255
    assert raw.round().int().reshape(6, 24).unique(dim=1).flatten().tolist() == [200, 0, 25, 200, 200, 200]


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_rows_of_a_batch(processor, return_tensors):
    image, tall = Image.fromarray(gray(9)), [gray(number, 96, 64) for number in range(4)]
    text = ["<video>\n<image>A<video>", "none", "B<image>", "<image><video>"]
    videos = [[tall[:2], [image]], [], [], [tall[2:]]]
    images = [[image], [], [image], [Image.fromarray(gray(7, 64, 64))]]
    nested = processor(text=text, images=images, videos=videos, return_tensors=return_tensors)
    grids = [[6, 4], [6, 4], [4, 6], [4, 6], [4, 6], [4, 4], [6, 4], [6, 4]]
    assert np.asarray(nested["image_grid_hw"]).tolist() == grids
    flat = processor(
        text=text,
        images=[image, image, images[3][0]],
        videos=[tall[:2], [image], tall[2:]],
        return_tensors=return_tensors,
    )
    assert np.array_equal(flat["pixel_values"], nested["pixel_values"])
    ids = [[int(i) for i in row] for row in flat["input_ids"]]
    assert [row.count(IMAGE) for row in ids] == [24, 0, 6, 16]
    # Each row alone gives the same.
    kinds = {"pt": torch.Tensor, "np": np.ndarray, None: np.ndarray}
    assert isinstance(flat["pixel_values"], kinds[return_tensors])
    start = 0
    for row in range(4):
        alone = processor(
            text=text[row], images=images[row] or None, videos=[videos[row]] if videos[row] else None,
            return_tensors="pt",
        )  # fmt: skip
        assert alone["input_ids"][0].tolist() == [i for i in ids[row] if i != 151643]
        count = len(alone.get("pixel_values", []))
        if count:
            assert np.array_equal(alone["pixel_values"], flat["pixel_values"][start : start + count])
        start += count


def test_placeholders_must_match(processor):
    frames = [gray(0)] * 2
    with pytest.raises(ValueError, match=r"Videos and <video> .* \[1\] placeholders, but \[2\] videos"):
        processor(text="<video>", videos=[frames, frames])
    with pytest.raises(ValueError, match=r"\[1, 0\] placeholders, but \[0, 1\] videos"):
        processor(text=["<video>", "x"], videos=[[], [frames]])
    with pytest.raises(ValueError, match=r"\[1\] placeholders, but \[0\] videos"):
        processor(text="<video>")
    with pytest.raises(ValueError, match=r"video_style must be one of .* got 'fancy'"):
        processor(text="<video>", videos=frames, video_style="fancy")


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_token_types_tell_videos_from_images(processor, return_tensors):
    """1 at visual tokens of images, 2 at those of videos, 0 at timestamps, `<img>`, words and padding."""
    image, frames = Image.fromarray(gray(9, 64, 64)), np.stack([gray(number) for number in range(2)])
    inputs = processor(
        text=["<video>A<image>B<video>", "<image>", "none"],
        images=[[image], [image], []],
        videos=[[frames, [image]], [], []],
        video_metadata=[{"fps": 1}, {}],
        return_mm_token_type_ids=True,
        return_tensors=return_tensors,
    )
    assert "text_replacement_offsets" not in inputs
    types = [[int(kind) for kind in row] for row in inputs["mm_token_type_ids"]]
    ids = [[int(token) for token in row] for row in inputs["input_ids"]]
    visual = [
        [kind for kind, token in zip(*row, strict=True) if token == IMAGE] for row in zip(types, ids, strict=True)
    ]
    assert visual == [[2] * 12 + [1] * 4 + [2] * 4, [1] * 4, []]
    assert [sum(map(bool, row)) for row in types] == [20, 4, 0]


def test_model_ignores_token_types(processor, real_vocabulary_model):
    inputs = processor(
        text="<video>Hm?", videos=[gray(0), gray(99)], return_mm_token_type_ids=True, return_tensors="pt"
    )
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with torch.no_grad():
        assert torch.equal(real_vocabulary_model(**inputs).logits, real_vocabulary_model(**without).logits)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        real_vocabulary_model.generate(**inputs, **settings), real_vocabulary_model.generate(**without, **settings)
    )


def test_model_reads_a_video_like_its_frames(processor, real_vocabulary_model):
    frames = [gray(number) for number in (0, 80, 160)]
    video = processor(text="<video>\nHm?", videos=frames, return_tensors="pt")
    images = processor(text="<image>\n" * 3 + "Hm?", images=frames, return_tensors="pt")
    for key in video:
        assert torch.equal(video[key], images[key]), key
    with torch.no_grad():
        assert torch.isfinite(real_vocabulary_model(**video).logits).all()


# Which patches


def test_kinds_of_input(tmp_path):
    processor = NeoVideoProcessor()
    array = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    paths = []
    for number, frame in enumerate(array):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(frame).save(paths[-1])
    expected = processor(array, return_tensors="pt")
    assert expected["image_grid_hw"].tolist() == [[4, 6]] * 3
    kinds = [
        torch.from_numpy(array),
        array.transpose(0, 3, 1, 2),
        list(array),
        [Image.fromarray(frame) for frame in array],
        [paths],
        array[None],
        [[frame for frame in array]],
    ]
    for kind in kinds:
        assert torch.equal(processor(kind, return_tensors="pt")["pixel_values"], expected["pixel_values"])
    assert [len(flatten_videos(videos)) for videos in (["a", "b"], [["a", "b"], "c"], [[array], [array]])] == [2, 2, 2]


def test_metadata_decides_on_sampling():
    processor, frames = NeoVideoProcessor(), np.stack([gray(number) for number in range(50)])

    def taken(**kwargs):
        return processor(frames, return_metadata=True, **kwargs)["video_metadata"][0].frames_indices

    assert taken() == [*range(50)]  # as they are
    assert taken(video_metadata={"fps": 0}) == [*range(50)]
    assert taken(num_frames=4) == [10, 20, 30, 40]
    assert taken(video_metadata={"fps": 10}) == [0, 10, 20, 30, 40]
    assert taken(video_metadata=metadata(50, 10), fps=0.5) == [0, 20]
    assert taken(video_metadata=metadata(50, 10), do_sample_frames=False) == [*range(50)]
    chosen = [*range(0, 500, 10)]
    assert taken(video_metadata=metadata(500, 10, chosen)) == chosen
    given = metadata(50, 10)
    taken(video_metadata=given)
    assert given == metadata(50, 10)  # not changed


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fps": 1}, "got fps=1 and a video of None"),
        ({"fps": 1, "num_frames": 2}, "at most one of .* got {'num_frames': 2, 'fps': 1}"),
        ({"video_metadata": {"fps": -3}}, "fps must be positive, .* got -3"),
        ({"video_metadata": {"total_num_frames": 7}}, "describes 7 frames, but 4 were given"),
        ({"video_metadata": [{}, {}]}, "for each of the 1 videos, got 2"),
        ({"video_metadata": metadata(99, 9, [1, 2, 3, 4]), "fps": 1}, "cannot be sampled again"),
        ({"max_video_tokens": 1}, "no room for a single frame, which needs 6 tokens"),
        ({"min_pixels": 300_000}, "at most max_pixels, got 300000 and 230400"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeoVideoProcessor()(np.stack([gray(number) for number in range(4)]), **kwargs)


def test_bad_frames():
    processor = NeoVideoProcessor()
    with pytest.raises(ValueError, match="frame 1 is 64x32 and the first 32x64"):
        processor([gray(0), gray(1, 64, 32)])
    with pytest.raises(ValueError, match=r"at least one frame, got \(0, 32, 32, 3\)"):
        processor(np.zeros((0, 32, 32, 3), np.uint8))
    for nothing in ([], [[]], 3, None, "", np.zeros((32, 32, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"A video must be a path|Cannot read the video"):
            processor(nothing)


def test_token_budget(caplog):
    processor, frames = NeoVideoProcessor(), np.stack([gray(number, 256, 512) for number in range(16)])

    def run(limit):
        caplog.clear()
        features = processor(frames, max_video_tokens=limit, return_metadata=True)
        indices, grid = features["video_metadata"][0].frames_indices, features["image_grid_hw"]
        assert len(grid) == len(indices)
        assert grid.prod(-1).sum() // 4 <= limit
        return indices, grid[0].tolist()

    assert run(16 * 128) == ([*range(16)], [16, 32])  # 128 tokens each
    # Fewer pixels first: 64 tokens each.
    with caplog.at_level("WARNING"):
        assert run(16 * 70) == ([*range(16)], [10, 22])
    # Then fewer frames: 4096 pixels are 45 x 90, rounded down to 1 x 2 tokens.
    with caplog.at_level("WARNING"):
        assert run(20) == ([0, 2, 4, 5, 7, 8, 10, 12, 13, 15], [2, 4])
    assert "kept 10 of 16 frames with 2 visual tokens instead of 128 each" in caplog.text


def test_num_multimodal_tokens(processor):
    frames = [
        np.stack([gray(number, *size) for number in range(count)]) for count, *size in ((3, 64, 96), (9, 256, 512))
    ]
    sizes = [video.shape[:3] for video in frames]
    for settings in ({}, {"max_pixels": 16384}, {"max_video_tokens": 15}):
        features = processor(text="<video>" * 2, videos=frames, videos_kwargs=settings)
        counted = processor._get_num_multimodal_tokens(video_sizes=sizes, videos_kwargs=settings)
        assert sum(counted.num_video_tokens) == features["input_ids"][0].count(IMAGE)
        assert counted.num_image_tokens is None
    assert set(processor.model_input_names) == {"pixel_values", "image_grid_hw", "input_ids", "attention_mask"}


def test_save_and_load(processor, tmp_path):
    mine = NeoVideoProcessor(num_frames=6, max_pixels=10_000)
    assert mine.fps is None
    NeoProcessor(processor.image_processor, processor.tokenizer, mine).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert (saved["image_processor"]["max_pixels"], saved["video_processor"]["max_pixels"]) == (65536, 10_000)
    for again in (
        NeoProcessor.from_pretrained(tmp_path).video_processor,
        AutoVideoProcessor.from_pretrained(tmp_path),
    ):
        assert type(again) is NeoVideoProcessor
        assert (again.fps, again.num_frames, again.max_pixels) == (None, 6, 10_000)
    with pytest.raises(TypeError, match="must be a video processor, got a NeoImageProcessor"):
        NeoProcessor(processor.image_processor, processor.tokenizer, processor.image_processor)


# Files


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted"])
def test_backends_agree(clips, name, monkeypatch):
    path = clips / f"{name}.mp4"
    files = [reader(str(path), "clip") for reader in (DecordReader, PyAVReader)]
    for field in ("total_num_frames", "fps", "duration", "height", "width"):
        assert files[0].metadata[field] == files[1].metadata[field]
    indices = [0, 1, 3, 50, 51, 119, 20, 20]
    for a, b in zip(*(file.read(indices) for file in files), strict=True):
        assert np.array_equal(a, b)
    outputs = []
    for _ in range(2):
        outputs.append(NeoVideoProcessor()(path, return_metadata=True, return_tensors="pt"))
        monkeypatch.setattr(video_reading_neo, "is_av_available", lambda: False)
    assert [o["video_metadata"][0].video_backend for o in outputs] == ["pyav", "decord"]
    assert torch.equal(outputs[0]["pixel_values"], outputs[1]["pixel_values"])


def test_variable_frame_rate(tmp_path):
    """A frame's time is its number over the mean rate, as released, whenever it was shown."""
    times = [0, 40, 80, 120, 500, 540, 1000, 1040, 2000, 2040, 2080, 3000]
    path = write_video(tmp_path / "v.mp4", [gray(20 * i) for i in range(12)], codec="libx264", times=times)
    for reader in (DecordReader, PyAVReader):
        file = reader(str(path), "clip")
        fps = file.metadata.fps
        assert file.metadata.total_num_frames == 12
        assert 0 < fps < 25
        for index, frame in zip([11, 4, 8], file.read([11, 4, 8]), strict=True):
            assert abs(frame.mean() - 20 * index) < 4
        info = NeoVideoProcessor()(path, num_frames=3, return_metadata=True)["video_metadata"][0]
        assert info.frames_indices == [3, 6, 9]
        assert info.timestamps == [3 / fps, 6 / fps, 9 / fps]


def test_unreadable_files(tmp_path, clips, monkeypatch):
    good = (clips / "bikes.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for _ in range(2):
        for name in ("empty.mp4", "truncated.mp4", "text.mp4", "audio.mp4", "none.mp4"):
            with pytest.raises(ValueError, match=rf"Cannot read the video .*{name}: "):
                NeoVideoProcessor()(tmp_path / name)
        monkeypatch.setattr(video_reading_neo, "is_av_available", lambda: False)
    monkeypatch.setattr(video_reading_neo, "is_decord_available", lambda: False)
    with pytest.raises(ImportError, match="needs PyAV or decord"):
        NeoVideoProcessor()(clips / "bikes.mp4")


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_data_uri(clips, monkeypatch, backend):
    """As servers are sent videos."""
    monkeypatch.setattr(video_reading_neo, "is_av_available", lambda: backend == "pyav")
    uri = "data:video/mp4;base64," + base64.b64encode((clips / "bikes.mp4").read_bytes()).decode()
    expected = NeoVideoProcessor()(clips / "bikes.mp4", num_frames=3)
    assert np.array_equal(NeoVideoProcessor()(uri, num_frames=3)["pixel_values"], expected["pixel_values"])
    with pytest.raises(ValueError, match=r"Cannot read the video data:video/mp4;base64,.{0,80}\.\.\.: "):
        NeoVideoProcessor()(uri[: len(uri) // 2])
    with pytest.raises(ValueError, match="Cannot read the video data:"):
        NeoVideoProcessor()("data:video/mp4;base64,####")


def test_url(clips):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(clips))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        expected = NeoVideoProcessor()(clips / "bikes.mp4", num_frames=3, return_metadata=True)
        found = NeoVideoProcessor()(f"{address}/bikes.mp4", num_frames=3, return_metadata=True)
        assert np.array_equal(found["pixel_values"], expected["pixel_values"])
        assert found["video_metadata"] == expected["video_metadata"]
        repeated = NeoVideoProcessor()(f"{address}/bikes.mp4", frames_indices=[9, 4, 9], return_metadata=True)
        assert repeated["video_metadata"][0].frames_indices == [9, 4, 9]
        direct = NeoVideoProcessor()(clips / "bikes.mp4", frames_indices=[9, 4, 9])
        assert np.array_equal(repeated["pixel_values"], direct["pixel_values"])
        with pytest.raises(ValueError, match=r"Cannot read the video http://.*/none\.mp4"):
            NeoVideoProcessor()(f"{address}/none.mp4")
        server.shutdown()


MEMORY = """
import resource, sys
from neo_hf import NeoVideoProcessor, video_reading_neo
path, backend = sys.argv[1:]
video_reading_neo.is_av_available = lambda: backend == "pyav"
NeoVideoProcessor()(path, num_frames=16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_memory_is_flat_in_length(tmp_path, backend):
    peaks = []
    for length in (60, 1200):
        path = write_video(
            tmp_path / f"{length}.mp4", [gray(number, 240, 320) for number in range(60)] * (length // 60)
        )
        run = subprocess.run([sys.executable, "-c", MEMORY, path, backend], capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout))
    # Kilobytes. All frames of the longer clip take 276 MB.
    assert peaks[1] - peaks[0] < 30_000, peaks


# The same frames from both readers, as a person sees them

VARIED = [0, 40, 80, 120, 500, 540, 1000, 1040, 2000, 2040, 2080, 3000]


def colours(number, height=64, width=96):
    """A frame of coloured blocks, different in each corner, that move with its number."""
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.roll(blocks.repeat(8, 0).repeat(8, 1)[:height, :width], 3 * number, axis=1)


def encode(path, codec="libx264", count=24, size=(64, 96), rotation=None, options=None, pixels="yuv420p", **container):
    with av.open(str(path), "w", **container) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if rotation is not None:
            if not hasattr(stream.codec_context, "set_display_rotation"):
                pytest.skip("this PyAV cannot write the rotation of a video")
            stream.set_display_rotation(rotation)
        for number in range(count):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(colours(number, *size), format="rgb24")))
        output.mux(stream.encode())
    return path


def encoder(name):
    try:
        av.codec.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {name}")
    return name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain.mp4", {}),
        ("quarter.mp4", {"rotation": 90}),
        ("half.mp4", {"rotation": 180}),
        ("three_quarters.mp4", {"rotation": 270}),
        ("one_frame.mp4", {"count": 1}),
        ("odd.mp4", {"size": (49, 81), "pixels": "yuv444p"}),
        ("b_frames.mp4", {"options": {"bf": "3", "g": "8"}}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "bframes=3:keyint=8:open-gop=0:log-level=none"}}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
    ],
)
def test_readers_agree(tmp_path, name, settings):
    path = encode(tmp_path / name, **(settings | {"codec": encoder(settings.get("codec", "libx264"))}))
    decord_file, file = (reader(str(path), name) for reader in (DecordReader, PyAVReader))
    for field in ("total_num_frames", "fps", "duration", "height", "width"):
        assert decord_file.metadata[field] == file.metadata[field], field
    assert np.allclose(decord_file.times, file.times, atol=1e-6)
    count = settings.get("count", 24)
    order = [index for index in (5, 0, 23, 7, 8, 6, 6, 22) if index < count]
    turns = settings.get("rotation", 0) // 90
    for index, one, two in zip(order, decord_file.read(order), file.read(order), strict=True):
        assert np.array_equal(one, two)
        upright = np.rot90(colours(index, *settings.get("size", (64, 96))), turns)
        assert two.shape == upright.shape
        assert np.abs(two.astype(int) - upright).mean() < 40  # other corners are 80 away
    assert file.metadata.total_num_frames == count


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_open_groups(tmp_path, name):
    """Frames that are shown before their keyframe, but follow it in the file. decord returns others for them."""
    path = encode(tmp_path / name, options={"bf": "3", "g": "8", "x264-params": "open-gop=1"})
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    order = [5, 0, 23, 7, 8, 6, 6, 22, *range(24)]
    for index, frame in zip(order, PyAVReader(str(path), name).read(order), strict=True):
        assert np.array_equal(frame, frames[index]), index


def test_rows_that_decord_misreads(tmp_path):
    path = encode(tmp_path / "clip.mp4", size=(48, 80), rotation=90)
    assert next(PyAVReader(str(path), "clip").read([3])).shape == (80, 48, 3)
    with pytest.raises(ValueError, match="decord misreads its rotated frames"):
        DecordReader(str(path), "clip")


def test_odd_sides_with_shared_chroma(tmp_path):
    """The readers interpolate chroma differently there."""
    path = encode(tmp_path / "odd.mp4", codec="mpeg4", size=(49, 81))
    frames = [next(reader(str(path), "clip").read([7])).astype(int) for reader in (DecordReader, PyAVReader)]
    assert frames[0].shape == frames[1].shape == (49, 81, 3)
    assert np.abs(frames[0] - frames[1]).mean() < 12


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "libsvtav1"), ("clip.ts", "libx264")])
def test_only_pyav_reads(tmp_path, name, codec):
    path = encode(tmp_path / name, codec=encoder(codec), size=(64, 80))
    with pytest.raises(Exception, match=r"ERROR|EOF"):
        DecordReader(str(path), name)
    features = NeoVideoProcessor()(path, frames_indices=[3, 11], return_metadata=True)
    assert features["video_metadata"][0].total_num_frames == 24


@pytest.mark.parametrize(
    ("name", "settings", "readers"),
    [
        ("clip.mp4", {}, ("pyav", "decord")),
        ("faststart.mp4", {"container_options": {"movflags": "faststart"}}, ("pyav", "decord")),
        ("clip.avi", {"codec": "mpeg4"}, ("pyav",)),  # decord reads these as shorter videos
        ("clip.webm", {"codec": "libvpx-vp9"}, ("pyav",)),
    ],
)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_cut_off(tmp_path, monkeypatch, name, settings, readers, share):
    path = encode(tmp_path / name, count=100, **settings)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for reader in readers:
        monkeypatch.setattr(video_reading_neo, "is_av_available", lambda reader=reader: reader == "pyav")
        with pytest.raises(ValueError, match=rf"Cannot read .*{name}"):
            NeoVideoProcessor()(path, num_frames=8)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_container_times(processor, tokenizer, tmp_path, monkeypatch, caplog, backend):
    monkeypatch.setattr(video_reading_neo, "is_av_available", lambda: backend == "pyav")
    path = write_video(tmp_path / "v.mp4", [gray(20 * i) for i in range(12)], codec="libx264", times=VARIED)

    def words(**kwargs):
        caplog.clear()
        content = [{"type": "video", "path": str(path)}]
        with caplog.at_level("WARNING"):
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, return_dict=True, processor_kwargs=kwargs
            )
        text = tokenizer.decode(inputs["input_ids"][0])
        return [line[1:9] for line in text.split("\n") if line.startswith("[0")], text

    assert words(frames_indices=[4, 11])[0] == ["00:00.72", "00:01.98"]
    assert "varies" in caplog.text
    assert 'video_times="container" gives true ones' in caplog.text
    times, text = words(frames_indices=[4, 11], video_times="container")
    assert times == ["00:00.50", "00:03.00"]
    assert "[00:00-00:03]" in text
    assert "varies" not in caplog.text
    # The window holds the frames shown in it: 2000, 2040, 2080.
    assert words(num_frames=2, start=2, end=2.5, video_times="container")[0] == ["00:02.04", "00:02.08"]
    assert words(num_frames=1, videos_kwargs={"video_times": "container"})[0] == ["00:01.00"]
    with pytest.raises(ValueError, match=r"video_times must be one of .* got 'true'"):
        words(video_times="true")
    path = encode(tmp_path / "steady.mp4")
    assert words(frames_indices=[4, 11])[0] == words(frames_indices=[4, 11], video_times="container")[0]
    assert "varies" not in caplog.text


# Bounded work, and settings that mean nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 100_000}, "At most 8192 frames .* num_frames=100000"),
        ({"fps": 1e9}, r"at most 1000, got fps=1000000000\.0"),
        ({"fps": 1000, "max_frames": None}, "At most 8192 frames .* fps=1000 for 10 seconds"),
        ({"fps": float("nan")}, "fps must be .* got fps=nan"),
        ({"fps": float("inf")}, "fps must be .* got fps=inf"),
        ({"fps": -1}, "fps must be .* got fps=-1"),
        ({"fps": "2"}, "fps must be .* got fps='2'"),
        ({"fps": True}, "fps must be .* got fps=True"),
        ({"num_frames": 2.5}, r"num_frames must be .* got 2\.5"),
        ({"num_frames": True}, "num_frames must be .* got True"),
        ({"num_frames": -3}, "num_frames must be .* got -3"),
        ({"max_frames": 0}, "max_frames must be .* got 0"),
        ({"start": float("nan")}, "start must be .* got nan"),
        ({"end": float("inf")}, "end must be .* got inf"),
        ({"end": "3"}, "end must be .* got '3'"),
        ({"start": False}, "start must be .* got False"),
        ({"frames_indices": [1, 2.5]}, r"frames_indices must be integers, got \[2\.5\]"),
        ({"frames_indices": [True]}, r"frames_indices must be integers, got \[True\]"),
        ({"frames_indices": "12"}, "frames_indices must be a list of integers, got '12'"),
        ({"max_video_tokens": float("nan")}, "max_video_tokens must be .* got nan"),
        ({"max_pixels": "many"}, "max_pixels must be .* got 'many'"),
        ({"min_pixels": True}, "min_pixels must be .* got True"),
        ({"min_pixels": float("nan")}, "min_pixels must be .* got nan"),
        ({"patch_size": 0}, "patch_size must be .* got 0"),
        ({"nun_frames": 8}, "Unknown setting nun_frames=8. Did you mean num_frames"),
        ({"max_pixel": 8}, "Unknown setting max_pixel=8. Did you mean max_pixels"),
    ],
)
def test_settings_that_mean_nothing(processor, settings, message):
    frames = np.stack([gray(number) for number in range(10)])
    known = {"video_metadata": [{"fps": 1}]}
    with pytest.raises(ValueError, match=message):
        NeoVideoProcessor()(frames, **known, **settings)
    with pytest.raises(ValueError, match=message):
        processor(text="<video>", videos=[frames], **known, **settings)
    with pytest.raises(ValueError, match=message):
        processor(text="<video>", videos=[frames], videos_kwargs=known | settings)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}]}]
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=known | settings)


@pytest.mark.parametrize("name", ["fps", "duration"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "25", True])
def test_metadata_that_means_nothing(name, value):
    with pytest.raises(ValueError, match=f"video_metadata.{name} must be a finite number or None, got {value!r}"):
        NeoVideoProcessor()([gray(0)], video_metadata={name: value})


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero", tmp_path):
        for processor in (NeoVideoProcessor(), NeoImageProcessor()):
            with pytest.raises(ValueError, match=r"Cannot read the (video|image) .*it is not a regular file"):
                processor(path)


def test_float_frames_share_a_scale():
    """A frame of zeros and ones among frames of 0..255 is dark."""
    frames = np.stack([np.ones((32, 64, 3)), np.full((32, 64, 3), 200.0)])
    expected = NeoVideoProcessor()(frames.astype(np.uint8))["pixel_values"]
    assert np.array_equal(NeoVideoProcessor()(frames)["pixel_values"], expected)
    assert np.array_equal(NeoVideoProcessor()(torch.tensor(frames).bfloat16())["pixel_values"], expected)


# The order of float operations


def test_count_keeps_the_order_of_floats():
    """`int(i * (length / (n + 1)))`, which is not `i * length // (n + 1)`."""
    found = 0
    for length in range(1, 400):
        for count in (2, 6, 8, 48):
            step = length / (count + 1)
            expected = [int(number * step) for number in range(1, count + 1)]
            assert sample(length, 25, num_frames=count) == expected
            found += expected != [number * length // (count + 1) for number in range(1, count + 1)]
    assert found  # the difference matters somewhere


def test_rounding_of_times_and_rates():
    # 1.96 seconds at 1 per second: 1 frame, not 2.
    assert sample(49, 25, fps=1) == [0]
    # 59.96 seconds are 00:59; 7 frames of 59.96 seconds are 0.1 per second.
    assert serialize_video(metadata(1499, 25, [0])).startswith(prefix("[00:00-00:59]", 1, "0.0"))
    assert serialize_video(metadata(1499, 25, [0] * 7)).startswith(prefix("[00:00-00:59]", 7, "0.1"))
    assert serialize_video(metadata(250, 25, [2]), start=1.9, end=3.9).startswith(prefix("[00:01-00:03]", 1, "0.5"))
