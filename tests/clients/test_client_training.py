"""The Trainer, TRL and PEFT learn, and what they save loads through the Auto classes."""

import copy

import pytest
import torch
from helpers import batch, image_message, random_model, random_prompt, tiny_config
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from neo_hf import NeoForConditionalGeneration

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "seed": 0,
}


def reload(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def images(photographs):
    return [photographs[0].resize((96, 64)), photographs[1].resize((64, 128))]


@pytest.mark.slow
def test_trainer(hub_folder, real_vocabulary_model, processor, images, tmp_path):
    """A collator of one processor call and labels."""
    conversations = [
        [
            image_message(*images[: 1 + i % 2], text=f"What is {i}?"),
            {"role": "assistant", "content": f"It is {i}."},
        ]
        for i in range(4)
    ]

    def collate(samples):
        inputs = processor.apply_chat_template(
            samples, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        mask = torch.as_tensor(inputs.pop("assistant_masks"))
        return inputs | {"labels": inputs["input_ids"].masked_fill(mask == 0, -100)}

    model = reload(hub_folder)
    with torch.no_grad():
        before = model(**collate(conversations)).loss
    arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False, **SETTINGS)
    trainer = Trainer(model, arguments, train_dataset=conversations, data_collator=collate, processing_class=processor)
    trainer.train()
    model.eval()
    with torch.no_grad():
        assert model(**collate(conversations)).loss < before
    again = reload(tmp_path / "checkpoint-2")
    assert same_weights(again, model)
    assert AutoProcessor.from_pretrained(tmp_path / "checkpoint-2").decode([151669]) == "<IMG_CONTEXT>"


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def trl_settings(tmp_path, **kwargs):
    model_init_kwargs = {"dtype": "float32", "trust_remote_code": True}
    return {"output_dir": str(tmp_path), "model_init_kwargs": model_init_kwargs, **SETTINGS, **kwargs}


@pytest.fixture(scope="module")
def dataset(images):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(
        [
            {
                "images": images[: 1 + i % 2],
                "prompt": [
                    {
                        "role": "user",
                        "content": [{"type": "image"}] * (1 + i % 2) + [{"type": "text", "text": f"What is {i}?"}],
                    }
                ],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": f"It is {i}"}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "I do not know."}]}],
            }
            for i in range(4)
        ]
    )


@pytest.fixture(scope="module")
def messages(dataset):
    return dataset.map(
        lambda row: {"messages": row["prompt"] + row["chosen"]}, remove_columns=["prompt", "chosen", "rejected"]
    )


def assistant_loss(model, processor, messages, images):
    """Mean cross entropy of the assistant's tokens, computed by the model."""
    total = count = 0
    for row in messages:
        user, assistant = row["messages"]
        user = image_message(*images[: len(row["images"])], text=user["content"][-1]["text"])
        inputs = processor.apply_chat_template(
            [user, assistant],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        mask = torch.as_tensor(inputs.pop("assistant_masks"))
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        with torch.no_grad():
            total += float(model(**inputs, labels=labels).loss) * int(mask.sum())
        count += int(mask.sum())
    return total / count


@pytest.mark.slow
def test_sft(trl, hub_folder, real_vocabulary_model, processor, messages, images, tmp_path):
    settings = trl_settings(tmp_path, max_length=None, trust_remote_code=True, per_device_train_batch_size=4)
    arguments = trl.SFTConfig(**settings, assistant_only_loss=True)
    trainer = trl.SFTTrainer(str(hub_folder), arguments, train_dataset=messages)
    trainer.train()
    expected = assistant_loss(real_vocabulary_model, processor, messages, images)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=1e-4)
    assert losses[1] < losses[0]
    assert same_weights(reload(tmp_path / "checkpoint-2"), trainer.model)

    with pytest.raises(ValueError, match="Packing is not supported for vision datasets"):
        trl.SFTTrainer(str(hub_folder), trl.SFTConfig(**settings, packing=True), train_dataset=messages)


@pytest.mark.slow
def test_sft_of_packed_text(trl, hub_folder, real_vocabulary_model, processor, tmp_path):
    """Packed rows keep the documents apart: the loss is that of each document by itself."""
    datasets = pytest.importorskip("datasets")
    conversations = [
        [{"role": "user", "content": f"What {'is ' * i}{i}?"}, {"role": "assistant", "content": f"It is {i}"}]
        for i in range(4)
    ]
    arguments = trl.SFTConfig(
        **trl_settings(tmp_path, trust_remote_code=True, max_steps=1, save_strategy="no"),
        packing=True,
        max_length=128,
        assistant_only_loss=True,
    )
    rows = datasets.Dataset.from_list([{"messages": conversation} for conversation in conversations])
    trainer = trl.SFTTrainer(str(hub_folder), arguments, train_dataset=rows)
    assert len(trainer.train_dataset) == 1
    trainer.train()
    rows = [{"images": [], "messages": [image_message(text=u["content"]), a]} for u, a in conversations]
    expected = assistant_loss(real_vocabulary_model, processor, rows, [])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_sft_with_lora(trl, hub_folder, messages, tmp_path):
    peft = pytest.importorskip("peft")
    arguments = trl.SFTConfig(**trl_settings(tmp_path, max_length=None, trust_remote_code=True))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "q_proj_hw", "k_proj_hw"])
    trainer = trl.SFTTrainer(str(hub_folder), arguments, train_dataset=messages, peft_config=lora)
    trainer.train()
    model = peft.PeftModel.from_pretrained(reload(hub_folder), tmp_path / "checkpoint-2")
    trained = {name: weight for name, weight in trainer.model.named_parameters() if "lora_B" in name}
    assert trained
    assert all(weight.any() for weight in trained.values())
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in trained.items())


@pytest.mark.slow
def test_dpo(trl, hub_folder, dataset, tmp_path):
    arguments = trl.DPOConfig(**trl_settings(tmp_path, max_length=None, trust_remote_code=True))
    trainer = trl.DPOTrainer(str(hub_folder), args=arguments, train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are still the same
    assert losses[1] < losses[0]
    assert same_weights(reload(tmp_path / "checkpoint-2"), trainer.model)


@pytest.mark.slow
def test_grpo(trl, hub_folder, dataset, tmp_path):
    sizes = []

    def brightness(completions, images, **_):
        """A reward that looks at the images."""
        sizes.extend(image.size for row in images for image in row)
        words = [len(completion[0]["content"]) for completion in completions]
        return [count * row[0].convert("L").getpixel((0, 0)) for count, row in zip(words, images, strict=True)]

    processor = AutoProcessor.from_pretrained(hub_folder, trust_remote_code=True)
    processor.return_image_grid_thw = True
    arguments = trl.GRPOConfig(
        **trl_settings(tmp_path, trust_remote_code=True, per_device_train_batch_size=4),
        num_generations=2,
        max_completion_length=6,
        beta=0.1,
    )
    trainer = trl.GRPOTrainer(
        str(hub_folder), brightness, arguments, train_dataset=dataset, processing_class=processor
    )
    trainer.train()
    assert set(sizes) == {(96, 64), (64, 128)}
    steps = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the pixels of each prompt went where its words did
    assert steps[0]["grad_norm"] > 0
    assert same_weights(reload(tmp_path / "checkpoint-2"), trainer.model)


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return batch([random_prompt(generator, images) for images in ([(2, 3)], [(1, 2), (2, 2)])])


@pytest.mark.parametrize("tied", [False, True])
def test_peft(prompts, tmp_path, tied):
    peft = pytest.importorskip("peft")
    model = random_model(tiny_config(tie_word_embeddings=tied))
    base = copy.deepcopy(model)
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "q_proj_hw", "k_proj_hw"],
        modules_to_save=["patch_embed"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, lora)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(**prompts, labels=prompts["input_ids"]).loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trainable)
    adapted.eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = adapted(**prompts).logits
        assert not torch.allclose(expected, base(**prompts).logits, atol=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**prompts).logits, expected)
    tokens = loaded.generate(**prompts, **settings)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = NeoForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**prompts).logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(merged.generate(**prompts, **settings), tokens)
