"""Commands for training."""

from .options import Model

from typing import Annotated

import typer

app = typer.Typer()

# Bad records that are listed, per source.
MAX_REASONS = 10


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

    settings = yaml.safe_load(Path(recipe).read_text()) if recipe else {}
    max_length = max_length or settings.get("max_length")
    processor = load_processor(model_name)
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if (value := value or settings.get(name)) is not None:
            setattr(processor.image_processor, name, value)
    columns = parse_columns(column)
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
    per_step = batch * settings.get("gradient_accumulation_steps", 1) * processes
    print(f"  steps       {num_rows / per_step:,.1f}, {per_step:,} {'rows' if max_length else 'samples'} each")
    if max_steps := settings.get("max_steps"):
        print(f"  passes      {max_steps * per_step / max(num_rows, 1):,.1f} in {max_steps:,} steps")

    config = NeoConfig.from_pretrained(model_name)
    print("\nMemory, estimated")
    print(f"  model       {_gb(checks.training_bytes(config))} of weights, gradients and AdamW, over all devices")
    print(
        f"  activations {_gb(checks.checkpointed_bytes(config, batch * tokens))} per device, with gradient "
        "checkpointing, and those of one layer"
    )
    print(f"  loader      {_gb(batch * row_bytes)} per batch at most; each worker prepares two ahead")
    if plot:
        checks.draw_lengths(reports, plot, max_length)
    if any(report.bad for report in reports):
        raise typer.Exit(1)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"
