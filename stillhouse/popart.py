"""PopArt: a value head whose targets are normalised adaptively, and whose outputs the normalisation does not change.

van Hasselt et al. 2016, "Learning values across many orders of magnitude" (https://arxiv.org/abs/1602.07714), and Hessel et
al. 2018, "Multi-task deep reinforcement learning with PopArt" (https://arxiv.org/abs/1809.04474, eq. 5 to 10). The head gives
normalised values n(s) = w . h(s) + b, and V(s) = sigma n(s) + mu. With every target G

    mu <- (1 - beta) mu + beta G,   nu <- (1 - beta) nu + beta G^2,   sigma = sqrt(nu - mu^2), kept in [sigma_min, sigma_max]
    w <- w sigma / sigma',   b <- (sigma b + mu - mu') / sigma'            (primes: after the step)

so that V is what it was. Every environment has a head and statistics of its own.

Deviations from the papers:

1. A batch of N targets is one step with their mean and mean square, of weight 1 - (1 - beta)^N: N steps of the above, but for
   the order within the batch.
2. The variance nu - mu^2 is carried on instead of nu, by the same equations rearranged: the difference of two large numbers
   that nearly agree is never taken.
3. mu and nu are averages over the targets seen (each weight divided by their sum, as in Adam), so the first batch sets them and
   no starting value has to be forgotten first. Until then mu = 0 and sigma = 1.
4. The optimiser's moments of w and b stay as they are. They are averages of gradients with respect to normalised outputs,
   whose size does not depend on sigma; a change of sigma within their memory misjudges them by that change's factor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class PopArt:
    """The statistics of one value head.

    Args:
        head: gives normalised values [N, 1]; its parameters are rescaled in place.
        beta: rate of the statistics per target; at 0 they stay at mu = 0 and sigma = 1, and the head is an ordinary one.
        sigma_min: lower bound of sigma.
        sigma_max: its upper bound.
    """

    def __init__(
        self, head: nn.Linear, beta: float = 3e-4, sigma_min: float = 1e-4, sigma_max: float = 1e6
    ) -> None:
        self.head = head
        self.beta = beta
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.mu = 0.0
        self.variance = 1.0
        self._weight = 0.0  # of all targets so far: 1 - (1 - beta)^count

    @property
    def sigma(self) -> float:
        """Scale of the targets, within its bounds."""
        return min(max(math.sqrt(self.variance), self.sigma_min), self.sigma_max)

    def normalise(self, values: Tensor) -> Tensor:
        """What the head should give for values in the rewards' own scale; any shape."""
        return (values - self.mu) / self.sigma

    def unnormalise(self, outputs: Tensor) -> Tensor:
        """The head's outputs in the rewards' own scale; any shape."""
        return outputs * self.sigma + self.mu

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Move the statistics with a batch of targets, and rescale the head so that unnormalised outputs stay.

        A graph that was built on the head before is not valid after.

        Args:
            targets: in the rewards' own scale, [N]; N may be 0.
        """
        if not self.beta or not len(targets):
            return
        variance, mean = torch.var_mean(targets.double(), correction=0)
        if not math.isfinite(variance):
            return  # the loss will say so; the head is not spoiled
        share = 1 - (1 - self.beta) ** len(targets)
        self._weight += (1 - self._weight) * share
        step = share / self._weight
        mu, sigma, change = self.mu, self.sigma, float(mean) - self.mu
        self.mu += step * change
        self.variance += step * (float(variance) - self.variance + (1 - step) * change * change)
        self.head.weight.mul_(sigma / self.sigma)
        self.head.bias.copy_((self.head.bias.double() * sigma + (mu - self.mu)) / self.sigma)

    def get_state(self) -> dict[str, Any]:
        """The statistics; the head's parameters are the optimiser's to save."""
        return {"mu": self.mu, "variance": self.variance, "weight": self._weight}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_state``."""
        self.mu, self.variance, self._weight = state["mu"], state["variance"], state["weight"]
