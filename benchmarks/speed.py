"""
Speed of NEO compared with its own eager path, with Qwen3-VL and with the machine's rate of matrix products.

    python benchmarks/speed.py [--dtype bfloat16] [--append benchmarks/RESULTS.md]

Random weights, a tenth of each model's depth (NEO-2B: 4 of 40 layers; Qwen3-VL-2B: 3 of 28 layers, 2 of 24 in its
vision encoder and 1 of 3 DeepStack taps), by default float32 on a CPU and bfloat16 on CUDA. Candidates alternate
within a round, and figures are medians. Both models turn 32 x 32 pixels into one token. Peak memory is measured in
separate processes. `--append` adds the results to a file and writes a plot beside it. `--tiny` is a smoke test on a
narrow model and short prompts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from reports import publish, table
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.attention_neo import find_key_runs
from neo_hf.cache_neo import NeoCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
IMAGE, START, END = 5, 6, 7  # token ids
TEXT_TOKENS = 14  # before each image
WIDTHS = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 4, "num_key_value_heads": 2}


def build_neo(layers, implementation="neo", tiny=False, dtype=DTYPE, **text_config):
    torch.manual_seed(0)
    text_config = {"num_hidden_layers": layers, "num_pre_buffer_layers": 0} | (TINY if tiny else WIDTHS) | text_config
    config = NeoConfig(
        text_config=text_config,
        vision_config={"hidden_size": 64 if tiny else 1024},
        image_token_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=END,
    )
    with torch.device(DEVICE):
        return NeoForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=implementation).eval()


def build_qwen(tiny=False, layers=3, vision_layers=2, taps=(0,), dtype=DTYPE):
    torch.manual_seed(0)
    text_config = {"num_hidden_layers": layers, "head_dim": 128, "vocab_size": 151_936} | (TINY if tiny else WIDTHS)
    vision_config = {
        "depth": vision_layers,
        "hidden_size": 64 if tiny else 1024,
        "intermediate_size": 128 if tiny else 4096,
        "num_heads": 2 if tiny else 16,
        "out_hidden_size": text_config["hidden_size"],
        "deepstack_visual_indexes": list(taps),
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )
    with torch.device(DEVICE):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def image_prompt(images, side, text=TEXT_TOKENS):
    """Prompt of images of `side` x `side` visual tokens, text before each: ids (1, L) and grids (N, 2)."""
    generator = torch.Generator().manual_seed(0)
    ids = []
    for _ in range(images):
        ids += torch.randint(10, 1000, (text,), generator=generator).tolist()
        ids += [START, *[IMAGE] * side**2, END]
    return torch.tensor([ids], device=DEVICE), torch.tensor([[2 * side, 2 * side]] * images, device=DEVICE)


def neo_inputs(ids, grids):
    pixels = torch.randn(int(grids.prod(-1).sum()), 768, device=DEVICE)
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_hw": grids}


def qwen_inputs(ids, grids):
    """The same images. A still image fills both time steps of a patch."""
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(int(grids.prod(-1).sum()), 2 * 768, device=DEVICE),
        "image_grid_thw": F.pad(grids, (1, 0), value=1),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def clock(function):
    """The result of a call and its duration in seconds."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def medians(functions, rounds):
    """Median seconds of each function. Functions alternate; the first round is a warm-up and does not count."""
    times = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            seconds = clock(function)[1]
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_products(tiny=False):
    """A matrix product of 1,024 tokens, as in a layer's MLP, and its number of floating-point operations."""
    width, inner = (128, 256) if tiny else (2048, 6144)
    x, weight = (
        torch.randn(1024, width, device=DEVICE, dtype=DTYPE),
        torch.randn(inner, width, device=DEVICE, dtype=DTYPE),
    )
    return lambda: F.linear(x, weight), 2 * 1024 * width * inner


def patch_embedding_operations(model, patches):
    embed = model.model.patch_embed
    first, second = embed.patch_embedding.weight.numel(), embed.dense_embedding.weight.numel()
    return 2 * patches * (first + second / model.config.vision_config.spatial_merge_size**2)


def prefill_operations(model, ids, grids):
    """Floating-point operations of a prefill: for weights, and for attention to the keys that each query sees."""
    config = model.config.text_config
    layer = model.get_decoder().layers[0]
    linear = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2) * ids.shape[1]
    runs = find_key_runs(model.model.get_position_ids(ids, grids))
    pairs = int((runs.last - runs.first).sum())
    attention = pairs * config.num_attention_heads * (config.qk_head_dim + config.head_dim)
    head = model.lm_head.weight.numel()
    patches = int(grids.prod(-1).sum())
    return 2 * (config.num_hidden_layers * (linear + attention) + head) + patch_embedding_operations(model, patches)


def first_token(model, inputs):
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def measure_first_token(tiny):
    neo, qwen = build_neo(4, tiny=tiny), build_qwen(tiny)
    cases = {"one 1,024 x 1,024 image": (1, 32), "16 frames of 384 x 384": (16, 12)}
    if tiny:
        cases = {"one image": (1, 4), "frames": (3, 2)}
    results = {}
    for name, (images, side) in cases.items():
        prompt = image_prompt(images, side)
        functions = {
            "neo": first_token(neo, neo_inputs(*prompt)),
            "qwen": first_token(qwen, qwen_inputs(*prompt)),
        }
        results[name] = {"tokens": prompt[0].shape[1]} | medians(functions, 3)
    return results


@torch.no_grad()
def measure_prefill(tiny):
    """Prefill of images of 1,024 tokens, compared with the time of its operations as matrix products."""
    side = 4 if tiny else 32
    results = {}
    for images, layers, rounds in ((1, 4, 3), (4, 4, 3), (16, 1, 3)):
        model = build_neo(layers, tiny=tiny, vocab_size=1024)
        prompt = image_prompt(images, side)
        inputs = neo_inputs(*prompt)
        product, operations = matrix_products(tiny)

        def run(implementation, model=model, inputs=inputs):
            model.set_attn_implementation(implementation)
            return first_token(model, inputs)()

        functions = {"neo": lambda run=run: run("neo"), "gemm": lambda product=product: [product() for _ in range(20)]}
        if images <= 4:
            functions["eager"] = lambda run=run: run("eager")
        times = medians(functions, rounds)
        rate = 20 * operations / times["gemm"]
        times["ideal"] = prefill_operations(model, *prompt) / rate
        results[prompt[0].shape[1]] = {"layers": layers, "rate": rate} | times
    return results


def fill(cache, config, width, length):
    """Random keys, `width` wide, and values of `length` tokens in each layer."""
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length)
        keys = torch.randn(*shape, width, device=DEVICE, dtype=DTYPE)
        cache.update(keys, torch.randn(*shape, config.head_dim, device=DEVICE, dtype=DTYPE), layer)
    return cache


def decode_steps(model, cache, steps, axes=3):
    """The cache grows: cropping it would make the next step copy it."""
    token = torch.tensor([[9]], device=DEVICE)
    for _ in range(steps):
        position_ids = torch.zeros(axes, 1, 1, dtype=torch.long, device=DEVICE)
        position_ids[0] = cache.get_seq_length()
        model(input_ids=token, past_key_values=cache, position_ids=position_ids)


@torch.no_grad()
def measure_growth(tiny, steps=10):
    """
    Seconds of a decoding step of the layers alone (a vocabulary of 1,024), by number of threads and of cached tokens.
    """
    model = build_neo(4, tiny=tiny, vocab_size=1024)
    config, all_threads = model.config.text_config, torch.get_num_threads()
    results = {}
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        caches = {length: fill(NeoCache(config), config, config.qk_head_dim, length) for length in (256, 4096)}
        functions = {n: lambda cache=cache: decode_steps(model, cache, steps) for n, cache in caches.items()}
        results[threads] = {length: seconds / steps for length, seconds in medians(functions, 5).items()}
    return results


@torch.no_grad()
def measure_decoding(tiny, steps=10):
    """Seconds of a decoding step, by number of cached tokens."""
    neo, qwen = build_neo(4, tiny=tiny), build_qwen(tiny)
    results = {}
    for length in (256, 4096):

        def decode(model, cache, implementation, axes):
            def run():
                model.set_attn_implementation(implementation)
                decode_steps(model, cache, steps, axes)

            return run

        config, peer = neo.config.text_config, qwen.config.text_config
        caches = {name: fill(NeoCache(config), config, config.qk_head_dim, length) for name in ("neo", "eager")}
        functions = {name: decode(neo, cache, name, 3) for name, cache in caches.items()}
        cache = fill(DynamicCache(config=peer), peer, peer.head_dim, length)
        functions["qwen"] = decode(qwen, cache, "sdpa", 3)
        results[length] = {name: seconds / steps for name, seconds in medians(functions, 5).items()}
    return results


@torch.no_grad()
def measure_patch_embedding(tiny):
    model = build_neo(1, tiny=tiny, vocab_size=1024)
    mixes = {
        "4 of 1,024 x 1,024": [(64, 64)] * 4,
        "1,024 x 1,024, 512 x 2,048, 32 x 640, 40 of 256 x 256": [(64, 64), (32, 128), (2, 40), *[(16, 16)] * 40],
    }
    results = {}
    for name, grids in mixes.items():
        grids = torch.tensor(grids[:1] if tiny else grids, device=DEVICE)
        patches = int(grids.prod(-1).sum())
        pixels = torch.randn(patches, 768, device=DEVICE, dtype=DTYPE)
        product, operations = matrix_products(tiny)
        functions = {
            "neo": lambda pixels=pixels, grids=grids: model.model.patch_embed(pixels, grids),
            "gemm": lambda product=product: [product() for _ in range(10)],
        }
        times = medians(functions, 5)
        ideal = patch_embedding_operations(model, patches) * times["gemm"] / (10 * operations)
        results[name] = {"seconds": times["neo"], "share": ideal / times["neo"]}
    return results


def measure_training(tiny):
    """Real tokens per second, forward and backward, for documents of very unequal length."""
    sizes = [32, 48, 64, 96, 128, 256, 512, 1024]
    text_config = NARROW | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}
    model = build_neo(2, tiny=tiny, **({"vocab_size": 1024} if tiny else text_config)).train()
    documents = [torch.randint(10, 1000, (size // 8 if tiny else size,), device=DEVICE) for size in sizes]
    real = sum(map(len, documents))
    padded_ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    padded = {"input_ids": padded_ids, "attention_mask": mask, "labels": padded_ids.masked_fill(mask == 0, -100)}
    packed_ids = torch.cat(documents)[None]
    lengths = torch.tensor([len(document) for document in documents], device=DEVICE)
    document_ids = torch.arange(len(documents), device=DEVICE).repeat_interleave(lengths)[None]
    packed = {"input_ids": packed_ids, "document_ids": document_ids, "labels": packed_ids}

    def step(inputs):
        def run():
            model.zero_grad()
            model(**inputs, use_cache=False).loss.backward()

        return run

    times = medians({"packed": step(packed), "padded": step(padded)}, 3)
    share = real / padded_ids.numel()
    rates = {name: real / seconds for name, seconds in times.items()}
    return {"share": share, **rates, "ideal": rates["padded"] / share}


def status_megabytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}.")


@torch.no_grad()
def measure_memory_here(kind, images, layers, width, tiny):
    """Peak megabytes of a prefill, beyond the weights and inputs in use before it."""
    side = 4 if tiny else 32
    if kind == "qwen":
        model, make = build_qwen(tiny), qwen_inputs
    else:
        model, make = build_neo(layers, kind, tiny, vocab_size=1024, **({} if tiny else width)), neo_inputs
    first_token(model, make(*image_prompt(1, 2)))()  # one-time loading
    inputs = make(*image_prompt(images, side))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first_token(model, inputs)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = status_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    first_token(model, inputs)()
    return status_megabytes("VmHWM") - before


def measure_memory(kind, images, layers=4, width=WIDTHS, tiny=False):
    """`measure_memory_here` in its own process; `None` if the system does not report memory."""
    specification = json.dumps([kind, images, layers, width, tiny])
    command = [sys.executable, __file__, "--dtype", dtype_name(), "--memory", specification]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr[-500:], file=sys.stderr)
        return None
    return float(run.stdout.split()[-1])


def dtype_name():
    return str(DTYPE).removeprefix("torch.")


def ratio(x, y):
    return "-" if x is None or y is None else f"{x / y:.2f}"


def megabytes(x):
    return "-" if x is None else f"{x:,.0f} MB"


def report(results):
    """The results as Markdown."""
    parts = ["Time to first token and peak memory (beyond weights and inputs) against Qwen3-VL:\n"]
    rows = [
        [name, r["tokens"], f"{r['neo']:.2f} s", f"{r['qwen']:.2f} s", ratio(r["neo"], r["qwen"])]
        for name, r in results["first token"].items()
    ]
    memory = results["memory"]
    rows.append(["memory, one image", "", *map(megabytes, memory["peer"]), ratio(*memory["peer"])])
    parts.append(table(["", "tokens", "NEO", "Qwen3-VL", "ratio"], rows))

    parts.append("Prefill; the ideal is its operations at the rate of matrix products in the same rounds:\n")
    rows = []
    for tokens, r in results["prefill"].items():
        eager = r.get("eager")
        figures = [f"{r['neo']:.2f} s", f"{r['ideal']:.2f} s", ratio(r["neo"], r["ideal"])]
        rate = f"{r['rate'] / 1e9:.0f} GFLOP/s"
        rows.append(
            [tokens, r["layers"], *figures, f"{eager:.2f} s" if eager else "-", ratio(eager, r["ideal"]), rate]
        )
    header = ["tokens", "layers", "NEO", "ideal", "ratio", "eager", "eager / ideal", "matrix products"]
    parts.append(table(header, rows))

    parts.append("Memory of a prefill beyond weights and inputs:\n")
    rows = [
        ["4K tokens: NEO, eager", *map(megabytes, memory["eager"]), ratio(*memory["eager"])],
        ["32K tokens, 16K tokens (a narrow layer)", *map(megabytes, memory["long"]), ratio(*memory["long"])],
    ]
    parts.append(table(["", "", "", "ratio"], rows))

    parts.append("A decoding step:\n")
    rows = [
        [n, *(f"{1e3 * r[x]:.1f} ms" for x in ("neo", "eager", "qwen")), ratio(r["neo"], r["eager"])]
        for n, r in results["decoding"].items()
    ]
    short, long = results["decoding"].values()
    rows.append(["ratio", *(ratio(long[x], short[x]) for x in ("neo", "eager", "qwen")), ""])
    parts.append(table(["cached tokens", "NEO", "eager", "Qwen3-VL", "NEO / eager"], rows))

    parts.append("A decoding step of the layers alone, by cached tokens:\n")
    rows = [
        [threads, *(f"{1e3 * seconds:.1f} ms" for seconds in r.values()), ratio(*reversed(r.values()))]
        for threads, r in results["growth"].items()
    ]
    parts.append(table(["threads", "256", "4,096", "ratio"], rows))

    parts.append("Patch embedding, share of the rate of matrix products:\n")
    rows = [[n, f"{1e3 * r['seconds']:.0f} ms", f"{r['share']:.2f}"] for n, r in results["patch embedding"].items()]
    parts.append(table(["images", "time", "share"], rows))

    r = results["training"]
    parts.append(
        f"Training, forward and backward, 8 documents of 32 to 1,024 tokens ({r['share']:.0%} of a padded batch); the "
        "ideal is the padded batch's speed over that share:\n"
    )
    row = [*(f"{r[x]:,.0f}" for x in ("packed", "padded", "ideal")), ratio(r["packed"], r["ideal"])]
    parts.append(table(["packed tokens/s", "padded tokens/s", "ideal", "packed / ideal"], [row]))
    return "\n".join(parts)


def plot(results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="tight")
    left, middle, right = figure.subplots(1, 3)
    prefill = results["prefill"]
    for i, name in enumerate(("ideal", "neo", "eager")):
        bars = [(x + 0.27 * i, r[name] / r["ideal"]) for x, r in enumerate(prefill.values()) if name in r]
        left.bar(*zip(*bars, strict=True), width=0.25, label=name)
    left.set_xticks([x + 0.27 for x in range(len(prefill))], [f"{n:,}" for n in prefill])
    left.set(title="Prefill, time / ideal", xlabel="tokens")
    left.legend()
    for panel, title, cases, names in (
        (middle, "Time to first token, s", results["first token"], ("neo", "qwen")),
        (right, "Decoding step, s", results["decoding"], ("neo", "eager", "qwen")),
    ):
        for i, name in enumerate(names):
            panel.bar([x + 0.27 * i for x in range(len(cases))], [r[name] for r in cases.values()], 0.25, label=name)
        panel.set_xticks([x + 0.27 for x in range(len(cases))], [str(case) for case in cases], fontsize=8)
        panel.set(title=title)
        panel.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", type=Path, help="file that the results are added to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype_name(), help="of all models")
    parser.add_argument("--tiny", action="store_true", help="see that it runs")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global DTYPE
    options = "" if arguments.dtype == dtype_name() else f" --dtype {arguments.dtype}"
    DTYPE = getattr(torch, arguments.dtype)
    if arguments.memory:
        print(measure_memory_here(*json.loads(arguments.memory)))
        return

    transformers.logging.set_verbosity_error()
    tiny = arguments.tiny
    parts = {
        "first token": lambda: measure_first_token(tiny),
        "prefill": lambda: measure_prefill(tiny),
        "decoding": lambda: measure_decoding(tiny),
        "growth": lambda: measure_growth(tiny),
        "patch embedding": lambda: measure_patch_embedding(tiny),
        "training": lambda: measure_training(tiny),
        "memory": lambda: {
            "peer": [measure_memory(kind, 1, tiny=tiny) for kind in ("neo", "qwen")],
            "eager": [measure_memory(kind, 4, 1, tiny=tiny) for kind in ("neo", "eager")],
            "long": [measure_memory("neo", images, 1, NARROW, tiny) for images in (32, 16)],
        },
    }
    results = {}
    for name in (progress := tqdm(parts)):
        progress.set_description(name)
        results[name] = parts[name]()

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    publish(
        device,
        [dtype_name()],
        f"Speed (`speed.py{options}`)",
        report(results),
        arguments.append,
        (f"speed-{DEVICE}-{dtype_name()}", "Prefill, time to first token, decoding", lambda: plot(results)),
    )


if __name__ == "__main__":
    main()
