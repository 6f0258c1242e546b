"""How often the host waits for the device: each time, the device runs dry."""

import pytest
import torch
from faked_cuda import faked_cuda, to_cuda
from helpers import one, random_model, random_prompt, tiny_config
from transformers import StaticCache

from neo_hf.cache_neo import CACHE_NAME


@pytest.fixture
def inputs():
    return one(random_prompt(torch.Generator().manual_seed(1), [(3, 5), (2, 2)]))


def test_faked_device_counts_reads_and_refuses_to_mix():
    with faked_cuda() as device:
        x = torch.arange(3, device="cuda") + 1
        assert x.device.type == "cuda"
        assert device.reads == []
        assert x.tolist() == [1, 2, 3]
        assert int(x.sum()) == 6
        assert x[x > 1].shape == (2,)
        assert len(device.reads) == 3
        assert device.uploads == []
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            x + torch.ones(3)
        x + torch.ones(3).to(x.device)
        assert device.uploads == [(3,)]


def test_prefill_and_decoding(inputs):
    model = random_model(tiny_config())
    token = torch.tensor([[3]])
    with torch.no_grad():
        prefill = model(**inputs, use_cache=True)
        expected = model(input_ids=token, **{CACHE_NAME: prefill[CACHE_NAME]}).logits
    to_cuda(model)
    with torch.no_grad(), faked_cuda() as device:
        on_cuda = model(**to_cuda(inputs), use_cache=True)
        assert len(device.reads) <= 2, device.reads
        device.reads.clear()
        logits = model(input_ids=to_cuda(token), **{CACHE_NAME: on_cuda[CACHE_NAME]}).logits
        assert device.reads == []
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-4)


def test_decoding_with_a_static_cache(inputs):
    """Nor does the host send anything, which CUDA graphs cannot capture."""
    model = random_model(tiny_config())
    token, place = torch.tensor([[3]]), torch.tensor([inputs["input_ids"].shape[1], 0, 0])[:, None, None]
    found = []
    for on_cuda in (False, True):
        if on_cuda:
            to_cuda(model)
        with torch.no_grad(), faked_cuda() as device:
            step = {"input_ids": token, "position_ids": place, "attention_mask": None}
            prompt, step = (to_cuda(x) if on_cuda else x for x in (inputs, step))
            cache = StaticCache(config=model.config.text_config, max_cache_len=64)
            model(**prompt, **{CACHE_NAME: cache})
            device.reads.clear()
            device.uploads.clear()
            found.append(model(**step, **{CACHE_NAME: cache}).logits.cpu())
            assert device.reads == ["_to_copy"] * on_cuda  # of the logits, here
            assert device.uploads == []
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_training(inputs):
    """A packed row: token ids, grids and the number of tokens that count in the loss are read together."""
    del inputs["attention_mask"]
    documents = (torch.arange(inputs["input_ids"].shape[1]) > 8).long()[None]
    inputs |= {"labels": inputs["input_ids"], "document_ids": documents, "skip_logits": True}
    model = random_model(tiny_config()).train()
    expected = model(**inputs).loss.detach()
    to_cuda(model)
    with faked_cuda() as device:
        loss = model(**to_cuda(inputs)).loss
        loss.backward()
        assert len(device.reads) <= 1, device.reads
        torch.testing.assert_close(loss.detach().cpu(), expected, rtol=0, atol=1e-5)
