"""Layers with a random mask that is not stored but drawn again, from a seed: no byte of a checkpoint goes to positions."""

import torch

from ..errors import UserError
from ..kernels.bitmask_linear import bitmask_linear
from ..kernels.bitmask_linear.reference import pack_bitmask, unpack_bitmask
from ..kernels.sparse_conv2d import sparse_conv2d
from ..random_mask import GENERATOR, SEEDS, digest, random_mask
from .base import REBUILD, PackedConv2d, PackedLinear

# Drawing a mask takes 24 bytes a weight, stored or not: a matrix may have SMALL many, or, up to LARGE, SPARSEST for
# each that is kept.
SMALL, LARGE, SPARSEST = 2**24, 2**28, 1000


def seeded_bitmask(rows: int, columns: int, seed: int, layer: int, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask uint8 (rows, ceil(columns/8)), row_offsets int64 (rows+1,)) of the random mask that the numbers name."""
    keep = random_mask(seed, layer, rows * columns, nnz).view(rows, columns)
    _, mask, row_offsets = pack_bitmask(keep, keep)
    return mask, row_offsets


class SeededMask:
    """Mixed in before a packed class: the weight as a matrix (d_out, d_in) is kept where its random mask says so.

    Tensors: `values` (nnz,), kept weights in column order, row after row; `bias` or None. `mask` and `row_offsets`, as
    BitmaskLinear stores them, are drawn at first use.

    Args: seed and layer, the two numbers that name the mask; generator, what draws it; sha256, of `mask` as it was when
    the checkpoint was made, so that another one, under which the values would be another matrix, is refused.
    """

    format = "seeded_bitmask"
    keys = {"nnz": int, "seed": int, "layer": int, "generator": str, "sha256": str}
    values_name = "values"

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Of the kept weights alone: the seed stands for their positions."""
        return row["nnz"] * itemsize

    def __init__(self, *shape, bias=True, nnz, seed, layer, generator, sha256, dtype=None, device=None, **geometry):
        super().__init__(*shape, **geometry)
        if generator != GENERATOR:
            raise UserError(f"generator {generator!r} is unknown, {GENERATOR} is needed: update slimzoo.")
        d_out, d_in = self.matrix_shape
        if not (0 <= nnz <= d_out * d_in and 0 <= seed < SEEDS and 0 <= layer < SEEDS):
            raise UserError(
                f"seed {seed}, layer {layer}, nnz {nnz}: whole numbers, nnz up to {d_out * d_in}, are needed."
            )
        if d_out * d_in > max(SMALL, min(LARGE, SPARSEST * nnz)):
            raise UserError(
                f"{d_out} x {d_in} weights of which {nnz} are kept: drawing that mask would take the memory."
            )
        self.seed, self.layer, self.sha256, self._drawn = seed, layer, sha256, None
        self.add_tensor("values", (nnz,), dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (d_out,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in self.parameters():
            tensor.zero_()

    def drawn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mask, row_offsets) on the device of the values; UserError if the mask is not the one of the checkpoint."""
        if self._drawn is None:
            drawn = seeded_bitmask(*self.matrix_shape, self.seed, self.layer, self.values.numel())
            if digest(drawn[0]) != self.sha256:
                raise UserError(
                    f"the mask of seed {self.seed}, layer {self.layer}, is not the one that the sha256 names; {REBUILD}."
                )
            self._drawn = drawn
        if self._drawn[0].device != self.device:
            self._drawn = tuple(tensor.to(self.device) for tensor in self._drawn)
        return self._drawn

    def dense_weight(self) -> torch.Tensor:
        """W, of `weight_shape`, in the dtype of `values`."""
        weight = unpack_bitmask(self.values.detach(), self.drawn()[0], self.matrix_shape[1])
        return weight.view(self.weight_shape)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the layer, if its mask is another one now or a number is not finite."""
        self.check_finite(name)
        try:
            self.drawn()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nnz={self.values.numel()}, seed={self.seed}, layer={self.layer}"


class SeededBitmaskLinear(SeededMask, PackedLinear):
    """y = x W^T + bias; a BitmaskLinear whose mask is drawn from a seed."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        mask, row_offsets = self.drawn()
        return bitmask_linear(x, self.values, mask, self.bias, row_offsets)


class SeededBitmaskConv2d(SeededMask, PackedConv2d):
    """y = conv2d(x, W) + bias; a BitmaskConv2d whose mask is drawn from a seed."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        mask, row_offsets = self.drawn()
        return sparse_conv2d(x, self.values, mask, row_offsets, self.bias, **self.geometry)
