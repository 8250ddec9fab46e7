"""Progressive networks (Rusu et al. 2016, arXiv:1606.04671): a new column beside frozen ones, which it may read.

Layer i of the new column k reads its own layer below and, through a small adapter, the same layer of every frozen column j < k:

    h_i^(k) = f( W_i^(k) h_{i-1}^(k) + U_i^(k) f( V_i^(k) [alpha_{i-1}^(j) h_{i-1}^(j) for j < k] ) )            (eq. 2)

``alpha`` is a learnt scalar for each column and layer, ``V`` brings the columns' activations to the width of the layer's own
input: a dense layer, or a 1x1 convolution of maps. What the frozen columns learnt can be used and cannot be lost.

Deviations from the paper:

1. The frozen columns were trained one by one (teachers, students), without reading each other, so that one teacher serves as a
   column for any number of targets. In the paper column 2 of 3 is itself progressive.
2. A frozen column sees the target's observations through the same mapping of components that weights are taken by
   (:mod:`stillhouse.transfer.initialisation`); the paper's environments all show the same image.
3. Images with three convolutions: the frozen columns are read after the last convolution and above, not between them.
4. The norms and biases of :class:`~stillhouse.networks.multi_task.MultiTaskNetwork` stay: ``f`` is ReLU after LayerNorm where
   the network has it, and ``V`` has a bias.
5. The output layer's lateral input is the adapter's output too; the features that a critic reads are both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stillhouse import seeding
from stillhouse.agents import make_fresh_head
from stillhouse.config import Config
from stillhouse.errors import StillhouseError
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSpec
from stillhouse.transfer.initialisation import show
from stillhouse.types import EnvironmentSpec, OutputKind

Laterals = Literal["adapters", "features"]
Edit = Callable[[int, int, Tensor], Tensor]
"""Column (0 is the first frozen one, the last the new one), layer, activations [B, n] -> what is read in their place [B, n]."""


class ColumnSpec(Config):
    """A frozen column: a network, which of its environments' way is taken, and what it is shown."""

    network: NetworkSpec
    environment: str
    components: tuple[int, ...] | None = Field(
        default=None,
        description="for each component of its observations the target's, -1: zeros; None: the target's own",
    )


class ProgressiveSpec(NetworkSpec):
    """The new column's structure, and the frozen ones beside it."""

    columns: tuple[ColumnSpec, ...] = Field(min_length=1)
    laterals: Laterals = Field(
        default="adapters",
        description="adapters: every layer reads through an adapter; features: the head alone reads, and directly",
    )
    adapter_scale: float = Field(default=0.1, description="what every alpha starts from")


class Lateral(nn.Module):
    """What one layer reads of the frozen columns: [B, n_j * P] of each, n_j maps of P positions -> [B, outputs * P].

    Args:
        widths: maps, or units, of each column.
        outputs: maps, or units, that are read.
        positions: P; 1 for dense layers.
        scale: what the alphas start from.
    """

    def __init__(self, widths: list[int], outputs: int, positions: int, scale: float) -> None:
        super().__init__()
        self.positions = positions
        self.scales = nn.Parameter(torch.full((len(widths),), scale))
        self.adapter = nn.Linear(sum(widths), outputs)

    def forward(self, activations: list[Tensor]) -> Tensor:
        scaled = [
            part.unflatten(1, (-1, self.positions)) * scale
            for part, scale in zip(activations, self.scales, strict=True)
        ]
        read = torch.cat(scaled, 1)
        if self.positions == 1:
            return functional.relu(self.adapter(read.squeeze(2)))
        # A 1x1 convolution, written as the product that it is.
        maps = self.adapter.weight @ read + self.adapter.bias.unsqueeze(1)
        return functional.relu(maps).flatten(1)


class ProgressiveNetwork(MultiTaskNetwork):
    """A network for one environment whose layers read frozen columns too.

    Its features are its own and, after them, what the head reads of the columns.

    Raises:
        StillhouseError: a column has another number of layers than the new one, or maps of other sides.
    """

    spec: ProgressiveSpec

    def __init__(self, spec: ProgressiveSpec) -> None:
        super().__init__(spec)  # drawn first: its own column begins as the same network without columns does
        (name, own), *_ = spec.environments.items()
        self.columns = nn.ModuleList(MultiTaskNetwork(column.network) for column in spec.columns)
        self.columns.requires_grad_(False)
        self._observation = own.observation
        forms = self.layer_forms(name)
        frozen = [self._columns[i].layer_forms(column.environment) for i, column in enumerate(spec.columns)]
        for column, found in zip(spec.columns, frozen, strict=True):
            if [positions for _, positions in found] != [positions for _, positions in forms]:
                raise StillhouseError(
                    f"a progressive network's column for {column.environment!r} has layers of {found} (maps, positions), the new one "
                    f"of {forms}: the same number of layers and positions is allowed; choose sources of one size"
                )
        _, *bodies = self._way_in(name).values()
        readers = [*(body.dense for body in bodies), *self.torso.dense, self.heads[name]]
        self.laterals = nn.ModuleList()
        self._read = 0
        for layer, ((maps, positions), reader) in enumerate(zip(forms, readers, strict=True)):
            widths = [found[layer][0] for found in frozen]
            if spec.laterals == "adapters":
                self.laterals.append(Lateral(widths, maps, positions, spec.adapter_scale))
                self._read = maps * positions
            else:
                self._read = sum(widths) if reader is readers[-1] else 0
            if self._read:
                _widen(reader, self._read)

    @property
    def feature_count(self) -> int:
        """Width of what :meth:`features` gives."""
        return self.torso.outputs + self._read

    @property
    def _columns(self) -> list[MultiTaskNetwork]:
        return cast(list[MultiTaskNetwork], list(self.columns))

    def features(self, observations: Tensor, environment: str, edit: Edit | None = None) -> Tensor:
        """The new column's features and what its head reads of the frozen ones, [B, feature_count], for raw observations [B, ...].

        Args:
            observations: the target's.
            environment: its name.
            edit: gives what is read in place of each layer's activations; for sensitivity analyses.
        """
        frozen = self._activations(observations, edit)
        features = observations
        for index, layer in enumerate(self.layers(environment)):
            if index and self.laterals:
                features = torch.cat(
                    [features, self.laterals[index - 1]([each[index - 1] for each in frozen])], 1
                )
            features = layer(features)
            if edit is not None:
                features = edit(len(frozen), index, features)
        read = [each[-1] for each in frozen]
        if self.laterals:
            read = [self.laterals[-1](read)]
        return torch.cat([features, *read], 1)

    def _activations(self, observations: Tensor, edit: Edit | None) -> list[list[Tensor]]:
        """Of each frozen column, what each of its layers gives."""
        found = []
        with torch.set_grad_enabled(edit is not None and torch.is_grad_enabled()):
            for number, (column, spec) in enumerate(zip(self._columns, self.spec.columns, strict=True)):
                activations: list[Tensor] = []
                hidden = observations
                if spec.components is not None:
                    wanted = spec.network.environments[spec.environment].observation
                    hidden = show(observations, spec.components, self._observation, wanted)
                for index, layer in enumerate(column.layers(spec.environment)):
                    hidden = layer(hidden)
                    if edit is not None:
                        hidden = edit(number, index, hidden)
                    activations.append(hidden)
                found.append(activations)
        return found


def _widen(reader: nn.Linear, extra: int) -> None:
    """Let a layer read ``extra`` inputs more, after its own."""
    added = nn.Linear(extra, reader.out_features).weight
    reader.weight = nn.Parameter(torch.cat([reader.weight, added], 1).detach())
    reader.in_features += extra


class Column(NamedTuple):
    """What a frozen column is made of: a network, its environment, and for each of its components the target's (None: its own)."""

    network: MultiTaskNetwork
    environment: str
    components: tuple[int, ...] | None


def progressive_network(
    name: str,
    environment: EnvironmentSpec,
    output: OutputKind,
    sources: Sequence[Column],
    seed: int,
    laterals: Laterals = "adapters",
    adapter_scale: float = 0.1,
) -> ProgressiveNetwork:
    """A new column of the first source's size beside the sources, frozen.

    Args:
        name: the target environment's.
        environment: its spaces.
        output: what the new column gives.
        sources: what the columns are made of.
        seed: of the fresh weights; torch's global generator is left as it was.
        laterals: see :class:`ProgressiveSpec`.
        adapter_scale: see :class:`ProgressiveSpec`.

    Raises:
        StillhouseError: the sources' layers do not match.
    """
    spec = ProgressiveSpec(
        size=sources[0].network.spec.size.model_copy(update={"share_head": False}),
        environments={name: environment},
        output=output,
        columns=tuple(
            ColumnSpec(
                network=source.network.spec, environment=source.environment, components=source.components
            )
            for source in sources
        ),
        laterals=laterals,
        adapter_scale=adapter_scale,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, "network"))
        network = ProgressiveNetwork(spec)
    make_fresh_head(network, name)
    for column, source in zip(network.columns, sources, strict=True):
        column.load_state_dict(source.network.state_dict())
    return network
