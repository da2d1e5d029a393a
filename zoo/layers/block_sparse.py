"""BlockSparseLinear: a linear layer that stores the blocks of its weight that were kept, and can be trained on them."""

import torch

from ..errors import UserError
from ..kernels.block_sparse_linear import BLOCK_SIZES, block_sparse_linear
from ..kernels.block_sparse_linear.reference import unpack_blocks
from .base import REBUILD, PackedLinear


class BlockSparseLinear(PackedLinear):
    """y = x W^T + bias, W (out_features, in_features) zero but for blocks of b_r x b_c.

    Tensors, as in torch's BSR: `blocks` (nnz, b_r, b_c) in the model's dtype, block-row after block-row; `crow_indices`
    int32 (ceil(out_features / b_r) + 1,), where each block-row begins; `col_indices` int32 (nnz,), ascending in a
    block-row; `bias` (out_features,) or None. The last blocks may reach beyond the matrix; what does counts as zero.
    Fine-tuning with the mask fixed is `layer.blocks.requires_grad_()`: nothing else of W exists.

    Args:
        block: (b_r, b_c), multiples of 4 from 4 to 128.
        blocks: how many are kept.
    Raises: UserError for sizes that do not fit.
    """

    format = "block_sparse"
    keys = {"block": [int], "blocks": int}
    values_name = "blocks"

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Of the kept blocks' numbers, and 4 bytes for each one's column and for where each block-row begins and ends."""
        b_r, b_c = row["block"]
        return row["blocks"] * (b_r * b_c * itemsize + 4) + 4 * (-(-row["d_out"] // b_r) + 1)

    def __init__(self, in_features, out_features, bias=True, *, block, blocks, dtype=None, device=None):
        super().__init__(in_features, out_features)
        if len(block) != 2 or any(size not in BLOCK_SIZES for size in block):
            raise UserError(f"block {list(block)}: two multiples of 4 from 4 to 128 are needed.")
        self.block = b_r, b_c = tuple(block)
        self.grid = (-(-out_features // b_r), -(-in_features // b_c))
        if not 0 <= blocks <= self.grid[0] * self.grid[1]:
            raise UserError(f"blocks {blocks}: from 0 to {self.grid[0] * self.grid[1]} can be kept.")
        self.add_tensor("blocks", (blocks, b_r, b_c), dtype, device)
        self.add_tensor("crow_indices", (self.grid[0] + 1,), torch.int32, device)
        self.add_tensor("col_indices", (blocks,), torch.int32, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (out_features,), dtype, device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.blocks.zero_()
        if self.bias is not None:
            self.bias.zero_()
        rows, columns = self.grid  # the first places, block-row after block-row
        starts = torch.arange(rows + 1, device=self.crow_indices.device) * columns
        self.crow_indices.copy_(starts.clamp(max=len(self.blocks)))
        self.col_indices.copy_(torch.arange(len(self.blocks), device=self.col_indices.device) % max(1, columns))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return block_sparse_linear(
            x, self.blocks, self.crow_indices, self.col_indices, self.bias, d_out=self.out_features
        )

    def dense_weight(self) -> torch.Tensor:
        """W, (out_features, in_features), in the dtype of `blocks`."""
        return unpack_blocks(
            self.blocks.detach(), self.crow_indices, self.col_indices, self.out_features, self.in_features
        )

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if the indices do not describe a grid of blocks or a number is not finite."""
        self.check_finite(name)
        crow, col, nnz = self.crow_indices.long(), self.col_indices.long(), len(self.blocks)
        if crow[0] != 0 or crow[-1] != nnz or (crow.diff() < 0).any():
            raise UserError(f"{name}.crow_indices do not rise from 0 to {nnz}; {REBUILD}.")
        if not nnz:
            return
        if col.min() < 0 or col.max() >= self.grid[1]:
            wrong = int(col.min() if col.min() < 0 else col.max())
            raise UserError(f"{name}.col_indices hold {wrong}, there are {self.grid[1]} block-columns; {REBUILD}.")
        begins = torch.zeros(nnz + 1, dtype=torch.bool, device=crow.device)
        begins[crow] = True
        if ((col.diff() <= 0) & ~begins[1:-1]).any():
            raise UserError(f"{name}.col_indices do not ascend in every block-row; {REBUILD}.")

    def extra_repr(self) -> str:
        places = self.grid[0] * self.grid[1]
        return f"{super().extra_repr()}, block={self.block[0]}x{self.block[1]}, blocks={len(self.blocks)} of {places}"
