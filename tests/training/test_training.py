"""Loss, stages and Trainer; the collators' output is written by hand."""

import copy
import functools
import itertools
import re

import pytest
import torch
from helpers import GOLDEN, IMAGE, batch, load_golden_model, random_model, random_prompt, tiny_config
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from neo_hf.indexing_neo import document_starts
from neo_hf.loss_neo import NeoOutputHead
from neo_hf.raw import RAW_TO_NEO
from neo_hf.training import (
    LossSpikeError,
    NeoTrainer,
    NonFiniteLossError,
    PackedCollator,
    PackedDataset,
    PaddedCollator,
    SampleStream,
    SkipOnLossSpike,
    Source,
    StopOnLossSpike,
    encode_record,
    normalize_patches,
    prepare_for_stage,
    sources,
)


def make_samples(count=8, seed=0):
    """Samples of very unequal length, the third without an image, that learn their last tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        images = [] if index % 4 == 2 else [(1 + index % 3, 2)] * (1 + index % 2)
        ids, pixels, grids = random_prompt(generator, images, text=4 + 3 * (index % 5))
        labels = ids.clone()
        labels[: len(ids) // 3] = -100
        labels[ids == IMAGE] = -100
        sample = {"input_ids": ids, "labels": labels, "name": f"sample {index}"}
        samples.append(sample | ({"pixel_values": pixels, "image_grid_hw": grids} if images else {}))
    return samples


def collate(samples, packed=False, kind="square"):
    lengths = [len(sample["input_ids"]) for sample in samples]
    weights = []
    for sample in samples:
        counted = (sample["labels"] != -100).float()
        weights.append(counted / counted.sum() ** {"token": 0, "square": 0.5, "sample": 1}[kind])
    columns = {
        "input_ids": [sample["input_ids"] for sample in samples],
        "labels": [sample["labels"] for sample in samples],
        "loss_weight": weights,
    }
    batch = {}
    if packed:
        batch |= {name: torch.cat(rows)[None] for name, rows in columns.items()}
        batch["document_ids"] = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))[None]
    else:
        fill = {"labels": -100}
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        batch |= {name: pad(rows, padding_value=fill.get(name, 0)) for name, rows in columns.items()}
        batch["attention_mask"] = pad([torch.ones_like(sample["input_ids"]) for sample in samples])
    if images := [sample for sample in samples if "pixel_values" in sample]:
        batch |= {name: torch.cat([p[name] for p in images]) for name in ("pixel_values", "image_grid_hw")}
    return batch | {"sample_names": [sample["name"] for sample in samples]}


def without_names(batch):
    return {name: value for name, value in batch.items() if name != "sample_names"}


def gradients(model, **inputs):
    """Loss and gradients by name, in training mode."""
    model = copy.deepcopy(model).train()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-4):
    loss, grads = actual
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-5)
    assert grads.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (grads[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


@pytest.fixture(scope="module")
def tiny():
    return random_model(tiny_config())


# Loss


@pytest.mark.parametrize(("attention", "skip_logits"), [("eager", False), ("sdpa", False), ("sdpa", True)])
def test_golden_loss_and_gradients(attention, skip_logits):
    recorded = load_file(GOLDEN / "neo_tiny" / "train.safetensors")
    inputs = {name: recorded[name] for name in ("input_ids", "pixel_values", "image_grid_hw", "labels", "loss_weight")}
    places = torch.arange(inputs["input_ids"].shape[1])
    document_ids = torch.bucketize(places, recorded["seq_boundaries"][1:], right=True)[None]
    loss, grads = gradients(load_golden_model(attention), **inputs, document_ids=document_ids, skip_logits=skip_logits)
    torch.testing.assert_close(loss, recorded["loss"], rtol=0, atol=1e-5)
    compared = 0
    for key in recorded.keys() - {"loss"}:
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            for raw, neo in RAW_TO_NEO.items():
                name = name.replace(raw, neo) if name.startswith(raw) else name
            assert (grads[name] - recorded[key]).norm() <= 1e-3 * recorded[key].norm(), name
            compared += 1
    assert compared == 19


@pytest.mark.parametrize("kind", ["token", "square", "sample"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_packed_is_separate(tiny, kind, skip_logits, monkeypatch):
    monkeypatch.setattr(NeoOutputHead, "chunk_tokens", 7)
    samples = make_samples()
    expected_loss, total, expected = 0, 0, {}
    for sample in samples:
        inputs = without_names(collate([sample], kind=kind))
        weight = inputs["loss_weight"][:, 1:].sum()  # nobody predicts the first token
        loss, grads = gradients(tiny, **inputs, num_items_in_batch=1)
        expected_loss, total = expected_loss + loss, total + weight
        expected = {name: expected.get(name, 0) + gradient for name, gradient in grads.items()}
    expected = expected_loss / total, {name: gradient / total for name, gradient in expected.items()}
    for packed in (False, True):
        inputs = without_names(collate(samples, packed, kind))
        assert_same(gradients(tiny, **inputs, skip_logits=skip_logits), expected)


def test_what_never_counts(tiny):
    """Labels on pixels, padding and first tokens of documents are as good as -100."""
    samples = make_samples(3)
    for packed in (False, True):
        inputs = without_names(collate(samples, packed, kind="token"))
        expected = tiny(**inputs).loss
        labels, weight = inputs["labels"].clone(), torch.ones_like(inputs["loss_weight"])
        labels[inputs["input_ids"] == IMAGE] = IMAGE
        if packed:
            labels[document_starts(inputs["document_ids"])] = 7
        else:
            labels[inputs["attention_mask"] == 0] = 7
        loss = tiny(**inputs | {"labels": labels, "loss_weight": weight}).loss
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
        assert abs(loss - tiny(input_ids=inputs["input_ids"] % 500, labels=labels).loss) > 1e-3


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_nothing_to_learn(tiny, skip_logits, num_items):
    """0 with a gradient, which distributed training waits for."""
    inputs = without_names(collate(make_samples(2))) | {"skip_logits": skip_logits, "num_items_in_batch": num_items}
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = gradients(tiny, **inputs)
    assert loss == 0
    assert grads.keys() == {name for name, _ in tiny.named_parameters()}
    assert not any(gradient.any() for gradient in grads.values())


def test_text_alone_reaches_every_parameter(tiny):
    text = {"input_ids": torch.arange(9)[None], "labels": torch.arange(9)[None]}
    loss, grads = gradients(tiny, **text)
    torch.testing.assert_close(loss, tiny(**text).loss)
    assert grads.keys() == {name for name, _ in tiny.named_parameters()}
    assert not any(grads[name].any() for name in grads if "patch_embed" in name)


def test_conventions_of_transformers(tiny):
    inputs = without_names(collate(make_samples(2), kind="token"))
    labels = inputs["labels"]
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    weight = F.pad(inputs.pop("loss_weight")[:, 1:], (0, 1))
    loss = tiny(**inputs).loss
    logits = tiny(**inputs).logits
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), shifted.flatten()))
    del inputs["labels"]
    for skip_logits in (None, True):
        outputs = tiny(**inputs, shift_labels=shifted, loss_weight=weight, skip_logits=skip_logits)
        torch.testing.assert_close(outputs.loss, loss)
        assert (outputs.logits is None) == bool(skip_logits)
    count = int((shifted != -100).sum())
    loss_sum = tiny(**inputs, labels=labels, num_items_in_batch=1).loss
    torch.testing.assert_close(loss_sum, loss * count, rtol=1e-5, atol=0)

    model = copy.deepcopy(tiny)
    model.loss_function = lambda num_items_in_batch=None, **_: torch.tensor(7.0)
    assert model(**inputs, labels=labels).loss == 7
    with pytest.raises(ValueError, match="skip_logits"):
        tiny(**inputs, skip_logits=True)
    with pytest.raises(ValueError, match=r"loss_weight .*\(2, 3\)"):
        tiny(**inputs, labels=labels, loss_weight=torch.ones(2, 3))


@pytest.mark.parametrize("skip_logits", [False, True])
def test_gradient_checkpointing(tiny, skip_logits):
    inputs = without_names(collate(make_samples(), packed=True)) | {"skip_logits": skip_logits}
    checkpointed = copy.deepcopy(tiny)
    checkpointed.gradient_checkpointing_enable()
    expected = gradients(tiny, **inputs)
    assert_same(gradients(checkpointed, **inputs), expected, tolerance=1e-6)


# Stages

SPATIAL = ["k_norm_h", "k_norm_w", "k_proj_hw", "q_norm_h", "q_norm_w", "q_proj_hw"]
PRE_BUFFER_LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_norm.weight",
    "self_attn.k_norm_h.weight",
    "self_attn.k_norm_w.weight",
    "self_attn.k_proj.weight",
    "self_attn.k_proj_hw.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.q_norm_h.weight",
    "self_attn.q_norm_w.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj_hw.weight",
    "self_attn.v_proj.weight",
]
PRETRAINED = {
    "model.patch_embed.patch_embedding.weight",
    "model.patch_embed.patch_embedding.bias",
    "model.patch_embed.dense_embedding.weight",
    "model.patch_embed.dense_embedding.bias",
    *(f"model.language_model.layers.0.{name}" for name in PRE_BUFFER_LAYER),
    *(f"model.language_model.layers.1.self_attn.{name}.weight" for name in SPATIAL),
    *(f"model.language_model.layers.2.self_attn.{name}.weight" for name in SPATIAL),
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft"])
def test_stages(stage, tie, tmp_path, caplog):
    model = random_model(tiny_config(tie_word_embeddings=tie))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with caplog.at_level("INFO"):
        trained = prepare_for_stage(model, stage)
    assert trained.keys() == (PRETRAINED if stage == "pretrain" else before.keys())
    assert f"{sum(p.numel() for p in trained.values()):,} of {model.num_parameters():,}" in caplog.text
    trainer = train(model, make_samples(4), tmp_path, max_steps=3, weight_decay=0.5, learning_rate=1e-2)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trained.values()}
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in trained.items() if "norm" not in name and not name.endswith("bias")}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name


def test_stage_errors():
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match="'finetune'"):
        prepare_for_stage(model, "finetune")
    model.config.text_config.num_pre_buffer_layers = None
    with pytest.raises(ValueError, match="num_pre_buffer_layers"):
        prepare_for_stage(model, "pretrain")
    assert all(parameter.requires_grad for parameter in model.parameters())


# Trainer


# Shows a gradient that is too large or too small, where Adam does not.
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0}


def training_arguments(folder, **kwargs):
    kwargs = {"max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"} | kwargs
    return TrainingArguments(folder, report_to="none", remove_unused_columns=False, disable_tqdm=True, **kwargs)


def train(model, samples, folder, trainer=NeoTrainer, collator=collate, **kwargs):
    trainer = trainer(model, training_arguments(folder, **kwargs), data_collator=collator, train_dataset=samples)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_compiled_layers(tiny, tmp_path):
    """`torch_compile` compiles the layers, not the model, in few graphs, which train alike."""
    counters.clear()
    settings = {"use_cpu": True, "max_steps": 2}
    expected = train(copy.deepcopy(tiny), make_samples(), tmp_path, **settings)
    trainer = train(copy.deepcopy(tiny), make_samples(), tmp_path, **settings, torch_compile=True)
    assert losses(trainer) == pytest.approx(losses(expected), abs=1e-3)
    assert 1 <= counters["stats"]["unique_graphs"] <= 20
    compiled = trainer.model_wrapped.get_decoder().layers[0]
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert not isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    torch._dynamo.reset()


def test_batches_of_an_iterable_are_not_sliced(tiny, tmp_path):
    rows = PackedDataset(make_samples(), max_length=100, buffer_size=4)
    trainer = train(copy.deepcopy(tiny), rows, tmp_path, collator=PackedCollator(0, max_length=100), max_steps=2)
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("kind", ["token", "square"])
@pytest.mark.parametrize("packed", [False, True])
def test_accumulation(tiny, tmp_path, kind, packed):
    """Four batches of one are one batch of four, step for step, although their lengths differ."""
    runs = []
    for rows, steps in ((4, 1), (1, 4)):
        collator = functools.partial(collate, kind=kind, packed=packed)
        kwargs = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **SGD}
        runs.append(train(copy.deepcopy(tiny), make_samples(), tmp_path, collator=collator, **kwargs))
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)
    for (name, a), (_, b) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=name)


def test_plain_trainer(tiny, tmp_path):
    """Where all weights are 1 the Trainer of transformers does the same."""

    def collator(samples):
        return without_names(collate(samples, kind="token"))

    kwargs = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = train(copy.deepcopy(tiny), make_samples(), tmp_path, trainer=Trainer, collator=collator, **kwargs)
    ours = train(copy.deepcopy(tiny), make_samples(), tmp_path, collator=collator, **kwargs)
    assert losses(plain) == pytest.approx(losses(ours), abs=1e-5)


def test_evaluation(tiny, tmp_path):
    samples = make_samples(4)
    trainer = NeoTrainer(
        tiny, training_arguments(tmp_path, per_device_eval_batch_size=4), data_collator=collate, eval_dataset=samples
    )
    with torch.no_grad():
        expected = tiny(**without_names(collate(samples))).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert trainer.predict(samples).predictions[0].shape[-1] == 512


def test_uint8_patches(tiny, tmp_path, processor):
    """Normalised on the device, they train as float patches do, step for step and in evaluation."""
    samples = make_samples()
    for number, sample in enumerate(samples):
        if "pixel_values" in sample:
            generator = torch.Generator().manual_seed(number)
            sample["pixel_values"] = torch.randint(0, 256, sample["pixel_values"].shape, generator=generator).byte()
    floats = [
        sample | {"pixel_values": normalize_patches(sample["pixel_values"], processor.image_processor)}
        if "pixel_values" in sample
        else sample
        for sample in samples
    ]
    runs = []
    for data in (samples, floats):
        arguments = training_arguments(tmp_path, per_device_train_batch_size=2)
        trainer = NeoTrainer(
            copy.deepcopy(tiny), arguments, collate, data, eval_dataset=data, processing_class=processor
        )
        trainer.train()
        runs.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="needs processing_class=processor, got None"):
        train(copy.deepcopy(tiny), samples, tmp_path)
    inputs = without_names(collate(samples))
    with pytest.raises(ValueError, match=r"pixel_values must be normalised .*, got torch.uint8"):
        tiny(**inputs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_continues_a_stream(tiny, tmp_path, monkeypatch, num_workers):
    """From a checkpoint, bit for bit, and without encoding what was seen."""

    def run(folder, samples, **kwargs):
        data = SampleStream([Source(samples)], None)
        kwargs = {"per_device_train_batch_size": 2, "dataloader_num_workers": num_workers, **kwargs}
        model = copy.deepcopy(tiny)
        trainer = NeoTrainer(model, training_arguments(folder, max_steps=6, **kwargs), collate, data)
        return trainer

    whole = run(tmp_path / "whole", make_samples(20), save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    encoded = []
    monkeypatch.setattr(sources, "encode_record", lambda *a, **k: encoded.append(a[3]) or encode_record(*a, **k))
    resumed = run(tmp_path / "resumed", make_samples(20))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    epochs = [entry["epoch"] for entry in resumed.state.log_history if "loss" in entry]
    assert epochs == pytest.approx([step / 6 for step in range(1, 7)])
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    if not num_workers:
        assert len(encoded) == 4
    # Another seed of the data, or none: as asked.
    again = run(tmp_path / "again", make_samples(20), ignore_data_skip=True)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again)[:4] == losses(whole)[:4]
    assert losses(again)[4:] != losses(whole)[4:]
    (checkpoint / "stream_state_0.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-4 has no stream_state_0.pt.*ignore_data_skip"):
        run(tmp_path / "resumed", make_samples(20)).train(resume_from_checkpoint=str(checkpoint))


def test_stops_at_a_loss_that_is_no_number(tiny, tmp_path):
    samples = make_samples()
    samples[5]["pixel_values"][0, 0] = float("nan")
    model = copy.deepcopy(tiny)
    with pytest.raises(NonFiniteLossError, match=re.escape("nan")) as error:
        train(model, samples, tmp_path, per_device_train_batch_size=2, max_steps=8)
    assert "sample 5" in str(error.value)
    assert len(re.findall(r"sample \d", str(error.value))) == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("skip_logits", [False, True])
def test_side_of_padding(tiny, skip_logits):
    """Padding predicts nothing: the first token of a row does not count, whichever side the padding is on."""
    generator = torch.Generator().manual_seed(4)
    prompts = [random_prompt(generator, [(2, 3)]), random_prompt(generator, [], text=4)]
    found = []
    for side in ("left", "right"):
        inputs = batch(prompts, side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        found.append(tiny(**inputs, labels=labels, skip_logits=skip_logits).loss)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_labels_need_all_logits(tiny):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"labels of 3 tokens need .* but logits_to_keep keeps 1"):
        tiny(input_ids=ids, labels=ids, logits_to_keep=1)


def test_own_loss_function_and_metrics(tiny, tmp_path):
    """A loss of the user's gets logits; predictions are logits alone, whether a batch has images or not."""
    seen = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        seen.append(outputs.logits.shape)
        return outputs.logits.float().mean()

    arguments = training_arguments(tmp_path, max_steps=1)
    NeoTrainer(copy.deepcopy(tiny), arguments, collate, make_samples(), compute_loss_func=own_loss).train()
    assert seen
    predictions = NeoTrainer(copy.deepcopy(tiny), arguments, collate, eval_dataset=make_samples()).predict(
        make_samples()
    )
    assert predictions.predictions.ndim == 3


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_run_logs(tiny, tmp_path, packed):
    samples = make_samples(4)
    model = copy.deepcopy(tiny)
    model.config.text_config.pad_token_id = 0
    arguments = training_arguments(tmp_path, per_device_train_batch_size=2, max_steps=2, gradient_accumulation_steps=2)
    collator = PackedCollator(0, 128) if packed else collate
    data = [samples[:1], samples[1:2], samples[2:3], samples[3:]] if packed else samples
    trainer = NeoTrainer(model, arguments, data_collator=collator, train_dataset=data)
    trainer.train()
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        if packed:
            assert entry["row_fill"] == pytest.approx(tokens / (4 * 128), rel=1e-6)
        else:
            assert tokens / (4 * max(len(sample["input_ids"]) for sample in samples)) <= entry["row_fill"] < 1
        assert entry["tokens_per_second"] > 0
        assert entry["num_skipped"] == entry["num_overlong"] == 0
        assert "mfu" not in entry  # of a CPU nobody knows the peak


@pytest.mark.parametrize("packed", [False, True])
def test_loss_per_source(tiny, tmp_path, packed):
    """That of the documents of each source on their own, however they are packed and accumulated."""
    samples = make_samples(9)
    data = [Source(samples[:4], name="a"), Source(samples[4:8], name="b", weight=2), Source(samples[8:], name="a")]
    stream = SampleStream(data, None)
    pad = PackedCollator(0, 128, "square") if packed else PaddedCollator(0, "square")
    collated = []

    def collator(rows):
        collated.append([sample for row in rows for sample in row] if packed else list(rows))
        return pad(rows)

    with torch.no_grad():
        model = copy.deepcopy(tiny)
        own = {s["name"]: model(**without_names(collate([s], kind="token"))).loss.item() for s in samples}
    names = {sample["name"]: "ab"[4 <= number < 8] for number, sample in enumerate(samples)}
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 0}
    arguments = training_arguments(tmp_path, max_steps=4, logging_steps=2, **options, **SGD | {"learning_rate": 0})
    rows = PackedDataset(stream, 128, buffer_size=3) if packed else stream
    trainer = NeoTrainer(model, arguments, data_collator=collator, train_dataset=rows)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry, drawn in zip(logged, (collated[:4], collated[4:8]), strict=True):
        for name in "ab":
            sums = torch.zeros(2)
            for sample in itertools.chain(*drawn):
                if names[sample["name"]] == name:
                    # Each counts as the square root of its number of targets.
                    weight = (sample["labels"][1:] != -100).sum() ** 0.5
                    sums += torch.tensor([own[sample["name"]], 1]) * weight
            assert entry[f"loss/{name}"] == pytest.approx((sums[0] / sums[1]).item(), abs=1e-5)
    alone = NeoTrainer(tiny, arguments, data_collator=pad, train_dataset=SampleStream(data[:1], None))
    if not packed:
        alone.train()
        assert not any(name.startswith("loss/") for name in alone.state.log_history[0])


def spiking_trainer(model, folder, callbacks, **kwargs):
    """Eight steps, of which the seventh shows what the model has not learnt."""
    samples = make_samples(1) * 8
    samples[6] = {**samples[6], "labels": samples[6]["labels"].roll(1)}
    arguments = training_arguments(
        folder, **{"max_steps": 8, "per_device_train_batch_size": 1, "learning_rate": 3e-2, **kwargs}
    )
    trainer = NeoTrainer(
        copy.deepcopy(model), arguments, data_collator=collate, train_dataset=samples, callbacks=callbacks
    )
    trainer._get_train_sampler = lambda dataset: torch.utils.data.SequentialSampler(dataset)
    return trainer


def test_stops_at_a_loss_spike(tiny, tmp_path):
    spiking_trainer(tiny, tmp_path, [StopOnLossSpike(1e6, window=3)]).train()
    with pytest.raises(LossSpikeError, match=r"loss of step 7 is .* more than 2 times .* median of the last 3"):
        spiking_trainer(tiny, tmp_path, [StopOnLossSpike(2, window=3)]).train()
    for callback in (StopOnLossSpike, SkipOnLossSpike):
        with pytest.raises(ValueError, match=r"more than 1, got 0\.5"):
            callback(0.5)


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append([parameter.detach().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_skips_a_loss_spike(tiny, tmp_path, caplog, optim):
    weights = Weights()
    kwargs = {"optim": optim, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 6}
    trainer = spiking_trainer(tiny, tmp_path, [SkipOnLossSpike(2, window=3), weights], **kwargs)
    trainer.train()
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in itertools.pairwise(weights.after)
    ]
    assert changed == [True] * 5 + [False, True]
    assert "loss of step 7" in caplog.text
    assert "Its update is skipped" in caplog.text
    # A resumed run remembers the losses.
    resumed = spiking_trainer(tiny, tmp_path, [SkipOnLossSpike(2, window=3)], **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(LossSpikeError, match=r"The last 1 steps were all skipped"):
        spiking_trainer(tiny, tmp_path, [SkipOnLossSpike(1.0001, window=1)]).train()
