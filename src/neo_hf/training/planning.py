"""What a run takes, before there is one: parameters, memory per device, floating-point operations and time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from neo_hf.configuration_neo import NeoConfig
from neo_hf.loss_neo import NeoOutputHead
from neo_hf.modeling_neo import NeoForConditionalGeneration
from neo_hf.rotary_neo import rotary_tables
from neo_hf.training.stages import parameter_count, prepare_for_stage

# bfloat16 FLOP/s without sparsity, from the data sheets of the SXM variants.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
# What each way of training on several devices divides among them.
SHARDINGS = {
    "ddp": (),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer"),
    "hsdp": ("weights", "gradients", "optimizer"),
}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s in bfloat16 of a GPU by its name, or `None` if it is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(model: nn.Module) -> int:
    """
    Floating-point operations per token of the matrix products with weights, forward and backward: 6 per trained
    parameter and 4 per frozen one, which needs no gradient of its own. Looking up a token embedding takes none.
    Attention scores and what gradient checkpointing repeats are left out, as is usual in model FLOPs utilisation.
    """
    parameters = list(model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    if embedding is not model.get_output_embeddings().weight:  # type: ignore[operator, union-attr]
        parameters = [parameter for parameter in parameters if parameter is not embedding]
    return 4 * parameter_count(parameters) + 2 * parameter_count(p for p in parameters if p.requires_grad)


def attention_flops_per_token(config: NeoConfig, document_length: int) -> int:
    """
    Floating-point operations per token of attention scores and their use, forward and backward, in causal documents of
    this length. Queries and keys are twice as wide as values.
    """
    text = config.text_config
    return 9 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * document_length


@dataclass(frozen=True)
class Plan:
    """
    What a training stage takes.

    Args:
        num_parameters: of the model.
        num_trained: of those, in this stage.
        memory: bytes on each device, by purpose.
        flops_per_token: see the function.
    """

    num_parameters: int
    num_trained: int
    memory: dict[str, int]
    flops_per_token: int

    def seconds(self, num_tokens: int, num_devices: int, peak: float, mfu: float) -> float:
        """
        Time to train on so many tokens.

        Args:
            num_tokens: of all devices together.
            num_devices: how many there are.
            peak: FLOP/s of one device, see `PEAK_FLOPS`.
            mfu: model FLOPs utilisation, of which `NeoTrainer` logs the actual one.
        """
        return num_tokens * self.flops_per_token / (num_devices * peak * mfu)


def plan_run(
    config: NeoConfig,
    stage: str,
    num_tokens: int,
    num_devices: int = 1,
    sharding: str = "ddp",
    devices_per_machine: int = 8,
    bf16: bool = True,
    gradient_checkpointing: bool = True,
) -> Plan:
    """
    Plan a training stage with AdamW on float32 weights. The model is on the meta device, where it takes no memory.

    The memory is a lower bound. Gradients of activations, buffers of kernels and of the communication library, and
    fragmentation are left out.

    Args:
        config: of the model.
        stage: see `prepare_for_stage`.
        num_tokens: on each device at once: rows x tokens per row.
        num_devices: how many there are.
        sharding: one of `SHARDINGS`; with one device, `"ddp"` is training without a launcher.
        devices_per_machine: with `"hsdp"`, those that share the weights.
        bf16: whether computation is in bfloat16.
        gradient_checkpointing: whether each layer keeps only its input for the backward pass.

    Raises:
        ValueError: unknown stage or sharding, a number that is not positive, or with `"hsdp"` a number of devices that
            is no multiple of `devices_per_machine`.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {sharding!r}.")
    if min(num_devices, devices_per_machine, num_tokens) < 1:
        raise ValueError(
            f"num_devices, devices_per_machine and num_tokens must be positive, got {num_devices}, "
            f"{devices_per_machine} and {num_tokens}."
        )
    num_shards = devices_per_machine if sharding == "hsdp" else num_devices
    if num_devices % num_shards:
        raise ValueError(f"hsdp needs whole machines of {num_shards} devices, got {num_devices} devices.")
    with torch.device("meta"):
        model = NeoForConditionalGeneration(config)
    trained = parameter_count(prepare_for_stage(model, stage).values())
    total, per_token = parameter_count(model.parameters()), flops_per_token(model)
    layers = model.get_decoder().layers

    dtype = torch.bfloat16 if bf16 else torch.float32
    # DeepSpeed holds the model in bfloat16, and float32 copies of what is trained with the optimizer.
    is_deepspeed = sharding.startswith("zero")
    size = dtype.itemsize if is_deepspeed else 4
    memory = {
        "weights": size * total,
        "gradients": size * trained,
        "optimizer": (8 if size == 4 else 12) * trained,
    }
    for name in SHARDINGS[sharding]:
        memory[name] = -(-memory[name] // num_shards)
    if "weights" in SHARDINGS[sharding]:
        # Of the head and of two layers, one of which is gathered while the other computes: weights and gradients.
        count = parameter_count(model.lm_head.parameters()) + 2 * parameter_count(layers[0].parameters())
        memory["gathered"] = 2 * dtype.itemsize * count
    elif not is_deepspeed:
        memory["copies"] = trained * ((2 if bf16 else 0) + (4 if num_devices > 1 else 0))  # autocast's, DDP's buckets

    model = model.to(dtype)
    layer_inputs = _layer_inputs(config, num_tokens, dtype)
    inside = bytes_saved(layers[0], **layer_inputs)
    if gradient_checkpointing:
        # Under autocast, hidden states stay in float32 between layers.
        hidden_size = 4 if sharding == "ddp" else dtype.itemsize
        memory["layer inputs"] = hidden_size * len(layers) * config.text_config.hidden_size * num_tokens
        memory["one layer"] = inside
    else:
        memory["layers"] = len(layers) * inside
    memory["final norm"] = bytes_saved(model.get_decoder().norm, layer_inputs["hidden_states"])
    memory["images"] = bytes_saved(model.model.patch_embed, *_image(config, num_tokens))
    # Of a chunk: logits and their gradients, also in float32, and log-probabilities.
    chunk = min(NeoOutputHead.chunk_tokens, num_tokens)
    memory["loss"] = (2 * dtype.itemsize + 12) * chunk * config.text_config.vocab_size
    return Plan(total, trained, memory, per_token)


def bytes_saved(function: Callable, *args, **kwargs) -> int:
    """Memory of the tensors that a forward pass keeps for its backward pass, parameters excepted."""
    saved: dict[int, torch.UntypedStorage] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = function(*args, **kwargs)
        size = sum(storage.nbytes() for storage in saved.values())
    del output
    return size


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves, on the meta device, where nothing is computed."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attend(module, query, key, value, mask, **kwargs):
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


def _layer_inputs(config: NeoConfig, num_tokens: int, dtype: torch.dtype) -> dict:
    text = config.text_config
    positions = torch.zeros(3, 1, num_tokens, device="meta")
    return {
        "hidden_states": torch.empty(1, num_tokens, text.hidden_size, dtype=dtype, device="meta", requires_grad=True),
        "position_embeddings": rotary_tables(positions, text.head_dim, text.rope_parameters, dtype),
        "attend": _attend,
    }


def _image(config: NeoConfig, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of an image of so many visual tokens, and its grid."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patches = torch.empty(num_tokens * merge**2, vision.num_channels * vision.patch_size**2, device="meta")
    return patches, torch.tensor([[merge, merge * num_tokens]])
