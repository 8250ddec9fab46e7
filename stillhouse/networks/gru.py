"""A GRU whose gradient is written out: over whole sequences on a processor, two to three times as fast as :class:`torch.nn.GRU`.

Cho et al. 2014 (https://arxiv.org/abs/1406.1078), in the form and with the weights of :class:`torch.nn.GRU`:

    r = sigma(W_ir x + b_ir + W_hr h + b_hr),   z = sigma(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)),   h' = (1 - z) n + z h

What is saved there: the weights' gradients are one product over all rows at the end instead of one for each row of the sequence, nothing is recorded
for automatic differentiation, and tanh(x) is computed as 2 sigma(2x) - 1, which PyTorch's kernels do six times as fast on a processor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GRU(nn.Module):
    """Inputs [T, B, n] -> hidden states [T, B, width]; every sequence begins with a state of zeros.

    Args:
        inputs: n.
        width: of the hidden state.
        generator: for the initial weights, uniform in +-1 / sqrt(width) as in :class:`torch.nn.GRU`.
        memory: where it is 2 or more, the update gates' biases begin at log u with u uniform in 1 to ``memory`` - 1, so that a unit keeps what it holds for
            about 1 + u steps (chrono initialisation: Tallec & Ollivier 2018, https://arxiv.org/abs/1804.11188, section 3).
    """

    def __init__(self, inputs: int, width: int, generator: torch.Generator, memory: int = 0) -> None:
        super().__init__()
        self.width = width
        self._pool = _Pool()

        def drawn(*shape: int) -> nn.Parameter:
            uniform = torch.rand(shape, generator=generator).mul_(2).sub_(1)
            return nn.Parameter(uniform.div_(math.sqrt(width)))

        self.weight_ih = drawn(3 * width, inputs)
        self.weight_hh = drawn(3 * width, width)
        self.bias_ih = drawn(3 * width)
        self.bias_hh = drawn(3 * width)
        if memory > 1:
            with torch.no_grad():
                self.bias_ih[width : 2 * width].uniform_(1, memory - 1, generator=generator).log_()
                self.bias_hh[width : 2 * width] = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Hidden states [T, B, width] after each row of ``inputs`` [T, B, n]."""
        hidden: Tensor = _Unrolled.apply(
            inputs, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self._pool
        )
        return hidden

    @torch.no_grad()
    def step(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """The hidden state [B, width] after one row of ``inputs`` [B, n]."""
        given = torch.addmm(_common_bias(self.bias_ih, self.bias_hh), inputs, self.weight_ih.t())
        recurrent = torch.mm(hidden, self.weight_hh.t())
        return _cell(given, recurrent, self.bias_hh[2 * self.width :], hidden)


def _common_bias(bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """The gates' two biases always come together; n's second one is multiplied by r, so it is left out here."""
    kept = bias_ih.clone()
    gates = 2 * len(bias_ih) // 3
    kept[:gates] += bias_hh[:gates]
    return kept


def _cell(given: Tensor, recurrent: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """The next hidden state [B, width]; r, z and n are left in ``given`` [B, 3 width], what r multiplies in ``recurrent``."""
    width = hidden.shape[1]
    gates, candidate, inner = given[:, : 2 * width], given[:, 2 * width :], recurrent[:, 2 * width :]
    gates.add_(recurrent[:, : 2 * width]).sigmoid_()
    inner.add_(bias)
    candidate.addcmul_(gates[:, :width], inner)
    candidate.mul_(2).sigmoid_().mul_(2).sub_(1)
    return torch.lerp(candidate, hidden, gates[:, width:])


class _Pool:
    """Large tensors that are used again: fresh memory of this size is mapped page by page, which takes as long as the arithmetic."""

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Of this shape, not initialised; another one for every call until it is given back."""
        free = self._free.get((like.device, like.dtype, *shape))
        return free.pop() if free else like.new_empty(shape)

    def give_back(self, *tensors: Tensor) -> None:
        """Nobody looks at these any more."""
        for tensor in tensors:
            free = self._free.setdefault((tensor.device, tensor.dtype, *tensor.shape), [])
            if len(free) < 2:
                free.append(tensor)


class _Unrolled(torch.autograd.Function):
    """The GRU over a sequence, and its gradient."""

    @staticmethod
    def forward(
        context: Any,
        inputs: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        buffers: _Pool,
    ) -> Tensor:
        steps, batch, _ = inputs.shape
        width = weight_hh.shape[1]
        given = buffers.take(inputs, steps * batch, 3 * width)
        torch.addmm(_common_bias(bias_ih, bias_hh), inputs.flatten(0, 1), weight_ih.t(), out=given)
        given = given.view(steps, batch, 3 * width)
        recurrent = buffers.take(inputs, steps, batch, 3 * width)
        hidden = inputs.new_empty(steps + 1, batch, width)
        hidden[0] = 0
        transposed, bias = weight_hh.t(), bias_hh[2 * width :]
        for t in range(steps):
            torch.mm(hidden[t], transposed, out=recurrent[t])
            hidden[t + 1] = _cell(given[t], recurrent[t], bias, hidden[t])
        context.save_for_backward(inputs, weight_ih, weight_hh, given, recurrent, hidden)
        context.buffers = buffers
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight_ih, weight_hh, given, recurrent, hidden = context.saved_tensors
        buffers: _Pool = context.buffers
        steps, batch, width = gradient.shape
        gates_weight, inner_weight = weight_hh[: 2 * width], weight_hh[2 * width :]
        later = gradient.new_zeros(batch, width)  # gradient of the hidden state, from what follows
        for t in range(steps - 1, -1, -1):
            # What was kept is overwritten by its gradient: ``given`` by that of W_i x + b_i, the last third of ``recurrent`` by that of W_hn h + b_hn.
            gates = given[t, :, : 2 * width]
            reset, update, candidate = given[t].split(width, 1)
            inner = recurrent[t, :, 2 * width :]
            outward = later.add_(gradient[t])
            inward = outward * update
            through = outward - inward  # to n
            to_update = (hidden[t] - candidate).mul_(outward)
            through.addcmul_(through * candidate, candidate, value=-1)
            candidate.copy_(through)
            to_reset = through * inner
            torch.mul(through, reset, out=inner)
            slope = torch.addcmul(gates, gates, gates, value=-1)  # d sigma = sigma (1 - sigma)
            torch.mul(to_reset, slope[:, :width], out=reset)
            torch.mul(to_update, slope[:, width:], out=update)
            later = inward.addmm_(gates, gates_weight).addmm_(inner, inner_weight)
        rows, before = given.flatten(0, 1), hidden[:-1].flatten(0, 1)
        inner = recurrent.flatten(0, 1)[:, 2 * width :]
        row_sums = rows.sum(0)
        result = (
            (rows @ weight_ih).view_as(inputs) if context.needs_input_grad[0] else None,
            rows.t() @ inputs.flatten(0, 1),
            torch.cat([rows[:, : 2 * width].t() @ before, inner.t() @ before]),
            row_sums,
            torch.cat([row_sums[: 2 * width], inner.sum(0)]),
            None,
        )
        buffers.give_back(rows, recurrent)
        return result
