"""Offline distillation: it learns, it resumes exactly, it keeps to its budget, it stops for a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.checkpoint import load_state, save_state
from stillhouse.config import parse
from stillhouse.datasets.reader import Dataset
from stillhouse.datasets.schema import SCHEMA_FILE, DatasetSchema, action_gaps
from stillhouse.datasets.writer import ShardWriter
from stillhouse.distillation.offline import Distillation, DistillationConfig
from stillhouse.distillation.student import size_for_budget
from stillhouse.errors import StillhouseError
from stillhouse.files import replace_folder, write_json
from stillhouse.losses.distillation import constant_loss
from stillhouse.networks.multi_task import (
    MultiTaskNetwork,
    NetworkSize,
    NetworkSpec,
    build_network,
    parameter_count,
)
from stillhouse.types import EnvironmentSpec, ObservationSpec, OutputKind

ENVIRONMENTS = {
    "line": EnvironmentSpec(observation=ObservationSpec(kind="vector", shape=(3,)), actions=2),
    "grid": EnvironmentSpec(observation=ObservationSpec(kind="discrete", shape=(12,)), actions=4),
    "pixels": EnvironmentSpec(observation=ObservationSpec(kind="planes", shape=(5, 5, 2)), actions=3),
}
SMALL = NetworkSize(conv_channels=16, features=32, torso=(32,))


def make_dataset(
    path: Path,
    environment: EnvironmentSpec,
    rows: int = 600,
    scale: float = 1.0,
    offset: float | np.ndarray = 0.0,
    output: OutputKind = "q_values",
    outputs: np.ndarray | None = None,
) -> Dataset:
    """A teacher that is linear in its observation, on random observations, in episodes of 10."""
    random = np.random.default_rng(1)
    spec = environment.observation
    if spec.kind == "vector":
        observations = random.normal(size=(rows, *spec.shape)).astype(np.float32)
        flat = observations
    elif spec.kind == "discrete":
        observations = random.integers(spec.shape[0], size=rows)
        flat = np.eye(spec.shape[0])[observations]
    else:
        observations = random.random((rows, *spec.shape)) < 0.3
        flat = observations.reshape(rows, -1)
    if outputs is None:
        outputs = (flat @ random.normal(size=(flat.shape[1], environment.actions)) * scale + offset).astype(
            np.float32
        )
    ends = np.arange(rows) % 10 == 9
    with replace_folder(path) as folder:
        writer = ShardWriter(folder, environment, rows)
        writer.append(
            observations,
            outputs=outputs,
            actions=outputs.argmax(1),
            rewards=np.zeros(rows),
            terminated=ends,
            truncated=np.zeros(rows),
            episodes=np.arange(rows) // 10,
        )
        writer.append_final(np.arange(rows // 10), observations[ends])
        writer.close()
        schema = DatasetSchema(
            environment_id="test",
            environment=environment,
            output=output,
            teacher="0" * 64,
            teacher_parameters=10_000,
            epsilon=0.05,
            shard_rows=writer.shard_rows,
            episodes=rows // 10,
            mean_return=None,
            mean_action_gap=float(np.nan_to_num(action_gaps(outputs)).mean()),
        )
        write_json(folder / SCHEMA_FILE, schema.model_dump(mode="json"))
    return Dataset.open(path)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    folder = tmp_path_factory.mktemp("datasets")
    return {
        name: make_dataset(folder / name, environment, rows=2000)
        for name, environment in ENVIRONMENTS.items()
    }


def config(**settings) -> DistillationConfig:
    defaults = {
        "batch_size": 32,
        "updates": 300,
        "evaluation_interval": 50,
        "learning_rate": 5e-3,
        "size": SMALL,
    }
    return DistillationConfig(**{**defaults, **settings})


def temperatures(settings: DistillationConfig, datasets: dict[str, Dataset]) -> list[float]:
    sources = Distillation(settings, datasets, seed=0).training._sources
    return [source.temperature for source in sources.values()]


def weights(network: MultiTaskNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


@pytest.mark.parametrize("loss", ["kl", "nll", "mse"])
def test_every_loss_learns_all_environments(loss: str, datasets: dict[str, Dataset]) -> None:
    distillation = Distillation(config(loss=loss), datasets, seed=0)
    reports = list(distillation.train())
    assert [report.done for report in reports] == [50, 100, 150, 200, 250, 300]
    assert reports[-1].metrics["loss/distill"] < reports[0].metrics["loss/distill"] / 2
    for name in datasets:
        assert distillation.best[f"agreement/{name}"] > 0.8
    student = distillation.student()
    assert student.spec.output == ("q_values" if loss == "mse" else "logits")
    for name, dataset in datasets.items():
        rows = np.arange(len(dataset))
        with torch.no_grad():
            outputs = student(torch.from_numpy(dataset.observations(rows)), name).numpy()
        assert (outputs.argmax(1) == dataset.outputs(rows).argmax(1)).mean() > 0.8
        fresh = network_of(student.spec.size)
        with torch.no_grad():
            guesses = fresh(torch.from_numpy(dataset.observations(rows)), name).numpy()
        assert (guesses.argmax(1) == dataset.outputs(rows).argmax(1)).mean() < 0.75


def test_an_mse_student_has_the_teachers_q_values(tmp_path: Path) -> None:
    # Far from 0 and of different scales: what the head's bias alone would not reach in 600 updates.
    datasets = {
        "line": make_dataset(tmp_path / "line", ENVIRONMENTS["line"], scale=30, offset=-500),
        "grid": make_dataset(tmp_path / "grid", ENVIRONMENTS["grid"], scale=0.1, offset=3),
    }
    distillation = Distillation(
        config(loss="mse", updates=600, normalise_loss=True, patience=0), datasets, seed=0
    )
    list(distillation.train())
    student = distillation.student()
    for name, dataset in datasets.items():
        rows = np.arange(len(dataset))
        with torch.no_grad():
            outputs = student(torch.from_numpy(dataset.observations(rows)), name).numpy()
        teacher = dataset.outputs(rows)
        assert np.square(outputs - teacher).mean() < 0.05 * teacher.var()


def test_resumed_and_uninterrupted_end_in_the_same_bytes(
    tmp_path: Path, datasets: dict[str, Dataset]
) -> None:
    whole = Distillation(config(), datasets, seed=3)
    reports = list(whole.train())
    first = Distillation(config(), datasets, seed=3)
    training = first.train()
    next(training)
    next(training)
    save_state(tmp_path / "state", first.get_state())
    next(training)  # what comes after the save is lost
    second = Distillation(config(), datasets, seed=3)
    second.set_state(load_state(tmp_path / "state"))
    rest = list(second.train())
    assert [report.metrics for report in rest] == [report.metrics for report in reports[2:]]
    assert second.best == whole.best
    assert torch.equal(weights(second.student()), weights(whole.student()))
    assert torch.equal(second.training.parameters.values, whole.training.parameters.values)


def test_patience_is_resumed_too(tmp_path: Path, datasets: dict[str, Dataset]) -> None:
    settings = config(learning_rate=0.3, linear_decay=False, evaluation_interval=5, updates=1000, patience=4)
    whole = Distillation(settings, datasets, seed=1)
    list(whole.train())
    second = Distillation(settings, datasets, seed=1)
    while not second.finished:  # interrupted after every report
        next(second.train())
        save_state(tmp_path / "state", second.get_state())
        second = Distillation(settings, datasets, seed=1)
        second.set_state(load_state(tmp_path / "state"))
    assert second.updates == whole.updates < 1000
    assert torch.equal(weights(second.student()), weights(whole.student()))


def test_the_seed_decides(datasets: dict[str, Dataset]) -> None:
    def trained(seed: int) -> torch.Tensor:
        distillation = Distillation(config(updates=50), datasets, seed)
        list(distillation.train())
        return weights(distillation.student())

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_the_best_measurement_is_the_result(datasets: dict[str, Dataset]) -> None:
    distillation = Distillation(config(patience=0), datasets, seed=0)
    script = iter(np.repeat([0.5, 0.7, 0.6, 0.9, 0.8, 0.9], 3))
    distillation.training._agreement = lambda source: float(next(script))
    students = [distillation.training.parameters.values.detach().clone() for _ in distillation.train()]
    assert distillation.best["update"] == 200
    assert distillation.best["eval/agreement"] == pytest.approx(0.9)
    assert torch.equal(weights(distillation.student()), students[3])


def test_early_stopping(datasets: dict[str, Dataset]) -> None:
    settings = {"learning_rate": 0.3, "linear_decay": False, "updates": 5000, "evaluation_interval": 5}
    distillation = Distillation(config(patience=3, **settings), datasets, seed=0)
    reports = list(distillation.train())
    assert distillation.finished
    assert distillation.updates < 5000
    agreements = [report.metrics["eval/agreement"] for report in reports]
    assert max(agreements[-3:]) <= max(agreements[:-3])
    assert not Distillation(config(patience=3, **settings), datasets, seed=0).finished


def test_held_out_episodes_are_never_trained_on(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "line", ENVIRONMENTS["line"])
    used: list[np.ndarray] = []
    distillation = Distillation(config(updates=100, holdout_fraction=0.3), {"line": dataset}, seed=0)
    gather = dataset.observations
    dataset.observations = lambda rows: (used.append(rows), gather(rows))[1]
    distillation.training.update(100)
    trained = set(dataset.episodes[np.concatenate(used)].tolist())
    used.clear()
    distillation.training._agreement(distillation.training._sources["line"])
    held = set(dataset.episodes[np.concatenate(used)].tolist())
    assert len(trained) + len(held) == 60
    assert len(held) == 18
    assert not trained & held


def test_weights_act_on_their_environment(datasets: dict[str, Dataset]) -> None:
    def losses(**settings) -> dict[str, float]:
        distillation = Distillation(config(size=NetworkSize(features=4), **settings), datasets, seed=0)
        *_, last = distillation.train()
        return last.metrics

    equal = losses()
    heavy = losses(weights={"grid": 100.0})
    assert heavy["loss/grid"] < equal["loss/grid"]
    assert heavy["loss/line"] > equal["loss/line"]
    total = (heavy["loss/line"] + 100 * heavy["loss/grid"] + heavy["loss/pixels"]) / 102
    assert heavy["loss/distill"] == pytest.approx(total, rel=1e-6)


def test_normalised_mse_weighs_small_q_values_as_much_as_large_ones(tmp_path: Path) -> None:
    datasets = {
        "large": make_dataset(tmp_path / "large", ENVIRONMENTS["line"], scale=100),
        "small": make_dataset(tmp_path / "small", ENVIRONMENTS["line"], scale=0.1),
    }
    ratios = {}
    for normalise in (False, True):
        training = Distillation(config(loss="mse", normalise_loss=normalise), datasets, seed=0).training
        gradients = []
        for name, source in training._sources.items():
            training.parameters.zero_gradient()
            loss = training._loss(source, *next(training._batches(source, 1)))
            (training._shares()[name] * loss).backward()
            gradients.append(training.network.heads[name].weight.grad.norm().item())
        ratios[normalise] = gradients[0] / gradients[1]
    assert ratios[False] > 1e4
    assert 0.2 < ratios[True] < 5


@pytest.mark.parametrize("loss", ["mse", "kl", "nll"])
def test_a_normalised_loss_of_one_is_the_best_constant_answers(loss: str, tmp_path: Path) -> None:
    # "rare": the teacher prefers the same action nearly everywhere.
    datasets = {
        "line": make_dataset(tmp_path / "line", ENVIRONMENTS["line"]),
        "rare": make_dataset(tmp_path / "rare", ENVIRONMENTS["line"], offset=np.array([0.0, 4.0])),
        "never": make_dataset(tmp_path / "never", ENVIRONMENTS["line"], offset=np.array([0.0, 400.0])),
    }
    settings = config(loss=loss, normalise_loss=True, temperature=0.05, weights={"line": 2.0})
    shares = Distillation(settings, datasets, seed=0).training._shares()
    constants = {
        name: constant_loss(loss, torch.from_numpy(dataset.column("outputs")), 0.05)
        for name, dataset in datasets.items()
    }
    assert shares["line"] * constants["line"] == pytest.approx(2 / 4)
    assert shares["rare"] * constants["rare"] == pytest.approx(1 / 4)
    if loss != "mse":  # bounded: there is next to nothing to learn
        assert shares["never"] == pytest.approx(1 / 4 / 0.05)


def test_batch_shares_are_an_environments_own(datasets: dict[str, Dataset]) -> None:
    training = Distillation(config(batch_shares={"grid": 0.25, "line": 2.0}), datasets, seed=0).training
    sizes = {name: len(next(training._batches(source, 3))[0]) for name, source in training._sources.items()}
    assert sizes == {"line": 64, "grid": 8, "pixels": 32}
    with pytest.raises(StillhouseError, match=r"batch_shares: gird.*line, grid, pixels"):
        Distillation(config(batch_shares={"gird": 2.0}), datasets, seed=0)


def test_an_environment_that_stopped_growing_rests_and_wakes(datasets: dict[str, Dataset]) -> None:
    distillation = Distillation(
        config(environment_patience=2, rest_interval=5, patience=0, updates=3000), datasets, seed=0
    )
    training = distillation.training
    script = iter([0.5, 0.6, 0.6, 0.595, 0.595, 0.58, 0.7])
    used: list[str] = []
    training._agreement = lambda source: next(script) if source.name == "line" else training.updates / 1e4
    loss = training._loss
    training._loss = lambda source, *batch: (used.append(source.name), loss(source, *batch))[1]
    resting, taken = [], []
    for _, report in zip(range(7), distillation.train()):
        resting.append(report.metrics["resting/line"])
        taken.append((used.count("line"), used.count("grid")))
        used.clear()
        assert np.isfinite(report.metrics["loss/line"])
    # Two measurements without growth: rests; one lower by more than 0.01: woken.
    assert resting == [0, 0, 0, 1, 1, 0, 0]
    assert taken == [(50, 50)] * 4 + [(10, 50)] * 2 + [(50, 50)]
    assert not distillation.finished


def test_training_ends_when_every_environment_rests(datasets: dict[str, Dataset]) -> None:
    settings = config(environment_patience=1, patience=0, evaluation_interval=5, updates=10_000)
    distillation = Distillation(settings, datasets, seed=0)
    *_, last = distillation.train()
    assert distillation.updates < 10_000
    assert all(last.metrics[f"resting/{name}"] for name in datasets)


def teacher_network(name: str, width: int = 8) -> MultiTaskNetwork:
    """A teacher knows its environment by its own name, "played"."""
    size = NetworkSize(features=width, torso=(width,))
    spec = NetworkSpec(size=size, environments={"played": ENVIRONMENTS[name]}, output="q_values")
    return build_network(spec, 7).eval()


def test_feature_regression_reads_the_teachers_features_off_the_student(
    datasets: dict[str, Dataset],
) -> None:
    teachers = {name: teacher_network(name) for name in datasets}
    before = {name: weights(teacher) for name, teacher in teachers.items()}
    errors = {}
    for weight in (1e-9, 1.0):
        distillation = Distillation(config(feature_weight=weight), datasets, 0, teachers=teachers)
        list(distillation.train())
        training = distillation.training
        with torch.no_grad():
            for name, dataset in datasets.items():
                observations = torch.from_numpy(dataset.observations(np.arange(500)))
                wanted = teachers[name].features(observations, "played")
                read = training._readers[name](training.network.features(observations, name))
                errors[weight, name] = ((read - wanted).square().sum() / wanted.var(0).sum() / 500).item()
        student = distillation.student()
        assert parameter_count(student) == parameter_count(network_of(SMALL))
        for name, dataset in datasets.items():
            rows = np.arange(len(dataset))
            with torch.no_grad():
                outputs = student(torch.from_numpy(dataset.observations(rows)), name).numpy()
            assert (outputs.argmax(1) == dataset.outputs(rows).argmax(1)).mean() > 0.8
    for name in datasets:
        assert errors[1.0, name] < 0.5 * errors[1e-9, name]
        assert torch.equal(weights(teachers[name]), before[name])


def test_the_feature_term_is_the_papers(datasets: dict[str, Dataset]) -> None:
    teachers = {name: teacher_network(name) for name in datasets}
    losses = {}
    for weight in (0.0, 0.01):
        training = Distillation(config(feature_weight=weight), datasets, 0, teachers=teachers).training
        source = training._sources["grid"]
        batch = next(training._batches(source, 1))
        losses[weight] = training._loss(source, *batch)
    with torch.no_grad():
        wanted = teachers["grid"].features(batch[0], "played")
        read = training._readers["grid"](training.network.features(batch[0], "grid"))
        expected = (read - wanted).square().sum(1).mean()
    assert (losses[0.01] - losses[0.0]).item() == pytest.approx(0.01 * expected.item(), rel=1e-4)


def test_feature_regression_resumes_and_needs_teachers(tmp_path: Path, datasets: dict[str, Dataset]) -> None:
    teachers = {name: teacher_network(name) for name in datasets}
    settings = config(feature_weight=0.01, updates=100)
    whole, first, second = (Distillation(settings, datasets, 3, teachers=teachers) for _ in range(3))
    list(whole.train())
    next(first.train())
    save_state(tmp_path / "state", first.get_state())
    second.set_state(load_state(tmp_path / "state"))
    list(second.train())
    assert torch.equal(second.training.parameters.values, whole.training.parameters.values)
    assert torch.equal(weights(second.student()), weights(whole.student()))
    del teachers["grid"]
    with pytest.raises(StillhouseError, match=r"feature_weight 0.01 needs the teachers' networks.*grid;"):
        Distillation(settings, datasets, 0, teachers=teachers)


def test_the_temperature_follows_the_action_gap(tmp_path: Path) -> None:
    datasets = {
        name: make_dataset(tmp_path / name, ENVIRONMENTS["line"], scale=scale, output=output)
        for name, scale, output in (
            ("small", 0.1, "q_values"),
            ("large", 100.0, "q_values"),
            ("policy", 1.0, "logits"),
        )
    }
    small, large, policy = temperatures(config(greedy_odds=20), datasets)
    assert policy == 1.0
    for name, temperature in (("small", small), ("large", large)):
        gap = np.abs(np.diff(datasets[name].column("outputs"), axis=1)).mean()
        # In a state of mean gap the odds of the best action against the second best are 20 to 1.
        assert np.exp(gap / temperature) == pytest.approx(20, rel=1e-3)
    flat = {"line": make_dataset(tmp_path / "flat", ENVIRONMENTS["line"], scale=0.0)}
    with pytest.raises(
        StillhouseError, match=r"line: its teacher prefers no action anywhere.*give a temperature"
    ):
        Distillation(config(), flat, seed=0)
    assert (
        temperatures(config(temperature=0.3), flat)
        == temperatures(config(temperature=0.3), datasets)[:1]
        == [0.3]
    )


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_parameter_budget_is_kept_and_used(
    fraction: float, layer_norm: bool, datasets: dict[str, Dataset]
) -> None:
    size = NetworkSize(conv_channels=16, features=64, torso=(32, 32), layer_norm=layer_norm)
    distillation = Distillation(config(size=size, parameter_fraction=fraction), datasets, seed=0)
    count = parameter_count(distillation.training.network)
    assert 0.7 * fraction * 30_000 < count <= fraction * 30_000
    assert distillation.training.network.spec.size.layer_norm == layer_norm
    assert distillation.teacher_parameters == 30_000


def test_the_largest_network_within_the_budget_is_found() -> None:
    size = NetworkSize(conv_channels=16, features=64, torso=(32,))
    previous = 0
    for budget in range(400, 5000, 150):
        found = size_for_budget(size, ENVIRONMENTS, budget)
        assert found.features >= previous
        previous = found.features
    exact = parameter_count(network_of(found))
    assert size_for_budget(size, ENVIRONMENTS, exact) == found
    assert size_for_budget(size, ENVIRONMENTS, exact - 1) != found


def network_of(size: NetworkSize) -> MultiTaskNetwork:
    return build_network(NetworkSpec(size=size, environments=ENVIRONMENTS, output="logits"), 0)


def test_a_budget_without_bounds_ends_at_the_widest_network() -> None:
    size = size_for_budget(NetworkSize(features=8192), {"line": ENVIRONMENTS["line"]}, 10**12)
    assert size.features == 8192


def test_too_small_a_budget_names_the_minimum(datasets: dict[str, Dataset]) -> None:
    with pytest.raises(StillhouseError, match=r"at most 30 parameters.*has (\d+)") as error:
        Distillation(config(parameter_fraction=0.001), datasets, seed=0)
    minimum = int(str(error.value).split(" has ")[1].split(";")[0])
    assert parameter_count(network_of(size_for_budget(SMALL, ENVIRONMENTS, minimum))) == minimum


def test_a_loss_that_is_not_finite_stops_without_a_result(tmp_path: Path) -> None:
    outputs = np.zeros((600, 2), np.float32)
    outputs[::7] = np.nan
    datasets = {"line": make_dataset(tmp_path / "line", ENVIRONMENTS["line"], outputs=outputs)}
    distillation = Distillation(config(temperature=0.01), datasets, seed=0)
    with pytest.raises(StillhouseError, match=r"not finite after 50 updates.*learning_rate"):
        list(distillation.train())
    with pytest.raises(StillhouseError, match="not been trained"):
        distillation.student()


def test_teachers_with_other_action_sets_can_share_a_head(
    tmp_path: Path, datasets: dict[str, Dataset]
) -> None:
    size = NetworkSize(features=32, torso=(32,), layer_norm=True, share_head=True)
    assert len({data.schema.environment.actions for data in datasets.values()}) > 1
    distillation = Distillation(config(size=size, updates=300), datasets, seed=0)
    list(distillation.train())
    student = distillation.student()
    assert list(student.heads) == ["shared_head"]
    best = distillation.training.best
    assert min(best[f"agreement/{name}"] for name in datasets) > 0.8
    with pytest.raises(ValueError, match="share_head is allowed with loss kl or nll, not with mse"):
        config(size=size, loss="mse")
    with pytest.raises(ValueError, match="a student is one network: size.separate must be false"):
        config(size=NetworkSize(separate=True))


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_a_student_goes_on_from_another(datasets: dict[str, Dataset], loss: str) -> None:
    first = Distillation(config(loss=loss), datasets, seed=0)
    list(first.train())
    student = first.student()
    second = Distillation(config(loss=loss), datasets, seed=1, initial=student)
    second.training.measure(dict.fromkeys(datasets, 0.0))
    for name in datasets:
        begun, ended = (run.training.best[f"agreement/{name}"] for run in (second, first))
        assert begun == pytest.approx(ended, abs=0.1), "before any update it plays like the one it came from"
    observations = torch.from_numpy(datasets["line"].observations(np.arange(50)))
    torch.testing.assert_close(
        second.student()(observations, "line"), student(observations, "line"), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(StillhouseError, match="to go on from is another network"):
        Distillation(config(loss=loss, size=NetworkSize(features=7)), datasets, seed=1, initial=student)
    other = "mse" if loss == "kl" else "kl"
    with pytest.raises(StillhouseError, match="to go on from is another network"):
        Distillation(config(loss=other), datasets, seed=1, initial=student)


def test_mse_needs_teachers_of_one_kind(tmp_path: Path) -> None:
    datasets = {
        "line": make_dataset(tmp_path / "line", ENVIRONMENTS["line"]),
        "grid": make_dataset(tmp_path / "grid", ENVIRONMENTS["grid"], output="logits"),
    }
    with pytest.raises(StillhouseError, match=r"line q_values, grid logits"):
        Distillation(config(loss="mse"), datasets, seed=0)
    assert temperatures(config(), datasets)[1] == 1.0
    assert temperatures(config(temperature=0.3), datasets) == [0.3, 0.3]


def test_weights_for_an_unknown_environment_are_refused(datasets: dict[str, Dataset]) -> None:
    with pytest.raises(StillhouseError, match=r"weights: gird.*line, grid, pixels"):
        Distillation(config(weights={"gird": 2.0}), datasets, seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", -0.01),
        ("greedy_odds", 1),
        ("batch_shares", {"line": -1}),
        ("feature_weight", -0.01),
        ("method", "online"),
        ("loss", "l1"),
        ("weights", {"line": 0}),
        ("holdout_fraction", 0),
        ("updates", 0),
        ("tau", 1),
    ],
)
def test_bad_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(StillhouseError, match=f"^distill_student.x.{field}"):
        parse(DistillationConfig, {field: value}, "distill_student.x")
