"""All of a network's parameters as one flat tensor, and one Adam step on it.

The modules' parameters become views into the flat tensor, their gradients views into a second one. Zeroing, clipping,
the optimiser's step, freezing, copying to a target network and saving are then one operation each, which on small
networks is most of the fixed cost of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class FlatParameters:
    """A network's parameters in one tensor, with an optimiser.

    Args:
        network: its parameters are moved; keep using it as before. Those that want no gradient are left where they are.
        learning_rate: of the optimiser; :meth:`step` may be given another.
        epsilon: the optimiser's.
        beside: modules that are trained along and are no part of the network, for example a critic. Their parameters
            follow the network's, under ``<key>.<name>``; the network's keep their own names.

    Attributes:
        slices: name to its place in the flat tensor.
        penalties: called at every step before the gradient is clipped, each adds its part to ``gradient``.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        epsilon: float = 1e-8,
        beside: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        named = list(network.named_parameters())
        for key, module in beside.items():
            named += module.named_parameters(prefix=key)
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        device = named[0][1].device
        count = sum(parameter.numel() for _, parameter in named)
        self.values = nn.Parameter(torch.empty(count, device=device), requires_grad=False)
        self.gradient = torch.zeros(count, device=device)
        self.slices: dict[str, slice] = {}
        self.penalties: list[Callable[[], None]] = []
        self._mask: Tensor | None = None
        self._pace: Tensor | None = None
        start = 0
        for name, parameter in named:
            stop = start + parameter.numel()
            self.slices[name] = slice(start, stop)
            self.values.data[start:stop] = parameter.data.reshape(-1)
            parameter.data = self.values.data[start:stop].view_as(parameter)
            # Backward adds into an existing gradient in place, so the views stay.
            parameter.grad = self.gradient[start:stop].view_as(parameter)
            start = stop
        self.values.grad = self.gradient
        self.optimizer = torch.optim.Adam([self.values], lr=learning_rate, eps=epsilon, fused=True)

    def zero_gradient(self) -> None:
        """Before every backward pass."""
        self.gradient.zero_()

    def step(self, learning_rate: float, max_gradient_norm: float = 0.0) -> None:
        """One optimiser step, after clipping the gradient to ``max_gradient_norm`` (0: not at all)."""
        for penalty in self.penalties:
            penalty()
        if self._mask is not None:
            self.gradient.mul_(self._mask)
        if max_gradient_norm:
            norm = torch.linalg.vector_norm(self.gradient)
            self.gradient.mul_((max_gradient_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.param_groups[0]["lr"] = learning_rate
        if self._pace is None:
            self.optimizer.step()
            return
        before = self.values.data.clone()
        self.optimizer.step()
        # Adam's step does not change with the gradient's scale, so it is the step that is scaled.
        torch.lerp(before, self.values.data, self._pace, out=self.values.data)

    def freeze(self, names: Iterable[str]) -> None:
        """Keep just these parameters as they are, from now on; what was frozen and is no more begins with a fresh optimiser.

        Their gradients are zeroed, so Adam's step on them is exactly 0 from a fresh optimiser.

        Raises:
            KeyError: no such parameter.
        """
        mask = torch.ones_like(self.gradient)
        for name in names:
            mask[self.slices[name]] = 0
        before = self._mask
        self._mask = None if mask.all() else mask
        if before is not None and (mask > before).any():
            self.forget_moments()

    def set_pace(self, factors: Mapping[str, float]) -> None:
        """Scale each step of these parameters: a learning rate of their own, as a factor of the common one.

        Raises:
            KeyError: no such parameter.
        """
        self._pace = torch.ones_like(self.gradient)
        for name, factor in factors.items():
            self._pace[self.slices[name]] = factor

    def forget_moments(self) -> None:
        """Start the optimiser afresh.

        Parameters whose gradient was 0 so far need it: Adam's step count corrects its averages for the steps that these did
        not see, and their first steps would be up to 6.6 times too long.
        """
        self.optimizer.state.clear()

    def get_state(self) -> dict[str, Any]:
        """Values, optimiser moments and step count; not the frozen names, which are the caller's schedule."""
        moments = self.optimizer.state.get(self.values, {})
        return {
            "values": self.values.detach().cpu().numpy().copy(),
            "step": int(moments["step"]) if moments else 0,
            "exp_avg": moments["exp_avg"].cpu().numpy().copy() if moments else None,
            "exp_avg_sq": moments["exp_avg_sq"].cpu().numpy().copy() if moments else None,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.values.data.copy_(torch.from_numpy(np.array(state["values"])))
        self.optimizer.state.clear()
        if state["exp_avg"] is not None:
            device = self.values.device
            self.optimizer.state[self.values] = {
                "step": torch.tensor(float(state["step"]), device=device),
                "exp_avg": torch.from_numpy(np.array(state["exp_avg"])).to(device),
                "exp_avg_sq": torch.from_numpy(np.array(state["exp_avg_sq"])).to(device),
            }
