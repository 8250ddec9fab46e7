"""The page of meta-learning's results: committed studies to Markdown. Pure: the same bytes for the same studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.config import parse
from stillhouse.evaluation.statistics import estimate, mean
from tasks import charts
from tasks.results_page import origin, returns_table, scores_table, table, text
from tasks.studies import Study, array

FOLDER = Path("benchmarks/results/meta_learning")
PAGE = Path("docs/results/meta-learning.md")

HEAD = """# Meta-learning: results

Made by the stage `publish_results` from the results in `benchmarks/results/meta_learning/`; do not edit it by hand. The methods:
[MAML](../algorithms/maml.md), [Reptile](../algorithms/reptile.md), [learned updates](../algorithms/learned-update.md), [policy
gradients](../algorithms/maml-rl.md), [RL²](../algorithms/rl2.md), [aggregation](../algorithms/aggregation.md),
[hypernetwork](../algorithms/hypernetwork.md).

Values are means over the seeds; from 5 seeds on with 95 % bootstrap intervals over them, below that with the seeds themselves. Test tasks are
none that training saw, unless a section says otherwise. Settings were chosen on other seeds, and the last iterate is judged."""

Found = Mapping[str, Any]


def _number(value: float) -> str:
    return charts.number(value) if abs(value) >= 1 else f"{value:.3f}".replace("-", "−")


def _over_seeds(values: list[float | None]) -> str:
    """A mean over seeds with its spread."""
    numbers = np.array([np.nan if value is None else value for value in values], np.float64)
    if np.isnan(numbers).any():
        return "diverged"
    return text(estimate(mean, numbers[:, None], seed=0), ".3g" if abs(numbers).max() >= 100 else ".3f")


def values_table(found: Found) -> list[str]:
    """A row for each arm, a column for each of what was measured: means over the seeds."""
    study = _study(found)
    budgets = any("meta_updates" in arm.extra for arm in study.arms.values())
    rows = []
    for name in study.names():
        arm = study.arms[name]
        budget = [charts.short(arm.extra["meta_updates"])] if budgets else []
        measured = dict(zip(study.columns(arm), array(arm.scores).T.tolist(), strict=True))
        rows.append(
            [
                name,
                *budget,
                *(_over_seeds(measured[key]) if key in measured else "–" for key in study.environments),
            ]
        )
    head = ["", *(["meta-updates"] if budgets else []), *study.environments]
    return [*table(head, rows), "", f"{len(study.seeds)} seeds."]


def returns_by_update(found: Found) -> list[str]:
    """Returns after every update, a row for each arm, with the paper's beneath."""
    longest = max(len(arm["extra"]["mean_returns"]) for arm in found["arms"].values())
    rows = []
    for name in found["order"]:
        returns = np.array(found["arms"][name]["extra"]["returns"], np.float64)
        columns = [_over_seeds(column.tolist()) for column in returns.T]
        rows.append([name.replace("_", " "), *columns, *["" for _ in range(longest - len(columns))]])
    if found["published"]:
        rows.append(["*MAML, the paper*", *(_number(value) for value in found["published"][:longest])])
    lines = table(["return after", *(f"{step} update{'s' * (step != 1)}" for step in range(longest))], rows)
    if found["missing"]:
        lines += ["", f"Not run: {', '.join(found['missing'])}."]
    beside = " The paper judges the best of its iterates." if found["published"] else ""
    return [*lines, "", f"{len(found['seeds'])} seeds.{beside}"]


def bandits_table(found: Found) -> list[str]:
    """Totals of a trial by every method, with the paper's beside, a table for each setting."""
    lines = []
    for setting, result in found["settings"].items():
        rows = []
        for name, baseline in result["baselines"].items():
            gain = (
                f"{charts.signed(baseline['rl2_gain'])} ± {baseline['rl2_gain_standard_error']:.3f}"
                if "rl2_gain" in baseline
                else "–"
            )
            ours = f"{baseline['mean']:.2f} ± {baseline['standard_error']:.2f}"
            rows.append([name.replace("_", " "), ours, _published(result, name), gain])
        if result["rl2"]:
            seeds = " · ".join(f"{run['mean']:.2f}" for run in result["rl2"].values())
            rows.append(["**RL²**", f"**{result['rl2_mean']:.2f}** ({seeds})", _published(result, "rl2"), ""])
            run = next(iter(result["rl2"].values()))
            config, steps = run["config"], run["env_steps"]
            joint = ", states and actions joint" if config.get("state_action") == "joint" else ""
            seconds = " · ".join(f"{run['seconds']:.0f}" for run in result["rl2"].values())
            about = (
                f"GRU of {config['width']} units{joint}, {config['updates']:,} batches of {config['trials']:,} trials ({charts.short(steps)} env steps); "
                f"{seconds} processor seconds."
            )
        else:
            about = "RL² was not run in this setting."
        lines += [
            f"### {_setting(setting)}",
            "",
            *table(["", "total reward", "the paper", "RL² above it"], rows),
            "",
            about,
            "",
        ]
    trials = next(iter(found["settings"].values()))["trials"]
    return [
        *lines,
        f"Every method plays the same {trials:,} test trials with the same noise; ± is a standard error, RL²'s seeds are in parentheses. Settings of the baselines "
        "were chosen on other trials, by the grids of the paper's code.",
    ]


def _published(result: Found, name: str) -> str:
    return f"{result['paper'][name]:.1f}" if name in result["paper"] else "–"


def _setting(name: str) -> str:
    kind, *sizes = name.split("-")
    if kind == "bandits":
        return f"{sizes[1]} arms, {sizes[0]} pulls"
    return f"Random MDPs, {sizes[0]} episodes"


def speed_table(found: Found) -> list[str]:
    """Milliseconds of a meta-update, and how many times longer than ours."""
    rows = []
    for name, milliseconds in found["milliseconds"].items():
        times = found["times_ours"].get(name)
        ratio = (
            f"{times['median']:.1f} [{times['quartiles'][0]:.1f}, {times['quartiles'][1]:.1f}]"
            if times
            else ""
        )
        rows.append([name, f"{milliseconds:.2f}", ratio])
    return [
        *table(["", "milliseconds", "times ours"], rows),
        "",
        f"Medians and quartiles of {found['rounds']} rounds, the programs in turn.",
    ]


def networks_table(found: Found) -> list[str]:
    """Normalised scores of networks."""
    study = _study(found)
    return [*scores_table(study), "", *returns_table(study)]


def _study(found: Found) -> Study:
    return parse(Study, found, str(found.get("study", "")))


Draw = Callable[[Found], list[str]]
SECTIONS: tuple[tuple[str, str, Draw, str], ...] = (
    ("sinusoid", "Sinusoids", values_table, ""),
    ("vmap", "Speed of a meta-update", speed_table, ""),
    (
        "learned_optimiser",
        "A learned optimiser",
        values_table,
        "The paper shows curves, no table: its optimiser is below all tuned ones on quadratics and on the network it was trained on.",
    ),
    ("navigation", "2D navigation", returns_by_update, ""),
    ("navigation_distance", "2D navigation, reward -distance", returns_by_update, ""),
    ("cartpole_family", "CartPole with other physics", returns_by_update, ""),
    ("cartpole_sides", "CartPole with other physics, sides swapped or not", returns_by_update, ""),
    (
        "cheetah_direction",
        "HalfCheetah, forward or backward",
        returns_by_update,
        "Returns of different versions of MuJoCo cannot be compared; the gain by one update can, in its order. The family has two members: training "
        "and test tasks are the same, as in the paper.",
    ),
    ("cheetah_velocity", "HalfCheetah at a given speed", returns_by_update, ""),
    ("minatar_views", "A MinAtar game in other views", returns_by_update, ""),
    ("bandits", "RL² on bandits", bandits_table, ""),
    ("tabular_mdps", "RL² on random MDPs", bandits_table, ""),
    ("aggregation", "One network of several agents", networks_table, ""),
    ("hypernetwork", "A policy made from a task's transitions", networks_table, ""),
)


def render(files: Mapping[str, Found]) -> str:
    """The page.

    Args:
        files: what lies in ``benchmarks/results/meta_learning/``, by name.
    """
    lines = [HEAD]
    for name, title, draw, beside in SECTIONS:
        lines += ["", f"## {title}", ""]
        if name not in files:
            lines += [f"Not run yet: there is no `{FOLDER / name}.json`."]
            continue
        found = files[name]
        lines += [found["question"], ""] if found.get("question") else []
        lines += [*draw(found), ""]
        lines += [*(f"- {note}" for note in found["notes"]), ""] if found.get("notes") else []
        lines += [beside, ""] if beside else []
        lines += [_origin(name, found)]
    return "\n".join(lines).rstrip() + "\n"


def _origin(name: str, found: Found) -> str:
    about = {"study": name, "question": "", "environments": ["-"], "seeds": [0], "arms": {"-": {}}}
    return origin(Study.model_validate(about | {"provenance": found["provenance"]}), FOLDER)
