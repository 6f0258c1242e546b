"""`neo-hf check-data`: what is in training data, before a run."""

import json
import re

import pytest
from helpers import ROOT
from PIL import Image

from neo_hf import load_nano
from neo_hf.training import Source, checks, load_samples
from neo_hf.training.planning import plan_run
from neo_hf_cli import main

RECIPE = str(ROOT / "examples" / "recipes" / "2b-sft.yaml")


@pytest.fixture
def data(tmp_path):
    """Twenty pairs, three documents, one of them long, and two bad records."""
    Image.effect_noise((96, 64), 64).convert("RGB").save(tmp_path / "a.png")
    pairs = [{"image": "a.png", "caption": f"Number {number}."} for number in range(20)]
    documents = [{"text": "Hi."}, {"text": "Hi. " * 40}, {"text": "Hi. " * 400}]
    records = [*pairs, *documents, {"image": "b.png", "caption": "Lost."}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "{\n")
    return tmp_path


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["check-data", "nano", *map(str, argv)])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def test_report(data, capsys):
    plot = data / "lengths.png"
    code, out, _ = run(capsys, data / "data.jsonl", "--root", data, "--max-length", 256, "--plot", plot)
    assert code == 1  # two records are bad
    assert "21 caption, 3 text, 1 unreadable" in out
    assert "23, with 20 images and frames; 2 bad" in out
    assert re.search(r"bad: .*data.jsonl:24: Cannot read the image .*b.png", out)
    assert re.search(r"bad: .*data.jsonl:25: Expecting property name", out)
    with Image.open(plot) as image:
        assert image.width > 500

    # Against the samples themselves, and the rows that training would have.
    from neo_hf.loading import NANO, load_processor

    source = Source(data / "data.jsonl", root=data)
    lengths = [len(sample["input_ids"]) for sample in load_samples([source], load_processor(NANO))]
    assert f"tokens      {sum(lengths):,}, of which" in out
    assert f"longest {max(lengths):,}" in out
    counts = [int(count) for count in re.findall(r"^ +[\d,]+ - +[\d,]+ +(\d+)", out, re.MULTILINE)]
    assert sum(counts) == len(lengths)
    rows = int(re.search(r"rows +(\d+) of 256 tokens, ([\d.]+)% full; 1 samples are longer", out)[1])
    fill = float(re.search(r"([\d.]+)% full", out)[1])
    kept = sum(length for length in lengths if length <= 256)
    assert fill == pytest.approx(100 * kept / (rows * 256), abs=0.06)
    assert f"steps       {rows / 8:,.1f}, 8 rows each" in out


def test_recipe_and_limit(data, capsys):
    code, out, _ = run(
        capsys, data / "data.jsonl", "--root", data, "--recipe", RECIPE, "--limit", 20, "--processes", 4
    )
    assert code == 0
    assert "20 caption (and more that were not read)" in out
    assert "One pass over what was read\n  rows        1 of 34,816 tokens" in out
    assert "steps       0.2, 4 rows each\n  passes      18,000.0 in 4,500 steps" in out
    plan = plan_run(load_nano()[0].config, "sft", 34816, 4, "fsdp2")
    assert f"device      {sum(plan.memory.values()) / 1e9:.2f} GB at least" in out


@pytest.mark.parametrize(("settings", "per_step"), [({"lora_rank": 8}, 16), ({"sequence_parallel_size": 4}, 4)])
def test_all_of_the_recipe_counts(data, capsys, settings, per_step):
    """Where the data is and how it is called; and there is no estimate of memory that would be that of another run."""
    (data / "pairs.json").write_text(json.dumps([{"jpg": "a.png", "txt": "Yes."}] * 20))
    settings |= {"data_root": str(data), "columns": ["image=jpg", "caption=txt"], "per_device_train_batch_size": 1}
    (data / "recipe.yaml").write_text(json.dumps({**settings, "max_length": 256}))
    code, out, _ = run(capsys, data / "pairs.json", "--recipe", data / "recipe.yaml", "--processes", 16)
    assert (code, "samples     20, with 20 images" in out) == (0, True)
    assert f", {per_step} rows each" in out
    assert "device      not estimated with adapters or sequence parallelism" in out
    if "sequence_parallel_size" in settings:
        code, _, err = run(capsys, data / "pairs.json", "--recipe", data / "recipe.yaml")
        assert (code, "must divide --processes" in err) == (1, True)


def test_columns_and_errors(data, capsys):
    (data / "pairs.json").write_text(json.dumps([{"jpg": "a.png", "txt": "Yes."}]))
    columns = ("--column", "image=jpg", "--column", "caption=txt")
    code, out, _ = run(capsys, data / "pairs.json", "--root", data, *columns)
    assert (code, "samples     1, with 1 images" in out) == (0, True)
    for argv, message in (
        (("nowhere.jsonl",), "no data file nowhere.jsonl"),
        ((data / "pairs.json", "--column", "image"), "NAME=COLUMN, as image=jpg, got image"),
    ):
        code, _, err = run(capsys, *argv)
        assert (code, message in err) == (1, True)


def test_formats_are_counted_as_stored(data):
    """With the columns renamed, and of packed records too."""
    source = Source([[{"text": "Hi"}, {"text": "Ho"}], {"t": "Hi"}, 3], columns={"text": "t"}, name="mix")
    from neo_hf.loading import NANO, load_processor

    report = checks.check_source(source, load_processor(NANO))
    assert report.formats == {"list of records": 1, "text": 1, "unknown": 1}
    assert len(report.lengths) == 3
    assert list(report.bad) == ["mix, record 2"]
