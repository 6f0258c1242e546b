"""Commands for training."""

from .options import Model

from typing import Annotated

import typer

app = typer.Typer()

# Bad records that are listed, per source.
MAX_REASONS = 10

# What the entries of `planning.Plan.memory` are.
MEMORY = {
    "weights": "",
    "gradients": "",
    "optimizer": "two moments of AdamW; with DeepSpeed also float32 weights",
    "gathered": "weights and gradients of the head and of two layers",
    "copies": "of the weights in bfloat16 and of the gradients, where there are such",
    "layer inputs": "kept for the backward pass",
    "one layer": "computed again in the backward pass",
    "layers": "kept for the backward pass",
    "final norm": "kept for the backward pass",
    "images": "if all tokens are of images",
    "loss": "logits of a chunk",
}


@app.command("check-data")
def check_data(
    model_name: Model,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...", help="As --train_data of examples/train.py: files, folders, globs, Hub ids."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Recipe of examples/train.py, for what the options below leave out, and for batch sizes.",
        ),
    ] = None,
    root: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where relative paths of images and videos start from.")
    ] = None,
    column: Annotated[
        list[str], typer.Option(metavar="NAME=COLUMN", help="Name of a column, as image=jpg. Repeatable.")
    ] = [],  # noqa: B006
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Tokens per packed row.")] = None,
    min_pixels: Annotated[int | None, typer.Option(metavar="N", help="Pixel budget per image.")] = None,
    max_pixels: Annotated[int | None, typer.Option(metavar="N", help="Pixel budget per image.")] = None,
    processes: Annotated[int, typer.Option(metavar="N", help="Number of processes, usually GPUs, of the run.")] = 1,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Read only the first N records of each.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw the lengths as a histogram.")] = None,
):
    """
    Encode training data once, and say what is in it: formats, lengths, bad records, fill of the rows, steps per pass,
    and memory. Fails if a record is bad.
    """
    from pathlib import Path

    import yaml

    from neo_hf import NeoConfig
    from neo_hf.loading import load_processor
    from neo_hf.training import Source, checks
    from neo_hf.training.arguments import parse_columns
    from neo_hf.training.planning import plan_run
    from neo_hf.training.sequence_parallel import check_divides

    settings = yaml.safe_load(Path(recipe).read_text()) if recipe else {}
    max_length = max_length or settings.get("max_length")
    processor = load_processor(model_name)
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if (value := value or settings.get(name)) is not None:
            setattr(processor.image_processor, name, value)
    root = root or settings.get("data_root")
    named = settings.get("columns", [])  # one of them is not a list in every recipe
    columns = parse_columns(column or ([named] if isinstance(named, str) else named))
    group = settings.get("sequence_parallel_size", 1)
    check_divides(group, processes, "--processes")
    sources = [Source(name, root=root, name=name, columns=columns) for name in data]
    reports = [checks.check_source(source, processor, limit) for source in sources]

    for report in reports:
        lengths, num_samples = sorted(report.lengths), len(report.lengths)
        formats = ", ".join(f"{count:,} {name}" for name, count in report.formats.most_common())
        print(f"\n{report.name}\n  records     {formats}{' (and more that were not read)' * report.is_part}")
        print(f"  samples     {num_samples:,}, with {sum(report.images):,} images and frames; {len(report.bad):,} bad")
        if lengths:
            print(
                f"  tokens      {sum(lengths):,}, of which {sum(report.learnt):,} are learnt; median "
                f"{lengths[num_samples // 2]:,}, longest {lengths[-1]:,}"
            )
        for line in checks.histogram(report.lengths):
            print(f"  {line}")
        for number, (name, reason) in enumerate(report.bad.items()):
            if number == MAX_REASONS:
                print(f"  ... and {len(report.bad) - number:,} more")
                break
            print(f"  bad: {name}: {reason}")

    num_samples = sum(len(report.lengths) for report in reports)
    num_rows, tokens, row_bytes = num_samples, 0, max((max(r.bytes, default=0) for r in reports), default=0)
    print(f"\nOne pass over {'what was read' if any(r.is_part for r in reports) else 'everything'}")
    if max_length:
        rows = checks.check_rows(reports, max_length)
        num_rows, tokens, row_bytes = rows.num_rows, max_length, rows.max_bytes
        print(
            f"  rows        {num_rows:,} of {max_length:,} tokens, {rows.fill:.1%} full; {rows.num_overlong:,} "
            "samples are longer and left out"
        )
    else:
        tokens = max((max(r.lengths, default=0) for r in reports), default=0)
    batch = settings.get("per_device_train_batch_size", 8)
    per_step = batch * settings.get("gradient_accumulation_steps", 1) * processes // group
    print(f"  steps       {num_rows / per_step:,.1f}, {per_step:,} {'rows' if max_length else 'samples'} each")
    if max_steps := settings.get("max_steps"):
        print(f"  passes      {max_steps * per_step / max(num_rows, 1):,.1f} in {max_steps:,} steps")

    print("\nMemory, estimated")
    if settings.get("lora_rank") or group > 1:
        print("  device      not estimated with adapters or sequence parallelism")
    elif tokens:
        plan = plan_run(
            NeoConfig.from_pretrained(model_name),
            settings.get("stage", "sft"),
            batch * tokens,
            processes,
            "fsdp2" if processes > 1 else "ddp",
            bf16=settings.get("bf16", False),
            gradient_checkpointing=_checkpoints(settings),
        )
        print(f"  device      {_gb(sum(plan.memory.values()))} at least; `neo-hf plan` says for what")
    print(f"  loader      {_gb(batch * row_bytes)} per batch at most; each worker prepares two ahead")
    if plot:
        checks.draw_lengths(reports, plot, max_length)
    if any(report.bad for report in reports):
        raise typer.Exit(1)


@app.command()
def plan(
    model_name: Model,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Recipe of examples/train.py, for what the options below leave out, and for the rest."
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="What is trained; sft by default.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Tokens per packed row.")] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the stage.")] = None,
    devices: Annotated[int, typer.Option(metavar="N", help="Number of GPUs.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="ddp, zero2, zero3, fsdp2 or hsdp; by default fsdp2, on one device ddp."),
    ] = None,
    devices_per_machine: Annotated[int, typer.Option(metavar="N", help="That share the weights with hsdp.")] = 8,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="A100, H100, H200 or B200.")] = "H100",
    mfu: Annotated[float, typer.Option(metavar="SHARE", help="Model FLOPs utilisation to assume.")] = 0.4,
):
    """
    Say what a training stage would take, without GPUs and without weights: parameters, memory per device and time.
    """
    from pathlib import Path

    import yaml

    from neo_hf import NeoConfig
    from neo_hf.publishing.model_card import load_release, released_config
    from neo_hf.training import planning

    settings = yaml.safe_load(Path(recipe).read_text()) if recipe else {}
    if settings.get("lora_rank"):
        raise ValueError(f"{recipe} trains adapters; a plan is of a stage that trains the weights themselves.")
    if (group := settings.get("sequence_parallel_size", 1)) > 1:
        raise ValueError(f"{recipe} divides rows among {group} processes; a plan is of whole rows in each.")
    stage = stage or settings.get("stage", "sft")
    max_length = max_length or settings.get("max_length")
    max_steps = max_steps or settings.get("max_steps")
    if not max_length:
        raise ValueError("A plan needs the length of a row: give --max-length or --recipe.")
    if not (peak := planning.peak_flops(gpu)):
        raise ValueError(f"gpu must be one of {', '.join(planning.PEAK_FLOPS)}, got {gpu!r}.")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, got {mfu}.")
    is_released = model_name in load_release()["checkpoints"]
    config = released_config(model_name) if is_released else NeoConfig.from_pretrained(model_name)
    sharding = sharding or ("fsdp2" if devices > 1 else "ddp")
    rows = settings.get("per_device_train_batch_size", 8)
    planned = planning.plan_run(
        config,
        stage,
        rows * max_length,
        devices,
        sharding,
        devices_per_machine,
        settings.get("bf16", False),
        _checkpoints(settings),
    )

    print("Parameters")
    print(f"  total          {planned.num_parameters:>18,}")
    share = planned.num_trained / planned.num_parameters
    print(f"  trained        {planned.num_trained:>18,}  {share:.1%}, stage {stage}")
    print(f"\nMemory per device, of {devices:,} with {sharding}, for {rows:,} x {max_length:,} tokens")
    for name, num_bytes in planned.memory.items():
        print(f"  {name:<14} {_gb(num_bytes):>18}  {MEMORY[name]}".rstrip())
    print(f"  {'at least':<14} {_gb(sum(planned.memory.values())):>18}")

    per_step = rows * max_length * devices * settings.get("gradient_accumulation_steps", 1)
    attention = planning.attention_flops_per_token(config, max_length) / planned.flops_per_token
    print(f"\nTime at {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s ({gpu})")
    print(f"  FLOPs          {planned.flops_per_token / 1e9:>14,.1f} G  per token, without attention")
    print(f"  step           {planned.seconds(per_step, devices, peak, mfu):>14,.1f} s  {per_step:,} tokens")
    if max_steps:
        hours = planned.seconds(max_steps * per_step, devices, peak, mfu) / 3600
        print(f"  stage          {hours:>14,.1f} h  {max_steps:,} steps, {max_steps * per_step / 1e9:,.1f} G tokens")
    print(f"  attention      {'+' + format(attention, '.0%'):>16}  if each row is one document; less for shorter ones")


def _checkpoints(settings: dict) -> bool:
    """Whether each layer is computed again in the backward pass. Transformers 5.23 has a new name for it."""
    return settings.get("activation_checkpointing", settings.get("gradient_checkpointing", False))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
