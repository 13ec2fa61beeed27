"""What a structure of recurrence answers."""

from torch import Tensor, nn


class Structure(nn.Module):
    """The recurrent matrices of a cell, one for each gate, all of the same structure.

    Shape:
        h: (..., H) -> (..., G H), the gates one after the other
    """

    weight: Tensor
    num_gates: int
    hidden_size: int

    def dense(self) -> Tensor:
        """The matrices as one of (G H, H), so that `forward(h)` equals `h @ dense().T`."""
        raise TypeError(f"{type(self).__name__} lacks dense")

    def blocks(self) -> Tensor:
        """The matrices as `kernels.recurrence` takes them: (G, K, P, P), or (G, H) diagonals."""
        raise TypeError(f"{type(self).__name__} lacks blocks")

    def part_of(self, matrix: Tensor) -> Tensor:
        """What of (G H, H) matrices lies on the structure: a view of them in the shape of `weight`."""
        raise TypeError(f"{type(self).__name__} lacks part_of")

    def multiply_adds(self) -> int:
        """Multiplications of one step of one row."""
        return self.weight.numel()
