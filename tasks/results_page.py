"""The page of published results: studies to Markdown. Pure: the same bytes for the same studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from stillhouse.errors import StillhouseError
from stillhouse.evaluation.statistics import (
    SEEDS_FOR_INTERVALS,
    Estimate,
    aggregate,
    estimate,
    geometric_mean,
    interval,
    mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from tasks import charts
from tasks.studies import FOLDER, Matrix, Study, array

ONLINE_CURVE = Path("docs/results/online-distillation.svg")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        study: the file it is drawn from.
        title: its heading.
        draw: the study's own tables.
        beside: what the papers found, and what differs here.
    """

    study: str
    title: str
    draw: Callable[[Study], list[str]]
    beside: str


@dataclass(frozen=True)
class Page:
    """A page of results.

    Attributes:
        folder: of the committed studies.
        path: the page's own.
        head: what stands above the sections.
        sections: in their order.
    """

    folder: Path
    path: Path
    head: str
    sections: tuple[Section, ...]


def render(
    page: Page, studies: Mapping[str, Study], measured: Mapping[str, str] = MappingProxyType({})
) -> str:
    """A page: the same bytes for the same studies.

    Args:
        page: which.
        studies: by name.
        measured: Markdown that other benchmarks have written of their results, by name: set under the page's own sections.
    """
    lines = [page.head]
    left = dict(studies)
    for section in page.sections:
        lines += ["", f"## {section.title}", ""]
        # `teachers_long` is a part of `teachers`.
        own = [name for name in studies if f"{name}_".startswith(f"{section.study}_")]
        if section.study not in own:
            lines += [f"Not run yet: there is no `{page.folder / section.study}.json`."]
        for name in own:
            lines += _study(page, left.pop(name), section)
        lines += [section.beside] if own and section.beside else []
    for name, study in left.items():
        title = name.replace("_", " ").capitalize()
        lines += ["", f"## {title}", "", *_study(page, study, Section(name, title, scores_table, ""))]
    for text in measured.values():
        lines += ["", *(f"#{line}" if line.startswith("#") else line for line in text.strip().splitlines())]
    return "\n".join(lines).rstrip() + "\n"


def _study(page: Page, study: Study, section: Section) -> list[str]:
    lines = [study.question, "", *section.draw(study), ""]
    lines += [*(f"- {note}" for note in study.notes), ""] if study.notes else []
    return [*lines, *returns_table(study), origin(study, page.folder), ""]


# --- tables ---------------------------------------------------------------------------------------------------


def text(value: Estimate | None, form: str = ".3f") -> str:
    """The value with its 95 % interval, or below 5 seeds with the seeds' own values."""
    if value is None:
        return "–"
    if value.interval is not None:
        spread = f" [{value.interval[0]:{form}}, {value.interval[1]:{form}}]"
    else:
        points = " · ".join(f"{point:{form}}" for point in value.points)
        spread = f" ({points})" if len(value.points) > 1 else ""
    return f"{value.value:{form}}{spread}".replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; numbers to the right."""
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def scores_table(study: Study, more: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """A row for each arm: size, aggregates, worst environment, every environment, and what else is known of it.

    Args:
        study: whose arms have scores.
        more: further columns: title to arm to text.
    """
    names = [name for name in study.names() if study.arms[name].scores]
    if not names:
        return ["No scores are given."]
    several = len(study.seeds) >= SEEDS_FOR_INTERVALS
    environments = list(dict.fromkeys(e for name in names for e in study.columns(study.arms[name])))
    sized = any(study.arms[name].parameters is not None for name in names)
    extras = {key: found for key, found in _extras(study, names).items() if any(found.values())} | dict(
        more or {}
    )
    head = ["", *(["parameters"] if sized else []), "geometric mean", *(["IQM"] if several else [])]
    head += ["worst environment", *extras, *environments]
    rows = []
    for name in names:
        arm = study.arms[name]
        found = aggregate(array(arm.scores), study.columns(arm))
        worst = f"{found.worst} {found.environments[found.worst].value:.3f}" if found.worst else "–"
        row = [name, *([_count(arm.parameters)] if sized else []), f"**{text(found.geometric_mean)}**"]
        row += [text(found.interquartile_mean)] if several else []
        row += [worst, *(extra.get(name, "–") or "–" for extra in extras.values())]
        rows.append(row + [text(found.environments.get(environment)) for environment in environments])
    spread = "95 % stratified bootstrap intervals" if several else "each seed"
    how = f"Normalised scores, {_seeds(study)}; {'in brackets' if several else 'in parentheses'}: {spread}."
    return [*table(head, rows), "", how]


def _extras(study: Study, names: list[str]) -> dict[str, dict[str, str]]:
    """Numbers and texts of ``extra``, by title and arm."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for key, value in sorted(study.arms[name].extra.items()):
            if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
                shown = (
                    value
                    if isinstance(value, str)
                    else charts.short(value)
                    if value >= 1000
                    else f"{value:.4g}"
                )
                found.setdefault(key.replace("_", " "), {})[name] = shown
    return found


def returns_table(study: Study) -> list[str]:
    """Mean returns of random play, the teacher and every arm, folded away."""
    given: dict[str, tuple[list[str], Matrix]] = {
        name: (study.environments, study.reference[name])
        for name in ("random", "teacher")
        if study.reference.get(name)
    }
    given |= {name: (study.columns(a), a.returns) for name, a in study.arms.items() if a.returns}
    if not given or study.study.startswith("teachers"):
        return []
    environments = list(dict.fromkeys(e for columns, _ in given.values() for e in columns))
    rows = []
    for name in [*given][: 2 if "teacher" in given else 0] + [n for n in study.names() if n in given]:
        columns, matrix = given[name]
        means = dict(zip(columns, array(matrix).mean(axis=0), strict=True))
        rows.append(
            [name, *(f"{means[e]:.1f}".replace("-", "−") if e in means else "–" for e in environments)]
        )
    return [
        "<details><summary>Mean returns</summary>",
        "",
        *table(["", *environments], rows),
        "",
        "</details>",
        "",
    ]


def origin(study: Study, folder: Path) -> str:
    """Where a study's numbers come from: command, commit, machine, versions."""
    about = study.provenance
    machine, versions = about.get("machine") or {}, about.get("versions") or {}
    parts = [f"`{about['command']}`"] if about.get("command") else []
    parts += [f"commit `{about['commit']}`"] if about.get("commit") else []
    parts += (
        [f"{machine.get('processor', 'processor unknown')}, {machine['cores']} cores"]
        if "cores" in machine
        else []
    )
    parts += [" ".join((name, str(versions[name]))) for name in ("torch", "numpy") if name in versions]
    return (
        f"<sub>Made by {'; '.join(parts) or 'an unknown command'}. Data: `{folder / study.study}.json`.</sub>"
    )


def improvement(study: Study, better: str, others: list[str]) -> list[str]:
    """Probability that a run of ``better`` beats one of each other arm on the same environment, ties one half."""
    lines = []
    for other in others:
        x, y = study.arms.get(better), study.arms.get(other)
        if x is None or y is None or not (x.scores and y.scores) or study.columns(x) != study.columns(y):
            continue
        pair = [array(x.scores), array(y.scores)]
        known = ~np.isnan(pair[0] + pair[1]).any(axis=0)
        pair = [scores[:, known] for scores in pair]
        if not known.any():
            continue
        value = f"**{float(probability_of_improvement(*pair)):.3f}**"
        if len(study.seeds) >= SEEDS_FOR_INTERVALS:
            low, high = interval(stratified_bootstrap(probability_of_improvement, *pair, seed=0))
            value += f" [{low:.3f}, {high:.3f}]"
        lines.append(f"Probability that {better} is better than {other}: {value}.")
    return [line for given in lines for line in ("", given)]


def _seeds(study: Study) -> str:
    return f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


# --- sections -------------------------------------------------------------------------------------------------

PUBLISHED_TEACHERS = {
    "DQN, Young & Tian 2019 (5M)": ("about 17", "about 10", "about 50", "about 20", "about 44"),
    "PPO, pgx (20M)": ("22 to 25", "about 50", "about 63.5", "about 54", "144 to 153"),
}
PUBLISHED_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space-invaders")
PUBLISHED_SIZES = {"25 %": "108.3 %", "7 %": "101.7 %", "4 %": "83.9 %"}
PUBLISHED_MULTI_TASK = {
    "distilled": "116.9 % (3 games, KL); 89 % (10 games, KL)",
    "distilled nll": "105.1 % (3 games)",
    "joint": "83.5 % (3 games)",
}


def teachers_table(study: Study) -> list[str]:
    """Mean returns of the teachers, with what others have published under them."""
    rows = []
    for name in study.names():
        arm = study.arms[name]
        columns = [estimate(mean, column[:, None], seed=0) for column in array(arm.returns).T]
        found = dict(zip(study.columns(arm), columns, strict=True))
        rows.append([name, *(text(found.get(e), ".1f") for e in study.environments)])
    for name, values in PUBLISHED_TEACHERS.items():
        published = dict(zip(PUBLISHED_GAMES, values, strict=True))
        rows.append([name, *(published.get(e, "–") for e in study.environments)])
    return [*table(["", *study.environments], rows), "", f"Mean returns of greedy play, {_seeds(study)}."]


def compression_table(study: Study) -> list[str]:
    """Students by size, beside the paper's."""
    return scores_table(study, {"the paper (Atari)": PUBLISHED_SIZES})


def multi_task_table(study: Study) -> list[str]:
    """Distilled, jointly trained and single networks, and how sure the difference is."""
    found = scores_table(study, {"the paper (Atari)": PUBLISHED_MULTI_TASK})
    return found + improvement(study, "distilled", [name for name in study.names() if name != "distilled"])


def on_policy_table(study: Study) -> list[str]:
    """Scores, and how many updates each way took to 95 % of the teacher."""
    lines = scores_table(study)
    steps = {
        name: np.array(
            [np.inf if u is None else u for u in study.arms[name].extra["updates_to_95"]], np.float64
        )
        for name in study.names()
        if isinstance(study.arms[name].extra.get("updates_to_95"), list)
    }
    rows = []
    for name, updates in steps.items():
        each = " · ".join(charts.short(u) if np.isfinite(u) else "never" for u in updates)
        middle = float(np.median(updates))
        faster = "–"
        if (
            "offline" in steps
            and name != "offline"
            and np.isfinite(updates).all()
            and np.isfinite(steps["offline"]).all()
        ):
            faster = (
                text(estimate(geometric_mean, (steps["offline"] / updates)[:, None], seed=0), ".2f")
                + " times"
            )
        rows.append([name, charts.short(middle) if np.isfinite(middle) else "never", each, faster])
    if rows:
        head = ["student updates to 95 % of the teacher", "median", "each seed", "fewer than offline"]
        lines += [
            "",
            *table(head, rows),
            "",
            "Fewer: geometric mean over seeds of offline's updates over this one's.",
        ]
    return lines


def online_table(study: Study) -> list[str]:
    """Teacher and student at the end, and their curves."""
    return [*scores_table(study), "", f"![Teachers and student while both learn]({ONLINE_CURVE.name})"]


def online_curve(study: Study) -> str:
    """Normalised scores of teachers and student over env steps, as SVG; lines of seeds, and their mean."""
    lines = []
    for name, colour in (("teacher", "teacher"), ("student", "student")):
        extra = study.arms[name].extra if name in study.arms else {}
        if not {"env_steps", "curve"} <= set(extra):
            raise StillhouseError(
                f"{FOLDER / 'online.json'}: arms.{name}.extra needs 'env_steps' (P numbers) and 'curve' (P for each seed)"
            )
        lines.append(charts.Line(name, colour, [(extra["env_steps"], run) for run in extra["curve"]]))
    return charts.picture(lines, "env steps", size=(560, 300), style=STYLE) + "\n"


SECTIONS = (
    Section(
        "teachers",
        "Teachers",
        teachers_table,
        "Published figures are read off plots, within about 3 % of the axis: DQN from Young & Tian 2019 (arXiv 1903.03176, "
        "`img/learning_curves.gif` of `kenjyoung/MinAtar`: 30 seeds, 5M frames, mean over the last 100 training episodes), PPO "
        "from the documentation of pgx (4,096 environments, 20M steps; it states an exact copy of the original games). Here: "
        "greedy play of the last checkpoint, the original rules (6 actions, sticky actions 0.1, ramping on).",
    ),
    Section(
        "losses",
        "Losses",
        scores_table,
        "The paper's order on four Atari games is KL, then NLL, then MSE, with a student of the teacher's size; its KL divides "
        "the teacher's Q-values by 0.01. `kl gap` takes the temperature from the teacher's mean action gap. Scores there are raw "
        "ratios to the teacher's, from human starts; here normalised, (student - random) / (teacher - random).",
    ),
    Section(
        "compression",
        "Compression",
        compression_table,
        "The paper's column: geometric mean over ten Atari games of the raw ratio to the teacher, one student a game, KL, "
        "convolutional networks of 1.69M parameters and 25, 7 and 4 % of that. Here: MinAtar games and teachers of about a "
        "tenth of the size, one student a game.",
    ),
    Section(
        "one_student",
        "One student for five games",
        scores_table,
        "The paper's ten-game student has about four times a single teacher's parameters and reaches 89 %; here the student has "
        "a fraction of the teachers' parameters together.",
    ),
    Section(
        "multi_task",
        "Distilled or trained jointly",
        multi_task_table,
        "The paper's column: Multi-DQN and Multi-Dist on three and ten Atari games, raw ratios to single DQN teachers. Here the "
        "joint network is trained by multi-task PQN, with the same network and as many env steps as teachers and collection "
        "took together.",
    ),
    Section(
        "on_policy",
        "On-policy or offline",
        on_policy_table,
        "Czarnecki et al. 2019 (arXiv 1902.02186) report sampling by the student to be about 3 times faster than by the teacher, "
        "on tabular grid worlds (repeated [here](distilling-policy-distillation.md)). On this page: a network, MinAtar, and a "
        "mixing schedule from the teacher's actions to the student's.",
    ),
    Section(
        "online",
        "Online: teachers that still learn",
        online_table,
        "The paper shows a figure only: the student follows each improvement of a DQN teacher, with a smoother curve.",
    ),
)

HEAD = """# Policy distillation: results

Made by the stage `publish_results` from the score matrices in `benchmarks/results/policy_distillation/`; do not edit it by
hand. *The paper* is Rusu et al. 2015, *Policy Distillation* ([arXiv 1511.06295](https://arxiv.org/abs/1511.06295)).

A score is normalised, 0 for random play and 1 for the teacher of the same seed: (return - random) / (teacher - random), on
test episodes that neither training nor validation plays. Geometric means are over max(score, 0.01). From 5 seeds on, 95 %
stratified bootstrap intervals and the interquartile mean (IQM) over seeds and environments; below that the seeds themselves."""

POLICY_DISTILLATION = Page(FOLDER, Path("docs/results/policy-distillation.md"), HEAD, SECTIONS)

STYLE = (
    "svg{background:#fff;font-family:sans-serif}text{font-size:11px;fill:#5d646e}.tick,.axis{fill:#8b929c}"
    ".label{font-weight:600}path{fill:none}.grid{stroke:#eceae5}.run{stroke-width:1;opacity:.4}.mean{stroke-width:2.2}"
    ".c-student{stroke:#0b65a8}.c-teacher{stroke:#b4532a}.f-student{fill:#0b65a8}.f-teacher{fill:#b4532a}"
)
