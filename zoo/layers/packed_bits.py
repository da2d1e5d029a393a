"""PackedBitsLinear: a linear layer that stores its weights as codes of 1 to 8 bits with a scale and a zero per group."""

import torch

from ..errors import UserError
from ..kernels.packed_linear import packed_linear
from ..kernels.packed_linear.reference import check_format, dequantize
from .base import REBUILD, PackedLinear

ZEROS = ("integer", "float", "none")


class PackedBitsLinear(PackedLinear):
    """y = x W^T + bias, W[i, j] = scales[i, j // g] (code[i, j] - zero[i, j // g]) with codes of `bits` bits.

    Tensors: `qweight` uint8 (out_features, in_features bits / 8) in the layout of kernels/packed_linear/reference.py;
    `scales` (out_features, in_features / g) in the model's dtype; `zeros` of the same shape, uint8 ("integer") or the
    model's dtype ("float"), absent for "none", which means 2^(bits - 1); `bias` (out_features,) or None.

    Args: bits 1, 2, 3, 4, 5, 6 or 8; group_size a multiple of 32 that divides in_features, or -1 for whole rows.
    Raises: UserError for a format that does not fit.
    """

    format = "packed"
    keys = {"bits": int, "group_size": int, "zeros": str}
    values_name = "scales"
    siblings = None  # see siblings.py

    @staticmethod
    def bytes_of(row: dict, itemsize: int) -> int:
        """Of the codes, a scale for each group, and a zero for each: 1 byte ("integer") or as the scale ("float")."""
        d_out, d_in, group_size = row["d_out"], row["d_in"], row["group_size"]
        groups = d_out * (1 if group_size == -1 else d_in // group_size)
        zero = {"none": 0, "integer": 1, "float": itemsize}[row["zeros"]]
        return d_out * d_in * row["bits"] // 8 + groups * (itemsize + zero)

    @staticmethod
    def dense_shape(spec: dict, parts: dict[str, torch.Tensor]) -> tuple[int, int]:
        rows, row_bytes = parts["qweight"].shape
        return rows, row_bytes * 8 // spec["bits"]

    def __init__(
        self, in_features, out_features, bias=True, bits=4, group_size=64, zeros="integer", dtype=None, device=None
    ):
        super().__init__(in_features, out_features)
        if zeros not in ZEROS:
            raise UserError(f"zeros {zeros!r}: one of {', '.join(ZEROS)} is needed.")
        try:
            check_format(in_features, bits, group_size)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        self.bits, self.group_size, self.zeros_kind = bits, group_size, zeros
        groups = 1 if group_size == -1 else in_features // group_size
        self.add_tensor("qweight", (out_features, in_features * bits // 8), torch.uint8, device)
        self.add_tensor("scales", (out_features, groups), dtype, device)
        self.register_parameter("zeros", None)
        if zeros != "none":
            self.add_tensor("zeros", (out_features, groups), torch.uint8 if zeros == "integer" else dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.add_tensor("bias", (out_features,), dtype, device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in self.parameters():
            tensor.zero_()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if self.siblings is not None and not torch.compiler.is_compiling():
            y = self.siblings.product(self, x)
            if y is not None:
                return y
        return packed_linear(
            x, self.qweight, self.scales, self.zeros, self.bias, bits=self.bits, group_size=self.group_size
        )

    def dense_weight(self) -> torch.Tensor:
        """W, (out_features, in_features), in the dtype of `scales`."""
        zeros = None if self.zeros is None else self.zeros.detach()
        return dequantize(self.qweight, self.scales.detach(), zeros, self.bits, self.group_size, self.in_features)

    def validate(self, name: str) -> None:
        """Raise UserError, naming the tensor, if a number is not finite or a zero is no code."""
        self.check_finite(name)
        if self.zeros_kind == "integer" and self.zeros.numel() and int(self.zeros.max()) >= 2**self.bits:
            raise UserError(
                f"{name}.zeros holds {int(self.zeros.max())}, which is no code of {self.bits} bits; {REBUILD}."
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, zeros={self.zeros_kind}"
