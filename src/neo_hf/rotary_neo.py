"""Rotary encodings as pure functions: for patch features, and the decoder's Native-RoPE (NEO paper, section 3.1)."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)

import torch


def inverse_frequencies(theta: float, channels: int, device: torch.device) -> torch.Tensor:
    """Rotary inverse frequencies theta^(-(0, 2, 4, ...) / channels), (channels / 2,) float32."""
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)


def rotate(
    x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the points (x, y) by angles given as cosine and sine."""
    return torch.addcmul(x * cos, y, sin, value=-1), torch.addcmul(y * cos, x, sin)


def rotate_patches(features: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, theta: float) -> torch.Tensor:
    """
    Two-dimensional rotary encoding of patch features (P, D), computed in float32: the first D/2 channels rotate by the
    column, the last D/2 by the row of the patch (both (P,)). Pairs are interleaved, (0, 1), (2, 3), ..., as in the
    released checkpoints; the decoder's are half-split.
    """
    frequencies = inverse_frequencies(theta, features.shape[-1] // 2, features.device)  # (D/4,)
    angles = torch.cat([columns[:, None] * frequencies, rows[:, None] * frequencies], dim=-1)  # (P, D/2)
    even, odd = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(rotate(even, odd, angles.cos(), angles.sin()), dim=-1).flatten(-2).to(features.dtype)


def rotary_tables(
    position_ids: torch.Tensor, head_dim: int, rope_parameters: dict, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines of all axes side by side, computed once per forward.

    Args:
        position_ids: (3, B, L) T, H and W indices.
        head_dim: d, channels of T in a head's queries and keys; H and W have d/2 each.
        rope_parameters: those of `NeoTextConfig`.

    Returns:
        cos, sin: (B, L, 1, d), T in the first d/2 channels, H and W in d/4 each; computed in float32, cast to `dtype`.
    """
    widths = {"temporal": head_dim, "height": head_dim // 2, "width": head_dim // 2}
    angles_per_axis = [
        index[..., None].float()
        * inverse_frequencies(rope_parameters[axis]["rope_theta"], channels, position_ids.device)
        for index, (axis, channels) in zip(position_ids, widths.items(), strict=True)
    ]
    angles = torch.cat(angles_per_axis, dim=-1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rotate the half-split pairs (i, i + n/2) of `x` (B, L, heads, n) by the angles of cos, sin (B, L, 1, n/2). Returns
    both halves (B, L, heads, n/2).
    """
    first, second = x.chunk(2, dim=-1)
    return rotate(first, second, cos, sin)


__all__ = ["apply_rotary", "rotary_tables", "rotate_patches"]
