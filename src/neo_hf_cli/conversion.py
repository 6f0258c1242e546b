"""Commands that convert, initialise and publish checkpoints."""

from .options import Force, Model, Out, ShardSize, Tokenizer

from typing import Annotated

import typer

app = typer.Typer()


def _say_missing(missing: list[str], out: str):
    if missing:
        print(f"{out} has no {', '.join(missing)}: pass the folder of a tokenizer with --tokenizer.")


@app.command()
def convert(
    raw: Annotated[str, typer.Argument(metavar="RAW", help="Folder or Hub id of a raw checkpoint.")],
    out: Out,
    tokenizer: Tokenizer = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32; by default that of the source.")
    ] = None,
    max_shard_size: ShardSize = "5GB",
    num_pre_buffer_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Number of pre-Buffer layers, if the source does not say.")
    ] = None,
    repo_id: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Hub id that the model card's examples load from.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="License as the Hub spells it (apache-2.0, mit, ...); by default that of the source.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all tensors and the logits of a prompt with the source.")
    ] = False,
    force: Force = False,
):
    """Convert a raw checkpoint to a complete Hub repository."""
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype must be bfloat16, float16 or float32, got {dtype}.")
    import torch

    from neo_hf.conversion import convert_raw_to_hub

    missing = convert_raw_to_hub(
        raw,
        out,
        tokenizer=tokenizer,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        num_pre_buffer_layers=num_pre_buffer_layers,
        repo_id=repo_id,
        license=license,
        verify=verify,
        force=force,
    )
    if verify:
        print(f"Verified: all tensors of {out}, and its logits on a fixed prompt, are those of {raw}.")
    _say_missing(missing, out)


@app.command()
def export(model_name: Model, out: Out, max_shard_size: ShardSize = "5GB", force: Force = False):
    """Export a model to the layout of the released checkpoints."""
    from neo_hf.conversion import convert_hub_to_raw

    convert_hub_to_raw(model_name, out, max_shard_size=max_shard_size, force=force)


@app.command()
def onnx(
    model_name: Model,
    out: Out,
    dtype: Annotated[
        list[str], typer.Option(metavar="DTYPE", help="fp32, fp16, int8, q4 or q4f16. Repeatable: a file each.")
    ] = ["fp32"],  # noqa: B006 (typer copies it)
    force: Force = False,
):
    """Export a model to ONNX: one graph for prefill and decoding."""
    import logging
    import warnings

    # torch.onnx says that torchvision is not installed, and warns of its own use of torch.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from neo_hf.onnx import export_onnx

    export_onnx(model_name, out, dtypes=dtype, force=force)


@app.command()
def init(
    qwen3: Annotated[str, typer.Argument(metavar="QWEN3", help="Folder or Hub id of a Qwen3 LLM.")],
    out: Out,
    num_pre_buffer_layers: Annotated[int, typer.Option(metavar="N", help="Number of pre-Buffer layers.")],
    tokenizer: Tokenizer = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the new weights.")] = 0,
    force: Force = False,
):
    """Initialize a NEO from a Qwen3 LLM, ready for pre-training."""
    from neo_hf.conversion import init_from_qwen3

    missing = init_from_qwen3(
        qwen3,
        out,
        num_pre_buffer_layers=num_pre_buffer_layers,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        seed=seed,
        force=force,
    )
    _say_missing(missing, out)


pre_buffer = typer.Typer(help="Extract the pre-Buffer, or put it on another LLM.", no_args_is_help=True)
app.add_typer(pre_buffer, name="pre-buffer")


@pre_buffer.command()
def extract(model_name: Model, out: Out, force: Force = False):
    """Save the patch embedding and pre-Buffer of a NEO on their own."""
    from neo_hf.conversion import extract_pre_buffer

    extract_pre_buffer(model_name, out, force=force)


@pre_buffer.command()
def graft(
    folder: Annotated[str, typer.Argument(metavar="PRE_BUFFER", help="Folder written by extract.")],
    qwen3: Annotated[str, typer.Argument(metavar="QWEN3", help="Folder or Hub id of a Qwen3 LLM.")],
    out: Out,
    tokenizer: Tokenizer = None,
    max_shard_size: ShardSize = "5GB",
    force: Force = False,
):
    """Initialize a NEO from a pre-Buffer and a Qwen3 LLM of the same width."""
    from neo_hf.conversion import graft_pre_buffer

    missing = graft_pre_buffer(folder, qwen3, out, tokenizer=tokenizer, max_shard_size=max_shard_size, force=force)
    _say_missing(missing, out)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Folder in Hub format.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Hub id, user/name.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without uploading them.")] = False,
):
    """Publish a folder in Hub format: what makes a model repository, and not the checkpoints and logs beside it."""
    from neo_hf import publishing

    files = publishing.check_complete(folder)
    if left_out := publishing.published_files(folder)[1]:
        print(f"Left out: {', '.join(left_out)}.")
    if dry_run:
        for file, size in files.items():
            print(f"{size:>15,}  {file}")
        print(f"{sum(files.values()):>15,}  bytes in {len(files)} files to {repo_id}")
        return
    print(publishing.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr))
