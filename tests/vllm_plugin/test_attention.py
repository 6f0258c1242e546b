"""The mask of each backend of vLLM, and the scheduler that it relies on."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from neo_hf.vllm import attention
from neo_hf.vllm.configuration import SCHEDULER, NeoSettings
from neo_hf.vllm.scheduling import uncut_length


@st.composite
def sequences(draw):
    """Length of a sequence and the (first, last) tokens of its images, with text between."""
    end, images = 0, []
    for gap, size in draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=5)):
        images.append((end + gap, end + gap + size - 1))
        end += gap + size
    return end + draw(st.integers(1, 5)), images


def dense_mask(length, images):
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for first, last in images:
        mask[first : last + 1, first : last + 1] = True
    return mask


@given(sequences(), st.data())
def test_runs_are_the_mask(sequence, data):
    length, images = sequence
    first = data.draw(st.integers(0, length - 1))
    mask = torch.zeros(length, length, dtype=torch.bool)
    start = first
    for end, is_causal in attention.split_runs(first, length, images):
        # What vLLM's kernel computes for a sequence that ends at `end`, of which [start, end) are new.
        mask[start:end, :end] = torch.ones(end, end, dtype=torch.bool).tril()[start:] if is_causal else True
        start = end
    assert torch.equal(mask[first:], dense_mask(length, images)[first:])


def test_cut_images_are_refused():
    with pytest.raises(ValueError, match=r"tokens \[4, 9\) is cut: the step ends at 6"):
        attention.split_runs(0, 6, [(4, 8)])


def request_of(images):
    ranges = SimpleNamespace(mm_position=SimpleNamespace(extract_embeds_range=lambda: images))
    return SimpleNamespace(mm_features=[ranges])


@given(sequences(), st.data())
def test_steps_never_cut_images(sequence, data):
    """After any number of computed tokens, within an image too, where a hit in the prefix cache may end."""
    length, images = sequence
    computed = data.draw(st.integers(0, length - 1))
    new = data.draw(st.integers(1, length - computed))
    uncut = uncut_length(request_of(images), computed, new)
    if uncut:
        attention.split_runs(computed, computed + uncut, images)  # raises if an image is cut
    assert 0 <= uncut <= new
    if uncut < new:  # no more than necessary
        assert any(first <= computed + uncut + 1 <= last for first, last in images) or uncut == 0


@pytest.mark.parametrize("sizes", [(128, 4, 2), (32, 8, 2)], ids=["NEO-2B", "NEO-9B's ratio"])
def test_triton_kernel(sizes):
    """The kernel of GPUs, interpreted: right with images, values narrower than keys and continued prompts."""
    worker = Path(__file__).with_name("triton_worker.py")
    run = subprocess.run(
        [sys.executable, worker, *map(str, sizes)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    from_ours, from_causal = map(float, run.stdout.split()[-2:])
    assert from_ours < 1e-5
    assert from_causal > 0.1


@pytest.mark.parametrize("name", ["TRITON_ATTN_DIFFKV", "FLASH_ATTN", "FLASHINFER"])
def test_unchecked_backends_are_refused(monkeypatch, name):
    monkeypatch.setattr(attention.current_platform, "is_cpu", lambda: False, raising=False)
    with pytest.raises(ValueError, match=rf"{name} may attend causally .* --attention-backend TRITON_ATTN"):
        attention.check_backend(name)
    attention.check_backend("TRITON_ATTN")


def test_another_scheduler_is_refused():
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(
            scheduler_cls="elsewhere.Scheduler", max_num_batched_tokens=8192, max_num_seqs=256
        ),
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
        attention_config=SimpleNamespace(backend=None),
    )
    with pytest.raises(ValueError, match=r"but scheduler_cls is 'elsewhere\.Scheduler'"):
        NeoSettings.verify_and_update_config(config)
    config.scheduler_config.scheduler_cls = None
    NeoSettings.verify_and_update_config(config)
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.model_config.hf_config.max_image_tokens == 8192 - 256
