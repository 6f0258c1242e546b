"""The data of a training run, as arguments of a command line."""

from dataclasses import dataclass, field

from neo_hf.training.collators import LOSS_WEIGHTINGS
from neo_hf.training.shards import SUFFIXES
from neo_hf.training.sources import Source
from neo_hf.training.streams import WEIGHTINGS


@dataclass
class DataArguments:
    train_data: list[str] = field(
        metadata={"help": f"Files ({', '.join(SUFFIXES)}), folders or globs of them, or Hub ids of datasets."}
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each in the training data; equal by default."}
    )
    weighting: str = field(default="samples", metadata={"help": f"What the weights count: {', '.join(WEIGHTINGS)}."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "As train_data."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder that relative paths of images and videos start from."}
    )
    columns: list[str] = field(
        default_factory=list, metadata={"help": "Names of columns, as in image=jpg caption=txt, where they differ."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Records that each worker shuffles, per source, besides the order of shards."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Pack rows of this many tokens; pad to the longest sample by default."}
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Processes that train on the same rows, each on a slice of their tokens: for long rows. It must "
            "divide the number of processes, of attention heads, and max_length."
        },
    )
    loss_weighting: str = field(default="square", metadata={"help": f"{', '.join(LOSS_WEIGHTINGS)}."})
    num_answers: int = field(
        default=4, metadata={"help": "Answers to write to output_dir/answers at each evaluation."}
    )

    def sources(self, names: list[str], weights: list[float] | None = None) -> list[Source]:
        """
        Raises:
            FileNotFoundError, ValueError: see `Source`; the number of weights, or a column, is not what it should be.
        """
        weights = weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"train_weights must have one weight per source, got {len(weights)} for {len(names)} sources."
            )
        columns = parse_columns(self.columns)
        return [
            Source(
                name,
                root=self.data_root,
                weight=weight,
                name=name,
                columns=columns,
                shuffle_buffer=self.shuffle_buffer,
            )
            for name, weight in zip(names, weights, strict=True)
        ]


def parse_columns(columns: list[str]) -> dict[str, str]:
    """The mapping that `image=jpg` and the like write."""
    pairs = [column.partition("=") for column in columns]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise ValueError(f"columns must be written NAME=COLUMN, as image=jpg, got {ours}{equals}{theirs}.")
    return {ours: theirs for ours, _, theirs in pairs}
