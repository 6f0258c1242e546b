"""Decoding with a static cache compiles to one graph that CUDA graphs can capture."""

import pytest
import torch
from helpers import batch, random_model, random_prompt, tiny_config
from packaging.version import Version
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from transformers import CompileConfig

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def prompts():
    """A left-padded batch with images."""
    generator = torch.Generator().manual_seed(3)
    return batch([random_prompt(generator, images) for images in ([(3, 5), (2, 2)], [(2, 4)])])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.8 compiles a second graph; the versions up to 2.13 were not tried",
)
def test_one_graph_without_reads(prompts):
    """Whole generations, of two prompts of different lengths, share one graph, in which the host does nothing."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module.forward

    config = CompileConfig(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep), mode=None)
    config._compile_all_devices = True
    model = random_model(tiny_config(), attn_implementation="sdpa")
    shorter = {name: x[:, 2:] if name in ("input_ids", "attention_mask") else x for name, x in prompts.items()}
    for inputs in (prompts, shorter):
        static = {"cache_implementation": "static", "max_cache_len": 64, "compile_config": config}
        found = model.generate(**inputs, **GREEDY, **static)
        assert torch.equal(found, model.generate(**inputs, **GREEDY))
    assert len(graphs) == 1
    assert get_first_incompatible_cudagraph_node(graphs[0]) is None


@pytest.mark.gpu
def test_captured(prompts):
    """As `generate()` compiles it on CUDA by default: captured, and the same tokens as without compiling."""
    model = random_model(tiny_config()).cuda()
    inputs = {name: x.cuda() for name, x in prompts.items()}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
