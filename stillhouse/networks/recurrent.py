"""A memory after the torso: a GRU or an LSTM, unrolled over sequences in which episodes begin.

GRU: Cho et al. 2014 (https://arxiv.org/abs/1406.1078); LSTM: Hochreiter & Schmidhuber 1997
(https://doi.org/10.1162/neco.1997.9.8.1735), as in the actor-critic of Espeholt et al. 2018 (https://arxiv.org/abs/1802.01561).
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """Features [T, B, n] -> features [T, B, n] that know what came before in their episode.

    The state is one tensor [B, ``state_width``]: the GRU's hidden state, or the LSTM's hidden and cell state side by side. An
    episode begins with a state of zeros.

    Args:
        kind: of cell.
        width: n, of the features and of the hidden state.
    """

    def __init__(self, kind: Literal["gru", "lstm"], width: int) -> None:
        super().__init__()
        self.cell: nn.GRU | nn.LSTM = nn.GRU(width, width) if kind == "gru" else nn.LSTM(width, width)
        self.state_width = width if kind == "gru" else 2 * width

    def forward(self, features: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Unroll over a sequence.

        Args:
            features: [T, B, n].
            state: before the first row, [B, ``state_width``]; a copy's is not looked at where it starts an episode there.
            starts: bool [T, B], rows that begin an episode.

        Returns:
            The features [T, B, n], and states [T, B, ``state_width``]: after row t where t is the last row, or some copy begins an
            episode at row t + 1; elsewhere the one after the next such row.
        """
        # The cell's own loop over time is several times faster than one from here, so it runs from one reset to the next.
        times = [0, *(starts[1:].any(1).nonzero().flatten() + 1).tolist(), len(starts)]
        outputs, states = [], []
        for begin, end in itertools.pairwise(times):
            state = state.masked_fill(starts[begin].unsqueeze(1), 0.0)
            if isinstance(self.cell, nn.LSTM):
                hidden, cell = (part.contiguous() for part in state.unsqueeze(0).chunk(2, 2))
                output, parts = self.cell(features[begin:end], (hidden, cell))
                state = torch.cat(parts, 2).squeeze(0)
            else:
                output, hidden = self.cell(features[begin:end], state.unsqueeze(0))
                state = hidden.squeeze(0)
            outputs.append(output)
            states.append(state.expand(end - begin, *state.shape))
        return torch.cat(outputs), torch.cat(states)
