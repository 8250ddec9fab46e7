"""The GRU with its gradient written out, against PyTorch's own."""

import pytest
import torch
from torch import nn

from stillhouse import seeding
from stillhouse.networks.gru import GRU

torch.set_num_threads(1)


def twins(inputs: int, width: int) -> tuple[GRU, nn.GRU]:
    ours, theirs = (
        GRU(inputs, width, seeding.torch_generator(0, "gru")).double(),
        nn.GRU(inputs, width).double(),
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            getattr(theirs, f"{name}_l0").copy_(parameter)
    return ours, theirs


@pytest.mark.parametrize(("steps", "batch", "inputs", "width"), [(1, 1, 1, 1), (7, 5, 3, 4), (3, 2, 6, 9)])
def test_states_and_gradients_are_pytorchs(steps: int, batch: int, inputs: int, width: int) -> None:
    ours, theirs = twins(inputs, width)
    generator = seeding.torch_generator(1, "inputs")
    given = torch.randn(steps, batch, inputs, generator=generator, dtype=torch.float64)
    weights = torch.randn(steps, batch, width, generator=generator, dtype=torch.float64)
    gradients = []
    for network in (ours, theirs):
        leaf = given.clone().requires_grad_()
        output = network(leaf)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        (hidden * weights).sum().backward()
        gradients.append([hidden.detach(), leaf.grad, *(each.grad for each in network.parameters())])
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_with_chrono_initialisation_units_keep_what_they_hold_as_long_as_asked() -> None:
    width = 2000
    network, plain = (GRU(2, width, seeding.torch_generator(0, "gru"), memory) for memory in (100, 0))
    for name in ("weight_ih", "weight_hh"):
        assert torch.equal(getattr(network, name), getattr(plain, name))
    bias = (network.bias_ih + network.bias_hh)[width : 2 * width]
    kept = 1 / (1 - bias.sigmoid())  # steps until 1 / e of it is left, about; uniform in 2 to 100
    assert 2 <= kept.min() < 4 and 98 < kept.max() <= 100.001
    assert kept.mean().item() == pytest.approx(51, abs=2)
    assert torch.equal(network.bias_ih[:width], plain.bias_ih[:width])


def test_steps_are_the_unrolled_sequence() -> None:
    ours, _ = twins(3, 8)
    given = torch.randn(6, 4, 3, generator=seeding.torch_generator(2, "inputs"), dtype=torch.float64)
    hidden = torch.zeros(4, 8, dtype=torch.float64)
    unrolled = ours(given)
    for time in range(6):
        hidden = ours.step(given[time], hidden)
        torch.testing.assert_close(hidden, unrolled[time])


def test_buffers_are_no_memory_of_earlier_sequences() -> None:
    ours, _ = twins(3, 8)
    given = torch.randn(6, 4, 3, generator=seeding.torch_generator(2, "inputs"), dtype=torch.float64)

    def gradient() -> torch.Tensor:
        ours.zero_grad()
        ours(given).square().sum().backward()
        return ours.weight_hh.grad.clone()

    first = gradient()
    ours(given * 1000).sum().backward()
    assert torch.equal(gradient(), first)


def test_two_graphs_may_be_alive() -> None:
    ours, theirs = twins(3, 8)
    one, other = torch.randn(2, 5, 4, 3, generator=seeding.torch_generator(3, "x"), dtype=torch.float64)
    a, b = ours(one), ours(other)
    a.sum().backward()
    b.square().sum().backward()
    theirs(one)[0].sum().backward()
    theirs(other)[0].square().sum().backward()
    torch.testing.assert_close(ours.weight_hh.grad, theirs.weight_hh_l0.grad)


def test_a_second_backward_is_refused() -> None:
    ours, _ = twins(3, 8)
    total = ours(torch.ones(2, 3, 3, dtype=torch.float64)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
