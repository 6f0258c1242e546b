"""NEO's three-dimensional token indices, and the images that they imply.

Pure functions on integer tensors, without loops over tokens or images, shared by processor, model and collators.
Shapes: B rows, L tokens, N images (or video frames), P patches. A visual token folds `spatial_merge_size` x
`spatial_merge_size` patches. Sources: NEO paper, section 3.1 (Native-RoPE), and the released checkpoints' behaviour.
"""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)

import torch
from torch.nn import functional as F
from transformers.utils import torch_compilable_check
from transformers.utils.import_utils import is_tracing


def temporal_index(
    input_ids: torch.Tensor,
    *,
    image_token_id: int,
    image_start_token_id: int,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    T index of each token: `cumsum([token is not <IMG_CONTEXT>] + [previous token is <img>]) - 1`, so that `<img>` has
    t, all visual tokens of its image share t+1, and `</img>` has t+2.

    Args:
        input_ids: (B, L) token ids.
        image_token_id, image_start_token_id: ids of `<IMG_CONTEXT>` and `<img>`.
        attention_mask: (B, L), 0 on padding. Padding gets index 0 and does not count.
        document_ids: (B, L), the same for all tokens of a document, which are contiguous. T restarts at each document.

    Returns:
        (B, L) int64.
    """
    is_text = input_ids != image_token_id
    opens = input_ids == image_start_token_id
    if attention_mask is not None:
        attended = attention_mask != 0
        is_text, opens = is_text & attended, opens & attended
    after_start = F.pad(opens[:, :-1], (1, 0))
    if document_ids is not None:
        is_first = document_starts(document_ids)
        after_start = after_start & ~is_first
    steps = is_text.long() + after_start.long()
    index = steps.cumsum(-1) - 1
    if document_ids is not None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = torch.where(is_first, positions, 0).cummax(-1).values  # where each token's document begins
        index = index - (index - steps + 1).gather(1, first)
    return index if attention_mask is None else index.masked_fill(~attended, 0)


def spatial_index(
    is_image: torch.Tensor, grid_hw: torch.Tensor | None, merge_size: int, num_image_tokens: int | None = None
) -> torch.Tensor:
    """
    Row and column of each visual token in the token grid of its image, 0 for all other tokens.

    Args:
        is_image: boolean, any shape; True on visual tokens, which in row-major order fill one image after another.
        grid_hw: (N, 2) (rows, columns) of each image in patches; may be `None` if there are no visual tokens.
        merge_size: patches along each side of a visual token.
        num_image_tokens: the number of visual tokens, if known.

    Returns:
        (2, *is_image.shape) int64: (row, column).

    Raises:
        ValueError: a grid is not made of whole tokens, or the grids hold more or fewer tokens than `is_image`.
    """
    if grid_hw is None:
        grid_hw = torch.zeros((0, 2), dtype=torch.long)
    check_grid(grid_hw, merge_size)
    grid = grid_hw // merge_size
    found = is_image.sum() if num_image_tokens is None else torch.tensor(num_image_tokens)
    torch_compilable_check(
        found == grid.prod(-1).sum().to(found.device),
        lambda: (
            f"Image tokens and images do not match: the input holds {int(found)} image tokens, but "
            f"image_grid_hw describes {len(grid)} images of {grid.prod(-1).tolist()} tokens."
        ),
    )
    grid = grid.to(is_image.device)
    if grid.shape[0] == 0:
        return torch.zeros((2, *is_image.shape), dtype=torch.long, device=is_image.device)
    rank = is_image.flatten().cumsum(0).view(is_image.shape) - 1
    _, row, column = place_in_grids(rank, grid)
    return torch.stack([row, column]).masked_fill(~is_image, 0)


def place_in_grids(rank: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Locate cells of grids that are laid out one after another, row by row.

    Args:
        rank: cell numbers, any shape.
        grid: (N, 2) (rows, columns) of each grid.

    Returns:
        Grid number, row and column of each cell, each shaped like `rank`.
    """
    sizes = grid.prod(-1)
    ends = sizes.cumsum(0)
    number = torch.searchsorted(ends, rank, right=True).clamp(max=sizes.shape[0] - 1)
    offset = rank - (ends - sizes)[number]
    columns = grid[:, 1][number]
    return number, offset // columns, offset % columns


def check_grid(grid_hw: torch.Tensor, merge_size: int):
    """Raise a ValueError that names the first image whose grid of patches does not fold into visual tokens."""
    what = "image_grid_hw must be an integer tensor of shape (images, 2), (rows, columns) in patches, got"
    if not isinstance(grid_hw, torch.Tensor):
        raise ValueError(f"{what} {type(grid_hw).__name__} {grid_hw!r:.100}.")
    if grid_hw.ndim != 2 or grid_hw.shape[-1] != 2 or grid_hw.is_floating_point():
        raise ValueError(f"{what} {tuple(grid_hw.shape)} {grid_hw.dtype}.")
    if is_tracing(grid_hw):
        return
    bad = ((grid_hw <= 0) | (grid_hw % merge_size != 0)).any(-1)
    if bad.any():
        image = int(bad.nonzero()[0])
        raise ValueError(
            f"image_grid_hw[{image}] must be positive multiples of {merge_size} patches (rows, columns), got "
            f"{tuple(grid_hw[image].tolist())}."
        )


def allocate_position_ids(
    input_ids: torch.Tensor,
    image_grid_hw: torch.Tensor | None = None,
    *,
    image_token_id: int,
    image_start_token_id: int,
    spatial_merge_size: int = 2,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    num_image_tokens: int | None = None,
) -> torch.Tensor:
    """
    The T, H and W index of every token (NEO paper, section 3.1). T counts tokens, a whole image as one; H and W are
    the row and column of a visual token in its image, and 0 for all other tokens.

    Args:
        input_ids: (B, L) token ids.
        image_grid_hw: (N, 2) (rows, columns) in patches of the images, in prompt order, one batch row after another.
        image_token_id, image_start_token_id: ids of `<IMG_CONTEXT>` and `<img>`.
        spatial_merge_size: patches along each side of a visual token.
        attention_mask: (B, L), 0 on padding, whose indices are 0.
        document_ids: (B, L), the same for all tokens of a document in a packed row; T restarts at each.
        num_image_tokens: the number of image tokens, if known, which saves counting them on the device.

    Returns:
        (3, B, L) int64: T, H, W.

    Raises:
        ValueError: images and image tokens do not match in number, a grid does not fold into visual tokens, or
            `attention_mask` or `document_ids` does not have the shape of `input_ids`.
    """
    for name, tensor in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}."
            )
    t = temporal_index(
        input_ids,
        image_token_id=image_token_id,
        image_start_token_id=image_start_token_id,
        attention_mask=attention_mask,
        document_ids=document_ids,
    )
    hw = spatial_index(input_ids == image_token_id, image_grid_hw, spatial_merge_size, num_image_tokens)
    return torch.cat([t[None], hw])


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """(B, L) boolean, True on the first token of each document of `document_ids` (B, L)."""
    return F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)


def image_ids(temporal: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    Find the image of each token from the T indices: only visual tokens of the same image share a T index.

    Args:
        temporal: (B, L) T indices.
        document_ids: (B, L), the same for all tokens of a document in a packed row.

    Returns:
        (B, L) int64: an image number, unique within the row, or -1 for tokens that share their T index with no other.
    """
    joined = temporal[:, 1:] == temporal[:, :-1]
    if document_ids is not None:
        joined = joined & ~document_starts(document_ids)[:, 1:]
    with_previous, with_next = F.pad(joined, (1, 0)), F.pad(joined, (0, 1))
    run = (~with_previous).cumsum(-1)
    return torch.where(with_previous | with_next, run, -1)


def without_time(grid_hw: torch.Tensor | None, grid_thw: torch.Tensor | None) -> torch.Tensor | None:
    """
    Grids (N, 2), converted if given as (N, 3) grids of (1, rows, columns), as clients of other models pass them.

    Raises:
        ValueError: a grid spans several time steps; the frames of a video are separate images.
    """
    if grid_thw is None:
        return grid_hw
    if not is_tracing(grid_thw) and not (grid_thw[:, 0] == 1).all():
        raise ValueError(
            f"image_grid_thw must be (1, rows, columns) for each image or frame, got {grid_thw.tolist()}."
        )
    return grid_thw[:, 1:]


__all__ = ["allocate_position_ids"]
