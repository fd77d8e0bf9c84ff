"""Einsums of an input and a kernel with one contracted axis, read as products with matrices [out, in]."""

from __future__ import annotations

import dataclasses
import math

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What becomes of the axes of an input and a kernel; one letter an axis, `...` for any number of an input's.

    The kernel's axes are the contracted one, at most one that input and output have too (a stack of matrices, such as
    experts), and those that only the output has.

    Attributes:
        inputs, kernel, output: the axes of each, as in `inputs,kernel->output`.
    """

    inputs: str
    kernel: str
    output: str

    @classmethod
    def parse(cls, text: str) -> Contraction:
        """Reads the text of an einsum, such as `...i,io->...o`.

        Raises:
            NotImplementedError: it is no such contraction; says what is in the way.
        """
        operands, _, output = text.replace(" ", "").partition("->")
        inputs, _, kernel = operands.partition(",")
        found = cls(inputs, kernel, output)
        reason = found._why_not()
        if reason:
            raise NotImplementedError(f"einsum {text!r}: {reason}")
        return found

    def _why_not(self) -> str | None:
        letters = [self.inputs.replace("...", ""), self.kernel, self.output.replace("...", "")]
        if "..." in self.kernel:
            return "its kernel has an ellipsis; expected a letter for each axis"
        if any(len(set(axes)) < len(axes) for axes in letters):
            return "an axis occurs twice in one operand"
        contracted = [axis for axis in self.kernel if axis in self.inputs and axis not in self.output]
        if len(contracted) != 1:
            return f"it contracts {len(contracted)} axes of the kernel; expected one"
        if len(self.stack) > 1:
            return f"it has {len(self.stack)} axes that input, kernel and output share; expected at most one"
        if any(axis not in self.output for axis in self.kernel if axis not in self.inputs):
            return "it sums over an axis of the kernel alone"
        rest = [axis for axis in letters[0] if axis not in self.kernel and axis not in self.output]
        return f"it sums over axis {rest[0]!r} of the input alone" if rest else None

    @property
    def contracted(self) -> str:
        """The axis that is summed over."""
        return next(axis for axis in self.kernel if axis in self.inputs and axis not in self.output)

    @property
    def stack(self) -> str:
        """The axis along which matrices are stacked, or nothing."""
        return "".join(axis for axis in self.kernel if axis in self.inputs and axis in self.output)

    @property
    def outputs(self) -> str:
        """The kernel's axes that only the output has."""
        return "".join(axis for axis in self.kernel if axis not in self.inputs)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of `outputs` in a kernel of a shape."""
        return tuple(shape[self.kernel.index(axis)] for axis in self.outputs)

    def matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "*stack out in"]:
        """The kernel as a matrix [out, in], or a stack of them."""
        order = self.stack + self.outputs + self.contracted
        kernel = kernel.transpose([self.kernel.index(axis) for axis in order])
        stack = kernel.shape[: len(self.stack)]
        return kernel.reshape(*stack, math.prod(kernel.shape[len(self.stack) : -1]), kernel.shape[-1])

    def rows(self, x: Float[Array, "..."]) -> Float[Array, "*axes in"]:
        """The input with the stack's axis first and the contracted one last."""
        axes = _expanded(self.inputs, x.ndim)
        order = self.stack + self._free(axes) + self.contracted
        return x.transpose([axes.index(axis) for axis in order])

    def arranged(self, y: Float[Array, "*axes out"], ndim: int, sizes: tuple[int, ...]) -> Float[Array, "..."]:
        """The product of `rows` with the matrix, in the order of the output.

        Args:
            y: the product.
            ndim: axes of the input.
            sizes: what `sizes` says.
        """
        inputs = _expanded(self.inputs, ndim)
        axes = self.stack + self._free(inputs) + self.outputs
        y = y.reshape(*y.shape[:-1], *sizes)
        return y.transpose([axes.index(axis) for axis in self._expanded_output(ndim)])

    def bias(self, bias: Float[Array, "..."], ndim: int, sizes: dict[str, int]) -> Float[Array, "..."]:
        """A bias over the kernel's axes, in the order of the output, ready to be added.

        Args:
            bias: one value for each entry of the kernel's axes that the output has, in its order.
            ndim: axes of the input.
            sizes: the kernel's sizes by axis.
        """
        return bias.reshape([sizes.get(axis, 1) for axis in self._expanded_output(ndim)])

    def _free(self, axes: str) -> str:
        return "".join(axis for axis in axes if axis not in self.kernel)

    def _expanded_output(self, ndim: int) -> str:
        return _expanded(self.output, ndim - len(self.inputs.replace("...", "")) + len(self.output.replace("...", "")))


def _expanded(axes: str, ndim: int) -> str:
    """Axes with a capital Greek letter for each one that an ellipsis stands for."""
    count = ndim - len(axes.replace("...", ""))
    if count < 0 or (count and "..." not in axes):
        raise ValueError(f"an array of {ndim} axes does not fit {axes!r}")
    return axes.replace("...", "".join(chr(0x391 + i) for i in range(count)))
