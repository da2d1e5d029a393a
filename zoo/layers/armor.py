"""ArmorLinear: a linear layer stored as A' S B', a 2:4 core between two block-diagonal wrappers (arXiv 2510.05528)."""

import torch

from ..errors import UserError
from ..kernels.armor_linear import armor_linear
from ..kernels.bitmask_linear.reference import unpack_bitmask
from .base import PackedLinear, check_mask, check_pattern, valid_mask


class ArmorLinear(PackedLinear):
    """y = A'(S(B'x)) + bias; A' (d_out, d_out) and B' (d_in, d_in) block-diagonal, S (d_out, d_in) sparse N:M.

    With d_out = out_features and d_in = in_features: u_ni = sum_j B'_n[i,j] x_nj, v = S u, y_mi = sum_j A'_m[i,j] v_mj.
    Tensors: `core_values` (d_out, d_in*N/M), kept weights of S in column order;
    `core_mask` uint8 (d_out, ceil(d_in/8)), bit j of byte k = column 8k+j;
    `wrap_out` (d_out/block_out, block_out, block_out) = A'; `wrap_in` (d_in/block_in, block_in, block_in) = B';
    `bias` (d_out,) or None.

    Raises: UserError if a block size does not divide its dimension or the pattern does not fit d_in.
    """

    format = "armor"
    keys = {"block_in": int, "block_out": int, "pattern?": [int]}
    values_name = "core_values"

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Of N/M of the core's numbers and one bit for each, and of block_out d_out + block_in d_in in the wrappers."""
        d_out, d_in, (n, m) = row["d_out"], row["d_in"], row.get("pattern", (2, 4))
        numbers = d_out * d_in * n // m + d_out * row["block_out"] + d_in * row["block_in"]
        return numbers * itemsize + d_out * -(-d_in // 8)

    @staticmethod
    def dense_shape(spec: dict, parts: dict[str, torch.Tensor]) -> tuple[int, int]:
        return parts["wrap_out"].shape[:2].numel(), parts["wrap_in"].shape[:2].numel()

    def __init__(self, in_features, out_features, bias, block_in, block_out, pattern=(2, 4), dtype=None, device=None):
        super().__init__(in_features, out_features)
        for name, block, size in (("block_in", block_in, in_features), ("block_out", block_out, out_features)):
            if block < 1 or size % block:
                raise UserError(f"{name} {block} does not divide {size}: a divisor is needed.")
        self.block_in, self.block_out = block_in, block_out
        self.pattern = check_pattern(in_features, pattern)
        n, m = self.pattern
        self.add_tensor("core_values", (out_features, in_features * n // m), dtype, device)
        self.add_tensor("core_mask", (out_features, -(-in_features // 8)), torch.uint8, device)
        self.add_tensor("wrap_out", (out_features // block_out, block_out, block_out), dtype, device)
        self.add_tensor("wrap_in", (in_features // block_in, block_in, block_in), dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (out_features,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.core_values.zero_()
        self.core_mask.copy_(valid_mask(self.out_features, self.in_features, self.pattern, self.core_mask.device))
        for wrapper in (self.wrap_out, self.wrap_in):
            wrapper.copy_(torch.eye(wrapper.shape[-1], dtype=wrapper.dtype, device=wrapper.device).expand_as(wrapper))
        if self.bias is not None:
            self.bias.zero_()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return armor_linear(x, self.wrap_in, self.core_values, self.core_mask, self.wrap_out, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """A' S B', (d_out, d_in): computed in fp32, returned in the dtype of `core_values`."""
        core = unpack_bitmask(self.core_values.detach(), self.core_mask, self.in_features).float()
        rows = core.view(-1, self.block_out, self.in_features)
        core = torch.bmm(self.wrap_out.detach().float(), rows).view(self.out_features, -1, self.block_in)
        weight = torch.einsum("onj,njk->onk", core, self.wrap_in.detach().float())
        return weight.reshape(self.out_features, self.in_features).to(self.core_values.dtype)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if the mask breaks the pattern or a tensor is not finite."""
        self.check_finite(name)
        check_mask(f"{name}.core_mask", self.core_mask, self.in_features, self.pattern)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, {self.pattern[0]}:{self.pattern[1]}, "
            f"block_in={self.block_in}, block_out={self.block_out}"
        )
