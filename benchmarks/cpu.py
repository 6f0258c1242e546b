"""
NEO on a CPU by format of its weights: float32, bfloat16, 8 bits, 4 bits. What a person waits for an answer.

    python benchmarks/cpu.py [--append benchmarks/RESULTS.md]

1. At the width of NEO-2B (4 of 40 layers, random weights): prefill, decoding steps, size of the weights. Formats
   alternate within a round, and figures are medians.
2. NEO-nano: exact answers on unseen scenes and perplexity of the expected ones.
3. The true shape of NEO-2B with random weights: time to first token of a 512 x 512 image, tokens per second, peak
   memory of the process and the wait for 50 tokens. Peers are the shape of Qwen3-VL-2B in the same engine and, where
   llama-cpp-python and gguf are installed, a Qwen3 of as many parameters in llama.cpp, prompted with as many tokens
   of text. Each runs in a process of its own, after one warm-up. Layers are copies of one that was quantised:
   quantising all of them would take most of the time.

Needs `pip install ".[clients]"`. `--append` adds the results to a file and writes a plot beside it. `--tiny` is a
smoke test on narrow models.
"""

import argparse
import copy
import gc
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from reports import publish, table
from speed import (
    TINY,
    WIDTHS,
    build_neo,
    build_qwen,
    first_token,
    image_prompt,
    medians,
    megabytes,
    neo_inputs,
    qwen_inputs,
    ratio,
    status_megabytes,
)
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.generation.streamers import BaseStreamer

from neo_hf.cache_neo import NeoCache
from neo_hf.loading import NANO, load_model_and_processor
from neo_hf.loss_neo import IGNORE_INDEX

ANSWER = 50  # tokens


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


FORMATS = {
    "float32": lambda: None,
    "bfloat16": lambda: None,
    "int8 (bitsandbytes)": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8 (torchao)": torchao_int8,
    "NF4 (bitsandbytes)": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}
# The format of a whole model in transformers, and what is nearest to it in llama.cpp.
FULL = {"bfloat16": "BF16", "int8 (bitsandbytes)": "Q8_0", "NF4 (bitsandbytes)": "Q4_0"}


def dtype_of(form):
    return torch.float32 if form == "float32" else torch.bfloat16


def quantise(model, form):
    """The model in a format, as `from_pretrained` of its checkpoint would give it."""
    if FORMATS[form]() is None:
        return model.to(dtype_of(form))
    return (
        type(model)
        .from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=FORMATS[form](),
            dtype=dtype_of(form),
        )
        .eval()
    )


def repeat(layers, count):
    """Copies of the first layer up to `count` of them."""
    for index in range(len(layers), count):
        layer = copy.deepcopy(layers[0])
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(layer)


def build(kind, form, tiny, layers=None, **text_config):
    """NEO-2B or Qwen3-VL-2B in a format, or so many layers of it."""
    if kind == "neo":
        model = quantise(build_neo(1, tiny=tiny, dtype=torch.bfloat16, **text_config), form)
        layers = layers or (2 if tiny else 40)
    else:
        model = quantise(build_qwen(tiny, layers=1, vision_layers=1, taps=(0,), dtype=torch.bfloat16), form)
        layers = layers or (2 if tiny else 28)
        vision, taps = model.model.visual, [0, 1] if tiny else [5, 11, 17]
        repeat(vision.blocks, 2 if tiny else 24)
        repeat(vision.deepstack_merger_list, len(taps))
        vision.deepstack_visual_indexes = taps
    repeat(model.get_decoder().layers, layers)
    model.config.text_config.num_hidden_layers = layers
    gc.collect()  # the model before quantisation, so that it does not count as memory of this one
    return model


def saved_megabytes(model):
    """Size of the weights in a saved folder, with the scales of quantised ones."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**20


@torch.no_grad()
def measure_layers(tiny):
    """Prefill of an image and its text, steps after caches of two lengths, and megabytes, by format."""
    side, lengths, steps = (4, (8, 64), 2) if tiny else (32, (256, 4096), 5)
    models = {form: build("neo", form, tiny, 2 if tiny else 4, vocab_size=1024) for form in FORMATS}
    results = {form: {"size": saved_megabytes(model)} for form, model in models.items()}
    prompt = image_prompt(1, side)
    token = torch.tensor([[9]])

    def decode(model, cache):
        def run():
            for _ in range(steps):
                model(input_ids=token, past_key_values=cache)
            cache.crop(-steps)

        return run

    measured = {"prefill": {form: first_token(model, neo_inputs(*prompt)) for form, model in models.items()}}
    for length in lengths:
        measured[length] = {}
        for form, model in models.items():
            cache = NeoCache(model.config.text_config)
            model(input_ids=torch.full((1, length), 9), past_key_values=cache, logits_to_keep=1)
            measured[length][form] = decode(model, cache)
    for name, functions in measured.items():
        for form, seconds in medians(functions, 3).items():
            results[form][name] = seconds if name == "prefill" else seconds / steps
    return {"tokens": prompt[0].shape[1], "lengths": lengths, "formats": results}


@torch.no_grad()
def measure_accuracy(tiny):
    """Of NEO-nano, saved in each format and loaded again."""
    sys.path.append(str(Path(__file__).parents[1] / "examples" / "nano"))
    from train import TASKS, evaluate, logits
    from world import World

    results = {}
    for form in tqdm(FORMATS, "accuracy", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            model, processor = load_model_and_processor(
                NANO, dtype=dtype_of(form), quantization_config=FORMATS[form]()
            )
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, dtype=dtype_of(form)).eval()
        losses, tokens = [], []

        def forward(batch, model=model, losses=losses, tokens=tokens):
            output, targets = logits(model, batch).float(), batch["labels"][:, 1:]
            losses.append(F.cross_entropy(output[:, :-1].transpose(1, 2), targets, reduction="sum"))
            tokens.append((targets != IGNORE_INDEX).sum())
            return output

        tasks = TASKS[:2] if tiny else TASKS
        accuracy = evaluate(forward, processor, World(12345, test=True), 4 if tiny else 200, tasks)
        results[form] = {"perplexity": (sum(losses) / sum(tokens)).exp().item(), "tasks": accuracy}
    return results


class Stopwatch(BaseStreamer):
    """When each token came, in seconds since this was made. `generate()` first gives the prompt."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def put(self, value):
        self.times.append(time.perf_counter() - self.start)

    def end(self):
        self.times = self.times[1:]


def answer_in_transformers(kind, form, tiny):
    """Answers about an image once, and gives the times of its tokens."""
    model = build(kind, form, tiny)
    prompt = image_prompt(1, 2 if tiny else 16)
    inputs = (neo_inputs if kind == "neo" else qwen_inputs)(*prompt)

    def answer(tokens):
        watch = Stopwatch()
        model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=watch)
        return watch.times

    return answer, prompt[0].shape[1]


def write_gguf(file, form, tiny):
    """A Qwen3 with the width of NEO-2B, about as many parameters in its layers, and random weights."""
    import gguf
    import numpy

    widths = TINY if tiny else WIDTHS
    width, inner, dim = widths["hidden_size"], widths["intermediate_size"], 128
    heads, groups = widths["num_attention_heads"], widths["num_key_value_heads"]
    vocabulary = 1024 if tiny else 151_936
    matrices = {
        "attn_q": (heads * dim, width),
        "attn_k": (groups * dim, width),
        "attn_v": (groups * dim, width),
        "attn_output": (width, heads * dim),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    # NEO-2B: 40 layers with a second projection of queries and of keys.
    size = sum(rows * columns for rows, columns in matrices.values())
    layers = 2 if tiny else round(40 * (size + (heads + groups) * dim * width) / size)
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[form]
    generator = numpy.random.default_rng(0)

    def random(shape):
        return gguf.quants.quantize(generator.standard_normal(shape, numpy.float32) * 0.02, kind)

    # A tied head is as precise as the embedding: NEO's stays in bfloat16, too.
    embedding = generator.standard_normal((vocabulary, width), numpy.float32) * 0.02
    bfloat16 = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(embedding, bfloat16), raw_dtype=bfloat16)
    ones = {name: numpy.ones(width, numpy.float32) for name in ("attn_norm", "ffn_norm")}
    ones |= {name: numpy.ones(dim, numpy.float32) for name in ("attn_q_norm", "attn_k_norm")}
    writer.add_tensor("output_norm.weight", ones["attn_norm"])
    layer = {name: random(shape) for name, shape in matrices.items()}
    for index in range(layers):
        for name, values in layer.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", values, raw_dtype=kind)
        for name, values in ones.items():
            writer.add_tensor(f"blk.{index}.{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer_in_llama_cpp(form, tiny):
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.gguf"
        write_gguf(file, FULL[form], tiny)
        threads = torch.get_num_threads()
        model = llama_cpp.Llama(
            file, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False
        )
    prompt = torch.randint(10, 1000, image_prompt(1, 2 if tiny else 16)[0].shape)[0].tolist()

    def answer(tokens):
        start, times = time.perf_counter(), []
        model.reset()
        model.eval(prompt)
        for _ in range(tokens):
            token = model.sample(temp=0)
            times.append(time.perf_counter() - start)
            if len(times) < tokens:
                model.eval([token])
        return times

    return answer, len(prompt)


@torch.no_grad()
def measure_answer_here(kind, form, tiny):
    """Seconds to the first token and to the last, and the peak memory of this process while it answers."""
    make = answer_in_llama_cpp if kind == "llama.cpp" else lambda *rest: answer_in_transformers(kind, *rest)
    answer, tokens = make(form, tiny)
    answer(1)  # one-time work, like packing weights
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    times = answer(4 if tiny else ANSWER)
    return {"tokens": tokens, "first": times[0], "last": times[-1], "peak": status_megabytes("VmHWM")}


def measure_answers(tiny):
    kinds = ["neo", "qwen"]
    if all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        kinds.append("llama.cpp")
    results = {}
    for form in list(FULL)[-1:] if tiny else FULL:
        for kind in kinds:
            command = [sys.executable, __file__, "--answer", json.dumps([kind, form, tiny])]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{kind} in {form} failed:\n{run.stderr[-2000:]}")
            results.setdefault(form, {})[kind] = json.loads(run.stdout.splitlines()[-1])
    return results


NAMES = {"neo": "NEO-2B", "qwen": "Qwen3-VL-2B", "llama.cpp": "Qwen3 in llama.cpp"}


def report(results, tiny):
    """The results as Markdown."""
    layers = results["layers"]
    formats = layers["formats"]
    full, half = formats["float32"], formats["bfloat16"]
    short, long = layers["lengths"]
    parts = [
        f"{2 if tiny else 4} layers of NEO-2B's width without its vocabulary: prefill of {layers['tokens']:,} tokens "
        f"and steps after {short:,} and {long:,} cached ones. Ratios of times, to float32 and to bfloat16:\n"
    ]
    rows = []
    for form, r in formats.items():
        row = [form, megabytes(r["size"])]
        for name in ("prefill", short, long):
            row += [f"{1e3 * r[name]:.1f} ms", ratio(r[name], full[name]), ratio(r[name], half[name])]
        rows.append([*row, f"{1 / r[short]:.1f}", ratio(r[long], r[short])])
    header = ["weights", "size"]
    for name in ("prefill", f"step, {short:,}", f"step, {long:,}"):
        header += [name, "/ float32", "/ bfloat16"]
    parts.append(table([*header, f"tokens/s, {short:,}", f"{long:,} / {short:,}"], rows))

    parts.append("NEO-nano, exact answers to unseen scenes, in percent, and perplexity of the expected answers:\n")
    rows = []
    for form, r in results["accuracy"].items():
        shares = [*r["tasks"].values()]
        shares.append(sum(shares) / len(shares))
        rows.append([form, *(f"{100 * share:.1f}" for share in shares), f"{r['perplexity']:.4f}"])
    parts.append(table(["weights", *results["accuracy"]["float32"]["tasks"], "mean", "perplexity"], rows))

    count = 4 if tiny else ANSWER
    parts.append(
        f"Full models, an image of 512 x 512 pixels and an answer of {count} tokens; ratios to Qwen3-VL-2B:\n"
    )
    rows = []
    for form, kinds in results["answers"].items():
        for kind, r in kinds.items():
            peer = kinds["qwen"]
            name = FULL[form] if kind == "llama.cpp" else form
            step, peer_step = ((x["last"] - x["first"]) / (count - 1) for x in (r, peer))
            rows.append(
                [
                    NAMES[kind],
                    name,
                    r["tokens"],
                    f"{r['first']:.2f} s",
                    ratio(r["first"], peer["first"]),
                    f"{1 / step:.2f}",
                    ratio(peer_step, step),
                    f"{r['last']:.1f} s",
                    ratio(r["last"], peer["last"]),
                    megabytes(r["peak"]),
                    ratio(r["peak"], peer["peak"]),
                ]
            )
    header = ["model", "weights", "prompt", "first token", "ratio", "tokens/s", "ratio", "answer", "ratio"]
    parts.append(table([*header, "peak memory", "ratio"], rows))
    if not any("llama.cpp" in kinds for kinds in results["answers"].values()):
        parts.append("llama.cpp is not among them: llama-cpp-python and gguf are not installed.\n")
    return "\n".join(parts)


def plot(results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    formats = results["layers"]["formats"]
    bfloat16 = formats["bfloat16"]
    names = ("prefill", *results["layers"]["lengths"])
    for i, (form, r) in enumerate(formats.items()):
        left.bar([x + 0.16 * i for x in range(3)], [bfloat16[name] / r[name] for name in names], 0.15, label=form)
    labels = ["prefill", *(f"step after {length:,}" for length in names[1:])]
    left.set_xticks([x + 0.32 for x in range(3)], labels)
    left.axhline(1, color="grey", linewidth=0.5)
    left.set(title="Layers of NEO-2B, speed / bfloat16")
    left.legend(fontsize=8)
    bars = [
        (f"{NAMES[kind]}, {FULL[form] if kind == 'llama.cpp' else form}", r)
        for form, kinds in results["answers"].items()
        for kind, r in kinds.items()
    ]
    right.barh([name for name, _ in bars], [r["first"] for _, r in bars], label="first token")
    right.barh(
        [name for name, _ in bars],
        [r["last"] - r["first"] for _, r in bars],
        left=[r["first"] for _, r in bars],
        label="the others",
    )
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=8)
    right.set(title="Image of 512 x 512, answer of 50 tokens", xlabel="seconds")
    right.legend(fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", type=Path, help="file that the results are added to")
    parser.add_argument("--tiny", action="store_true", help="see that it runs")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("this measures a CPU: set CUDA_VISIBLE_DEVICES= to hide the CUDA device.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each matrix product otherwise
    if arguments.answer:
        print(json.dumps(measure_answer_here(*json.loads(arguments.answer))))
        return

    tiny = arguments.tiny
    parts = {"layers": measure_layers, "accuracy": measure_accuracy, "answers": measure_answers}
    results = {}
    for name in (progress := tqdm(parts)):
        progress.set_description(name)
        results[name] = parts[name](tiny)

    publish(
        f"CPU, {torch.get_num_threads()} threads",
        [],
        "CPU (`cpu.py`)",
        report(results, tiny),
        arguments.append,
        ("cpu", "Speed by format, wait for an answer", lambda: plot(results)),
    )


if __name__ == "__main__":
    main()
