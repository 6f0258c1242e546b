"""Pixels to visual tokens: the only module between an image and the decoder (NEO paper, section 3.1)."""

from .configuration_neo import NeoVisionConfig
from .indexing_neo import check_grid, place_in_grids
from .rotary_neo import rotate_patches

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_tracing

# Patches embedded at once. Otherwise, patch features would take most of the memory of a long prompt.
PATCH_CHUNK = 4096


class NeoPatchProjection(nn.Module):
    """
    A convolution whose stride equals its kernel size, as one matrix product on inputs that are already cut into
    kernel-sized pieces (pieces, in_channels * kernel * kernel). Keeps the Conv2d weight layout of the checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, pieces: torch.Tensor) -> torch.Tensor:
        return F.linear(pieces, self.weight.flatten(1), self.bias)


class NeoPatchEmbedding(nn.Module):
    """Two projections, a GELU and a rotary encoding. Embeds all images of a batch together, without padding."""

    def __init__(self, config: NeoVisionConfig, output_size: int):
        super().__init__()
        self.config = config
        self.patch_embedding = NeoPatchProjection(config.num_channels, config.hidden_size, config.patch_size)
        self.dense_embedding = NeoPatchProjection(config.hidden_size, output_size, config.spatial_merge_size)

    def forward(self, pixel_values: torch.Tensor, grid_hw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixel_values: (P, channels * patch_size * patch_size), channel-major, patches row-major over each image.
            grid_hw: (N, 2) (rows, columns) of each image in patches.

        Returns:
            Patch features (P, D) and visual tokens (V, E), row-major over each image.
        """
        self._check(pixel_values, grid_hw)
        grid_hw = grid_hw.to(pixel_values.device)
        features = self._embed_patches(pixel_values, grid_hw)
        return features, self._merge_patches(features, grid_hw)

    def _check(self, pixel_values: torch.Tensor, grid_hw: torch.Tensor):
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floating-point numbers, got {pixel_values.dtype}: uint8 patches of "
                "training samples pass through neo_hf.training.normalize_patches first."
            )
        num_patches, patch_dim = pixel_values.shape
        expected_dim = self.config.num_channels * self.config.patch_size**2
        if patch_dim != expected_dim:
            raise ValueError(f"pixel_values must be (patches, {expected_dim}), got {tuple(pixel_values.shape)}.")
        check_grid(grid_hw, self.config.spatial_merge_size)
        if not is_tracing(grid_hw) and (total := int(grid_hw.prod(-1).sum())) != num_patches:
            raise ValueError(
                f"pixel_values and image_grid_hw do not match: {num_patches} patches, but the grids "
                f"{grid_hw.tolist()} hold {total}."
            )

    def _embed_patches(self, pixel_values: torch.Tensor, grid_hw: torch.Tensor) -> torch.Tensor:
        """(P, channels * patch_size * patch_size) -> (P, D)."""
        num_patches = pixel_values.shape[0]
        _, rows, columns = place_in_grids(torch.arange(num_patches, device=pixel_values.device), grid_hw)
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        theta = self.config.rope_parameters["rope_theta"]
        inputs = (pixel_values, rows, columns)
        chunks = [inputs] if is_tracing(pixel_values) else zip(*(x.split(PATCH_CHUNK) for x in inputs), strict=True)
        return torch.cat([rotate_patches(F.gelu(self.patch_embedding(x)), r, c, theta) for x, r, c in chunks])

    def _merge_patches(self, features: torch.Tensor, grid_hw: torch.Tensor) -> torch.Tensor:
        """(P, D) -> (V, E): each square of spatial_merge_size^2 neighbouring patches becomes a visual token."""
        merge = self.config.spatial_merge_size
        tokens = torch.arange(features.shape[0] // merge**2, device=features.device)
        image, rows, columns = place_in_grids(tokens, grid_hw // merge)
        sizes, width = grid_hw.prod(-1), grid_hw[image, 1]
        first = (sizes.cumsum(0) - sizes)[image] + merge * (rows * width + columns)  # (V,) upper left patch
        step = torch.arange(merge, device=first.device)
        square = first[:, None, None] + step[:, None] * width[:, None, None] + step  # (V, merge, merge)
        # The weight is (E, D, merge, merge): features come first in each piece.
        return self.dense_embedding(features[square.flatten(1)].transpose(1, 2).flatten(1))


__all__ = ["NeoPatchEmbedding"]
