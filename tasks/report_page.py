"""The report's page: results to one self-contained HTML text. Pure: the same bytes for the same results.

Everything is inline (style, SVG), nothing is fetched. Colours follow roles, from a palette that colour-blind
readers can tell apart (blue, copper, green, grey): lines are labelled where they end, so that none needs a legend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from stillhouse.evaluation.statistics import SEEDS_FOR_INTERVALS, Estimate
from tasks import charts
from tasks.results import (
    Interference,
    MetaSummary,
    Results,
    Run,
    StudentSummary,
    Summary,
    TransferRow,
    experience,
    interference,
)

METHODS = {"offline": "offline", "on_policy": "on-policy", "online": "online"}
WAY_COLOURS = ("student", "teacher", "green", "violet", "gold", "rose", "sky")
_FEW = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


def render(results: Results, summary: Summary) -> str:
    """The whole page."""
    sections = [_students_section(results, summary, name) for name in summary.students]
    body = "".join(
        [
            _header(results, summary),
            *sections,
            _joint_section(results, summary),
            _teachers_section(results),
            _transfer_section(results, summary),
            _meta_section(results, summary),
            _method_section(results),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(results.title)} · {escape(results.suite)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


# --- numbers and words ------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    word = _FEW[number] if number < len(_FEW) else f"{number:,}"
    return f"{word} {noun}{'' if number == 1 else 's'}"


def _spread(value: Estimate, form: object = None) -> str:
    """What stands under a number: its points below 5 seeds, its interval from there on."""
    write = form if callable(form) else charts.number
    if value.interval is not None:
        return f"{write(value.interval[0])} to {write(value.interval[1])}"
    return " · ".join(str(write(point)) for point in value.points) if len(value.points) > 1 else ""


def _cell(value: Estimate | None, form: object = None, strong: bool = False, missing: str = "–") -> str:
    if value is None:
        return f'<td class="num">{missing}</td>'
    write = form if callable(form) else charts.number
    text = f"<b>{write(value.value)}</b>" if strong else str(write(value.value))
    return f'<td class="num">{text}<span class="spread">{_spread(value, write)}</span></td>'


def _section(title: str, lead: str, content: str, anchor: str) -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{escape(anchor)}">\n<h2>{title}</h2>\n{lead}\n{content}\n</section>\n'


def _table(head: Sequence[str], rows: Sequence[str], caption: str, left: int = 1) -> str:
    cells = "".join(
        f'<th scope="col"{"" if i < left else " class=num"}>{name}</th>' for i, name in enumerate(head)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{caption}</p>'
    )


# --- sections ---------------------------------------------------------------------------------------------------


def _header(results: Results, summary: Summary) -> str:
    facts = [
        f"suite <b>{escape(results.suite)}</b>",
        f"{_count(len(results.teachers), 'teacher')}",
        f"{_count(len(summary.students), 'student')}",
        f"{_count(len(summary.transfer), 'transfer target')}",
        *([_count(len(summary.meta), "meta-learner")] if summary.meta else []),
        f"seed{'s' if len(results.seeds) > 1 else ''} {', '.join(str(seed) for seed in results.seeds)}",
    ]
    parts = [
        f'<header>\n<p class="kicker">{escape(results.title)}</p>\n',
        f"<h1>{_headline(summary)}</h1>\n",
        f'<p class="facts">{" <i>·</i> ".join(facts)}</p>\n',
    ]
    return "".join(parts) + "</header>\n"


def _headline(summary: Summary) -> str:
    if not summary.students:
        return "Teachers, before any student" if summary.joint or not summary.meta else "Learning to learn"
    name, student = max(
        summary.students.items(),
        key=lambda item: item[1].overall.geometric_mean.value if item[1].overall.geometric_mean else -1.0,
    )
    teachers = _count(len(student.rows), "teacher")
    size = f"{student.parameters:,} parameters"
    share = student.compression
    smaller = (
        f", {share:.0f} times fewer than {'they have' if len(student.rows) > 1 else 'it has'}"
        if share >= 2
        else ""
    )
    if student.overall.geometric_mean is None:
        return f"{teachers.capitalize()}, one network of {size}{smaller}"
    kept = student.overall.geometric_mean.value
    missing = len(student.overall.undefined)
    where = (
        f" on the {len(student.rows) - missing} of {len(student.rows)} environments where they gained"
        if missing
        else ""
    )
    several = f"The best of {_count(len(summary.students), 'student')}, {escape(name)}, keeps"
    who = several if len(summary.students) > 1 else "It keeps"
    return (
        f"{teachers.capitalize()}, one network of {size}{smaller}. "
        f"<em>{who} {100 * kept:.0f} % of what they gained over random play{where}.</em>"
    )


def _tile(value: str, label: str, note: str) -> str:
    return f'<div class="tile"><p class="value">{value}</p><p class="what">{label}</p><p class="note">{note}</p></div>'


def _tiles(student: StudentSummary, seeds: int) -> str:
    overall = student.overall
    tiles = []
    if overall.geometric_mean is not None:
        spread = _spread(overall.geometric_mean, charts.score)
        kind = "95 % interval" if overall.geometric_mean.interval else "each seed"
        tiles.append(
            _tile(
                charts.score(overall.geometric_mean.value),
                "geometric mean of the normalised scores",
                f"{kind}: {spread}" if spread else "one seed",
            )
        )
    if overall.interquartile_mean is not None and overall.interquartile_mean.interval is not None:
        tiles.append(
            _tile(
                charts.score(overall.interquartile_mean.value),
                "interquartile mean (IQM)",
                f"95 % interval: {_spread(overall.interquartile_mean, charts.score)}",
            )
        )
    if student.better_than_teacher is not None:
        tiles.append(
            _tile(
                f"{student.better_than_teacher:.2f}",
                "probability of improvement",
                "over the teachers; ties one half",
            )
        )
    if overall.worst is not None:
        worst = overall.environments[overall.worst]
        unscored = "".join(f"; {escape(name)} has no score" for name in overall.undefined)
        tiles.append(_tile(charts.score(worst.value), "worst environment", escape(overall.worst) + unscored))
    tiles.append(
        _tile(
            f"{student.compression:.1f}×",
            "smaller than its teachers together",
            f"{student.parameters:,} of {student.teacher_parameters:,} parameters",
        )
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _scores(
    results: Results, network: StudentSummary, kind: str, beside: Mapping[str, StudentSummary]
) -> str:
    """The table of a network's scores, with a row for each other network of the same environments, and what to mind.

    Args:
        results: of the run.
        network: a student or a joint network.
        kind: "Student" or "Joint".
        beside: joint networks to compare with, by name.
    """
    seeds = len(results.seeds)
    estimates = [row.score for row in network.rows] + [
        other.overall.geometric_mean for other in beside.values()
    ]
    points = [point for score in estimates if score is not None for point in score.points]
    strip = charts.Strip(min([0.0, *points]), max([1.15, *points]))
    shown = (
        "points are seeds" if seeds < SEEDS_FOR_INTERVALS else "bars are 95 % bootstrap intervals over seeds"
    )
    rows = [
        f'<tr><th scope="row">{escape(row.environment)}<span class="spread">'
        f"{escape(results.ids[row.environment])}</span></th>"
        + _cell(row.random)
        + _cell(row.teacher)
        + _cell(row.student)
        + _cell(row.score, charts.score, strong=True, missing="undefined")
        + strip.cell(row.score)
        + f'<td class="num">{row.teacher_parameters:,}</td></tr>'
        for row in network.rows
    ]
    rows.append(
        '<tr class="total"><th scope="row">all<span class="spread">geometric mean</span></th>'
        "<td></td><td></td><td></td>"
        + _cell(network.overall.geometric_mean, charts.score, strong=True)
        + strip.cell(network.overall.geometric_mean)
        + f'<td class="num">{network.teacher_parameters:,}<span class="spread">{kind.lower()} '
        f"{network.parameters:,}</span></td></tr>"
    )
    rows += [
        f'<tr><th scope="row">joint<span class="spread">{escape(name)}, without teachers</span></th>'
        "<td></td><td></td><td></td>"
        + _cell(other.overall.geometric_mean, charts.score, strong=True)
        + strip.cell(other.overall.geometric_mean)
        + f'<td class="num"><span class="spread">joint {other.parameters:,}</span></td></tr>'
        for name, other in beside.items()
    ]
    episodes = next(iter(results.evaluations[network.rows[0].environment].values())).get("episodes", "?")
    table = _table(
        ["Environment", "Random", "Teacher", kind, "Score", strip.head(), "Teacher’s parameters"],
        rows,
        f"Mean returns over {episodes} greedy test episodes per seed; {shown}. The score is ({kind.lower()} − random) / "
        "(teacher − random): the grey tick is random play, the copper one the teacher.",
    )
    notes = [
        f"On <b>{escape(environment)}</b> the teacher is no better than random play, so no score is defined there; it "
        "enters no aggregate."
        for environment in network.overall.undefined
    ]
    notes += [
        f"On <b>{escape(row.environment)}</b> {charts.percent(row.capped_share)} of the {kind.lower()}’s episodes were ended "
        "by the cap of 10,000 steps."
        for row in network.rows
        if row.capped_share > 0
    ]
    return table + "".join(f'<p class="note warn">{note}</p>' for note in notes)


def _students_section(results: Results, summary: Summary, name: str) -> str:
    student = summary.students[name]
    block, settings = results.made_by(name)
    names = [row.environment for row in student.rows]
    beside = {
        other: found
        for other, found in summary.joint.items()
        if [row.environment for row in found.rows] == names
    }
    title = "The student" if len(results.students) == 1 else f"Student <code>{escape(name)}</code>"
    sources = ", ".join(map(escape, names))
    if block == "aggregate":
        made = _averaged(results, name)
    elif block == "train_multi_task":
        made = f", the policy that {escape(str(settings['method']).capitalize())} distilled from its own of {sources}"
    else:
        loss = escape(str(settings.get("loss", "")).upper())
        updates = results.students[name][results.seeds[0]]["updates"]
        made = f", distilled {METHODS[settings['method']]}" + (f" by {loss}" if loss else "")
        made += f" in {charts.short(updates)} updates from {sources}"
    lead = f"<code>{escape(name)}</code>{made}. {_experience(results, name)}"
    content = (
        _tiles(student, len(results.seeds))
        + _scores(results, student, "Student", beside)
        + _epsilon(student, results)
        + (_online(results, name, student) if settings.get("method") == "online" else "")
        + _agreement(results, name, student)
        + "<h3>Size</h3>"
        + _sizes(student, results)
    )
    return _section(title, lead, content, f"student-{name}")


def _averaged(results: Results, name: str) -> str:
    """Whose weights an aggregate is the average of; where that differs by seed, each seed's."""
    settings = results.settings["aggregate"][name]
    taken = {seed: run["taken"] for seed, run in results.students[name].items()}
    method = str(settings["method"]).replace("_", " ") + (", units aligned" if settings["align"] else "")
    if len({tuple(sorted(members)) for members in taken.values()}) == 1:
        return f", the average ({method}) of {', '.join(escape(member) for member in sorted(taken[results.seeds[0]]))}"
    each = "; ".join(f"seed {seed}: {', '.join(map(escape, members))}" for seed, members in taken.items())
    return (
        f", an average ({method}) of {', '.join(map(escape, settings['members']))}, of which it took, {each}"
    )


def _joint_section(results: Results, summary: Summary) -> str:
    if not summary.joint:
        return ""
    parts = []
    for name, network in summary.joint.items():
        names = ", ".join(escape(row.environment) for row in network.rows)
        lead = f"<code>{escape(name)}</code>, one network of {network.parameters:,} parameters for {names}. "
        parts.append(
            f'<h3>{escape(name)}</h3><p class="lead small">{lead}{_experience(results, name, joint=True)}</p>'
            + _diverged(results, name)
            + _scores(results, network, "Joint", {})
        )
    parts += [_interference(found) for found in interference(results, summary) if len(found.networks) > 1]
    lead = "One network that learns all its environments at once by itself, without teachers."
    return _section("Trained jointly", lead, "".join(parts), "joint")


def _diverged(results: Results, name: str) -> str:
    """Environments that the training of a joint network went on without."""
    found = [
        f"{environment} after {env_steps:,} env steps of its own (seed {seed})"
        for seed, run in results.joint[name].items()
        for environment, env_steps in run.get("diverged", {}).items()
    ]
    if not found:
        return ""
    said = "; ".join(map(escape, found))
    return f'<p class="note warn">Left out, for its loss was not finite: {said}.</p>'


def _interference(found: Interference) -> str:
    """Environments by environments: what each scores where it was learnt together with the other."""
    body = []
    for row in found.environments:
        cells = []
        for column in found.environments:
            score = found.scores.get((row, column))
            cells.append('<td class="num">–</td>' if score is None else _ratio_cell(score.value))
        body.append(f'<tr><th scope="row">{escape(row)}</th>{"".join(cells)}</tr>')
    table = _table(
        ["Score of", *(f"with {escape(name)}" for name in found.environments)],
        body,
        "Normalised score of the environment of each row where one network learnt it together with that of the column; the expert, "
        "which learns it alone, is 1. Below 1: the two interfere, or the network does worse than the expert for another reason.",
    )
    return f"<h3>Two at a time</h3><article>{table}</article>"


def _experience(results: Results, name: str, joint: bool = False) -> str:
    block, settings = ("train_multi_task", {}) if joint else results.made_by(name)
    method = settings["method"] if block == "distill_student" else block
    what = {
        "offline": ", the teachers’ training and the play collected from them included",
        "on_policy": ", the teachers’ training and its own acting included",
        "online": " of its teachers’ training; what they played for it comes on top",
        "aggregate": ", of all members together, the teachers’ training and the play collected from them included",
        "train_multi_task": "",
    }[method]
    return f"Experience behind it: {charts.short(experience(results, name, joint))} env steps{what}."


def _epsilon(student: StudentSummary, results: Results) -> str:
    run = next(iter(results.evaluations[student.rows[0].environment].values()))
    rows = [
        f'<tr><th scope="row">{escape(row.environment)}</th>{_cell(row.score, charts.score)}{_cell(row.epsilon_score, charts.score)}'
        f"{_cell(row.agreement, charts.percent)}</tr>"
        for row in student.rows
    ]
    table = _table(
        ["Environment", "Score, greedy", f"Score, ε {run.get('epsilon', 0.05):g}", "Agreement"],
        rows,
        "The same scores where student and teacher take a random action now and then; agreement at the end.",
    )
    return f"<details><summary>With a little noise</summary>{table}</details>"


def _agreement(results: Results, name: str, student: StudentSummary) -> str:
    if any(row.agreement is None for row in student.rows):
        return ""
    curves = [results.students[name][seed]["curve"] for seed in results.seeds]
    unit = "updates" if "updates" in curves[0] else "env_steps"
    runs = {
        row.environment: [(curve[unit], curve[f"agreement_{row.environment}"]) for curve in curves]
        for row in student.rows
    }
    # One scale for all, so that the charts can be compared.
    values = [value for pairs in runs.values() for _, y in pairs for value in y if math.isfinite(value)]
    low = math.floor(10 * min(values, default=0.9)) / 10
    pictures = [
        charts.chart(
            [charts.Line(_end(row.agreement), "student", runs[row.environment])],
            escape(row.environment),
            unit.replace("_", " "),
            y_range=(min(low, 0.9), 1.0),
            percent=True,
        )
        for row in student.rows
    ]
    return (
        "<h3>Agreement while distilling</h3>"
        '<p class="lead small">How often the student’s best action is the teacher’s, on held-out episodes.</p>'
        f'<div class="charts">{"".join(pictures)}</div>'
    )


def _online(results: Results, name: str, student: StudentSummary) -> str:
    """Returns of teacher and student while both learn, a chart for each environment."""
    curves = [results.students[name][seed]["curve"] for seed in results.seeds]
    pictures = [
        charts.chart(
            [
                charts.Line(
                    who, who, [(curve["env_steps"], curve[f"{who}_{row.environment}"]) for curve in curves]
                )
                for who in ("teacher", "student")
            ],
            escape(row.environment),
            "env steps",
            [("random", row.random.value)],
        )
        for row in student.rows
    ]
    return (
        "<h3>Teachers and student while both learn</h3>"
        '<p class="lead small">Greedy returns on validation episodes, after env steps of all its teachers together.</p>'
        f'<div class="charts">{"".join(pictures)}</div>'
    )


def _end(agreement: Estimate | None) -> str:
    return f"{100 * agreement.value:.0f} %" if agreement else ""


def _sizes(student: StudentSummary, results: Results) -> str:
    total = student.teacher_parameters
    shades = len(student.rows)
    x, segments = 0.0, []
    for i, row in enumerate(student.rows):
        share = 100 * row.teacher_parameters / total
        opacity = 1 - 0.55 * i / max(1, shades)
        segments.append(
            f'<span class="segment" style="left:{x:.2f}%;width:{share:.2f}%;opacity:{opacity:.2f}"></span>'
        )
        x += share
    names = " · ".join(f"{escape(row.environment)} {row.teacher_parameters:,}" for row in student.rows)
    width = 100 * student.parameters / max(total, student.parameters)
    return (
        '<div class="bars">'
        f'<p>Teachers together</p><div class="bar">{"".join(segments)}</div><p class="num">{total:,}</p>'
        f'<p>Student</p><div class="bar"><span class="segment student" style="left:0;width:{width:.2f}%"></span></div>'
        f'<p class="num">{student.parameters:,}</p></div><p class="note">Parameters. {names}.</p>'
    )


def _teachers_section(results: Results) -> str:
    if not results.teachers:
        return ""
    pictures, rows = [], []
    for name, runs in results.teachers.items():
        random = float(np.mean([run["random"]["mean"] for run in results.evaluations[name].values()]))
        curves = [(run["curve"]["env_steps"], run["curve"]["mean_return"]) for run in runs.values()]
        pictures.append(
            charts.chart(
                [charts.Line("teacher", "teacher", curves)],
                escape(results.ids[name]),
                "env steps",
                [("random", random)],
            )
        )
        settings = results.settings["train_teacher"][name]
        algorithm = escape(str(settings.get("algorithm", "")).upper())
        if settings.get("algorithm") == "fine_tuned":
            algorithm = f"fine-tuned, {escape(settings['mode'])}" + (
                f", from {escape(source)}" if (source := settings["source"]) else ""
            )
        first = next(iter(runs.values()))
        episodes = [run.get("episodes", 0) for run in runs.values()]
        collected = next(iter(results.datasets[name].values())).get("transitions")
        rows.append(
            f'<tr><th scope="row">{escape(name)}<span class="spread">{escape(results.ids[name])}</span></th>'
            f'<td>{algorithm}</td><td class="num">{first["env_steps"]:,}</td>'
            f'<td class="num">{charts.short(float(np.mean(episodes))) if all(episodes) else "–"}</td>'
            f'<td class="num">{f"{collected:,}" if collected else "–"}</td>'
            f'<td class="num">{first["parameters"]:,}</td></tr>'
        )
    table = _table(
        ["Environment", "Algorithm", "Env steps", "Episodes", "Transitions collected", "Parameters"],
        rows,
        "What each teacher cost, per seed: its training, and the play collected from it for the student.",
        left=2,
    )
    lead = "Mean return of recent training episodes, exploration included. Thin lines are seeds, the bold one their mean."
    if len(results.seeds) == 1:
        lead = "Mean return of recent training episodes, exploration included."
    return _section("The teachers", lead, f'<div class="charts">{"".join(pictures)}</div>{table}', "teachers")


def _transfer_section(results: Results, summary: Summary) -> str:
    if not summary.transfer:
        return ""
    cards = []
    for target, rows in summary.transfer.items():
        settings = results.settings["fine_tune"][target]
        colours = _way_colours(list(results.transfer[target]))
        lines = []
        for way, runs in results.transfer[target].items():
            curves = [(run["curve"]["env_steps"], run["curve"]["mean_return"]) for run in runs.values()]
            lines.append(charts.Line(way, colours[way], curves))
        random = float(
            np.mean(
                [run["random_return"] for runs in results.transfer[target].values() for run in runs.values()]
            )
        )
        chart = charts.chart(
            lines,
            "Return of greedy play on the target",
            "env steps",
            [("random", random)],
            size=(900, 280 + 14 * max(0, len(lines) - 10)),
        )
        sources = ", ".join(f"<code>{escape(entry)}</code>" for entry in settings["sources"])
        cards.append(
            f'<article><h3>{escape(target)} <span class="id">{escape(results.ids[target])}</span></h3>'
            f'<p class="lead small">From {sources}</p>'
            f"{chart}{_transfer_table(rows, colours)}{_tensors(results.transfer[target])}"
            "</article>"
        )
    lead = (
        "What was learnt before, moved to environments it was not learnt in, against the same network from scratch with the same "
        "budget of env steps. The sources’ own training and collection (above) come on top."
    )
    content = f'<div class="cards">{_heat_map(summary)}{"".join(cards)}</div>'
    return _section("Transfer", lead, content, "transfer")


def _meta_section(results: Results, summary: Summary) -> str:
    if not summary.meta:
        return ""
    cards = []
    for name, found in summary.meta.items():
        settings = results.settings["meta_train"][name]
        title = f"{_MEASURES[found.measure]} on {'unseen' if found.unseen else 'these'} tasks"
        said = "unseen tasks" if found.unseen else "tasks, all that the family has: training saw them too,"
        lines = _adaptation(found, len(results.seeds))
        chart = charts.chart(lines, title, found.unit, y_range=_height(found, lines), size=(900, 280))
        family = settings.get("family") or settings.get("optimisee") or {}
        name_of = family.get("family") or family.get("name") or family.get("kind") or ""
        kind = escape(str(name_of).replace("_", " "))
        cards.append(
            f'<article><h3>{escape(name)} <span class="id">{escape(str(settings["method"]))}</span></h3>'
            f'<p class="lead small">{kind.capitalize()}{": " if kind else ""}{found.tasks:,} {said} for each seed.</p>'
            f"{chart}{_adaptation_table(found)}</article>"
        )
    lead = "What was learnt on a family of tasks, adapted to tasks of it: to such as training never saw, where it has any."
    return _section("Meta-learning", lead, f'<div class="cards">{"".join(cards)}</div>', "meta-learning")


_MEASURES = {"mse": "Mean squared error", "loss": "Loss", "return": "Return"}


def _adaptation(found: MetaSummary, seeds: int) -> list[charts.Line]:
    """A line for the method, and for each of what it is compared with."""
    colours = dict(zip(found.arms, ("student", *WAY_COLOURS[1:], *["grey"] * len(found.arms)), strict=False))
    return [
        charts.Line(
            arm,
            colours[arm],
            [(found.steps, [value.points[i] for value in values]) for i in range(seeds)],
        )
        for arm, values in found.arms.items()
    ]


def _height(found: MetaSummary, lines: list[charts.Line]) -> tuple[float, float] | None:
    """What is shown of errors: up to twice the largest before adaptation, so that what diverges leaves room for the others."""
    if found.measure == "return":
        return None
    top = 2 * max(values[0].value for values in found.arms.values())
    values = [value for line in lines for _, y in line.runs for value in y if math.isfinite(value)]
    return (0.0, top) if values and max(values) > top else None


def _adaptation_table(found: MetaSummary) -> str:
    # At most eight columns: the first, the last, and what lies evenly between them.
    shown = sorted({round(i) for i in np.linspace(0, len(found.steps) - 1, min(8, len(found.steps)))})
    rows = [
        f'<tr><th scope="row">{escape(arm)}</th>{"".join(_cell(values[i], strong=not row) for i in shown)}</tr>'
        for row, (arm, values) in enumerate(found.arms.items())
    ]
    steps = [found.steps[i] for i in shown]
    better = "larger" if found.measure == "return" else "smaller"
    return _table(
        ["After", *(f"{step} {found.unit.removesuffix('s' * (step == 1))}" for step in steps)],
        rows,
        f"{_MEASURES[found.measure]}, mean over the tasks; {better} is better. The first row is the method, the others are what it is "
        "compared with on the same tasks.",
    )


def _way_colours(ways: list[str]) -> dict[str, str]:
    """A colour for each way; the seven return where there are more."""
    others = [way for way in ways if way != "scratch"]
    return {way: WAY_COLOURS[i % len(WAY_COLOURS)] for i, way in enumerate(others)} | {"scratch": "grey"}


def _heat_map(summary: Summary) -> str:
    """Every way and source on every target: the transfer score, warm where it harms, cold where it helps."""
    found = {
        (row.mode, target): row
        for target, rows in summary.transfer.items()
        for row in rows
        if row.mode != "scratch" and row.score is not None
    }
    ways, targets = sorted({way for way, _ in found}), list(summary.transfer)
    if len(found) < 2:
        return ""
    body = []
    for way in ways:
        cells = "".join(_heat_cell(found.get((way, target))) for target in targets)
        body.append(f'<tr><th scope="row">{escape(way)}</th>{cells}</tr>')
    table = _table(
        ["Way and source", *map(escape, targets)],
        body,
        "Transfer score: the area under the curve above random play, over scratch’s; below 1, what was carried over did harm. "
        "Δ: scratch is not above random play there, so areas are subtracted.",
    )
    return f"<article>{table}</article>"


def _heat_cell(row: TransferRow | None) -> str:
    if row is None or row.score is None:
        return '<td class="num">–</td>'
    value = row.score.value
    return _ratio_cell(value) if row.score_kind == "ratio" else _heat(f"Δ {charts.signed(value)}", value, 0.0)


def _ratio_cell(value: float) -> str:
    """A ratio: warm below 1, cold above it."""
    # A ratio of 2 and one of 1/2 are as far from 1.
    return _heat(charts.score(value), value, min(1.0, abs(math.log2(max(value, 0.25)))))


def _heat(shown: str, value: float, strength: float) -> str:
    colour = "student" if value > 1 else "teacher"
    return (
        f'<td class="num heat" style="background:color-mix(in srgb,var(--{colour}) {round(55 * strength)}%,transparent)">'
        f"{shown}</td>"
    )


def _transfer_table(rows: list[TransferRow], colours: Mapping[str, str]) -> str:
    body = []
    kinds = {row.score_kind for row in rows if row.score is not None and row.mode != "scratch"}
    for row in rows:
        scratch = row.mode == "scratch"
        if scratch or not row.steps_to_scratch:
            steps = '<td class="num">–</td>'
        else:
            steps = _steps_cell(row.steps_to_scratch)
        head = f'<th scope="row"><span class="f-{colours[row.mode]}">{escape(row.mode)}</span></th>'
        dash = '<td class="num">–</td>'
        body.append(
            f"<tr>{head}"
            + (dash if scratch else _cell(row.jumpstart, charts.signed))
            + _cell(row.area)
            + (
                dash
                if scratch
                else _cell(row.score, charts.score if row.score_kind == "ratio" else charts.signed)
            )
            + steps
            + _cell(row.final)
            + (_cell(row.retention, charts.score) if any(other.retention for other in rows) else "")
            + "</tr>"
        )
    measure = "Area ratio" if kinds <= {"ratio"} else "Area difference"
    return _table(
        ["", "Jumpstart", "Area", measure, "Env steps to match", "Final"]
        + (["Retention"] if any(row.retention for row in rows) else []),
        body,
        "Area: mean return over the budget. To match: until scratch’s final return, median over seeds. "
        + (
            "Ratio: transfer’s area above random play, over scratch’s."
            if kinds <= {"ratio"}
            else "Scratch is not above random play, so areas are subtracted."
        )
        + (
            " Retention: the score left in the source’s environments, before is 1."
            if any(row.retention for row in rows)
            else ""
        ),
    )


def _steps_cell(steps: list[float]) -> str:
    """The median over seeds, where "never" counts as longer than any number; and what each seed did."""

    def write(value: float) -> str:
        return charts.short(value) if math.isfinite(value) else "never"

    middle = float(np.median(steps))
    reached = sum(math.isfinite(value) for value in steps)
    few = " · ".join(write(value) for value in steps) if len(steps) > 1 else ""
    spread = few if len(steps) < SEEDS_FOR_INTERVALS else f"{reached} of {len(steps)} seeds"
    return f'<td class="num">{write(middle)}<span class="spread">{spread}</span></td>'


def _tensors(modes: dict[str, dict[int, Run]]) -> str:
    items = []
    for mode, runs in modes.items():
        tensors = next(iter(runs.values())).get("tensors")
        if mode == "scratch" or not tensors:
            continue
        kinds = [kind for kind in tensors if tensors[kind]]
        counts = " · ".join(f"{len(tensors[kind])} {kind}" for kind in kinds)
        lists = "".join(
            f"<dt>{kind}</dt><dd>{' '.join(f'<code>{escape(name)}</code>' for name in tensors[kind])}</dd>"
            for kind in kinds
        )
        items.append(
            f"<details><summary>Tensors, {escape(mode)}: {counts}</summary><dl>{lists}</dl></details>"
        )
    return "".join(items)


def _method_section(results: Results) -> str:
    versions = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in sorted(results.environment.items())
    )
    hashes = "".join(
        f"<tr><td><code>{escape(path)}</code></td><td><code>{digest[:16]}</code></td></tr>"
        for path, digest in sorted(results.inputs.items())
    )
    content = (
        f'<dl class="versions">{versions}</dl>'
        f"<details><summary>{len(results.inputs)} input files and their SHA-256 (first 16 digits)</summary>"
        f'<div class="scroll"><table class="hashes"><tbody>{hashes}</tbody></table></div></details>'
        '<p class="note">Teachers are judged at their last checkpoint, students at the one with the best agreement on held-out '
        "episodes, both on test seeds that neither training nor validation uses; transfer curves are on validation seeds. Below 5 seeds every seed is shown as it is; from 5 on, 95 % stratified bootstrap intervals. Geometric means "
        "are over max(score, 0.01).</p>"
    )
    return _section("How this was made", "", content, "method")


STYLE = """
:root{--paper:#fbfaf8;--card:#fff;--ink:#1d2127;--soft:#5d646e;--faint:#8b929c;--line:#e6e3dd;--grid:#eceae5;
--student:#0b65a8;--teacher:#b4532a;--green:#0b7d63;--grey:#6d737c;--wash:#f3f0ea;
--violet:#7346b0;--gold:#94700a;--rose:#b83270;--sky:#1a8fb5}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1a1e23;--ink:#e8e6e1;--soft:#a6adb7;--faint:#7c848f;
--line:#2b3138;--grid:#252a31;--student:#5fb0ea;--teacher:#e59468;--green:#4cc3a2;--grey:#9aa2ac;--wash:#20252b;
--violet:#b494ea;--gold:#d9b44a;--rose:#ee8ab5;--sky:#6fd0ee}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Inter,Roboto,"Helvetica Neue",Arial,sans-serif;font-feature-settings:"kern","liga"}
main{max-width:1080px;margin:0 auto;padding:64px 28px 96px}
header{margin-bottom:56px}
.kicker{margin:0 0 14px;color:var(--teacher);font-size:13px;font-weight:600;letter-spacing:.02em}
h1{margin:0 0 18px;font-size:clamp(26px,4vw,40px);line-height:1.16;letter-spacing:-.022em;font-weight:680;max-width:24em;
text-wrap:balance}
h1 em{font-style:normal;color:var(--student)}
.facts{margin:0;color:var(--soft);font-size:15px}.facts i{color:var(--faint);font-style:normal;margin:0 4px}
section{margin-top:64px}
h2{margin:0 0 6px;font-size:24px;letter-spacing:-.014em;line-height:1.25;font-weight:660}
h3{margin:40px 0 2px;font-size:17px;font-weight:640;letter-spacing:-.006em}
h3 .id{color:var(--faint);font-weight:400;font-size:14px;margin-left:6px}
.lead{margin:0 0 24px;color:var(--soft);max-width:46em}.small{font-size:14.5px;margin-bottom:14px}
.note{margin:10px 0 0;color:var(--soft);font-size:13.5px;max-width:56em}
.warn{border-left:3px solid var(--teacher);padding-left:12px}
code{font:.9em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:1px;margin:0 0 32px;overflow:hidden;
background:var(--line);border:1px solid var(--line);border-radius:12px}
.tile{background:var(--card);padding:20px 22px}
.tile p{margin:0}.value{font-size:34px;line-height:1.1;letter-spacing:-.02em;font-weight:640;
font-variant-numeric:tabular-nums}
.what{margin-top:6px!important;font-size:14px}.tile .note{font-size:13px;margin-top:2px;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th,td{padding:11px 14px 11px 0;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{border-top:0;padding-bottom:8px;color:var(--soft);font-size:13px;font-weight:500;vertical-align:bottom}
tbody th{font-weight:560;white-space:nowrap}
.num{text-align:right}td.num{min-width:76px}
.spread{display:block;color:var(--faint);font-size:12.5px;font-weight:400}
.total>*{border-top:1px solid var(--ink)}
.strip{width:210px;padding-left:14px;vertical-align:middle}.strip svg{display:block;width:190px;height:26px;
margin-left:auto}
.ends{display:block;width:190px;height:14px;margin-left:auto;overflow:visible}
thead .ends text{font-size:12px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:22px 26px;margin:0 0 28px}
.cards{display:grid;gap:22px}
article{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;min-width:0}
article h3{margin-top:0}article table{font-size:13.5px}article .note{font-size:12.5px}
article th,article td{padding:8px 10px 8px 0}article .spread{font-size:11.5px}
article thead th{font-size:12px}
.chart{margin:0}figcaption{font-size:14px;font-weight:560;margin-bottom:4px}
.chart svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit;font-size:11px;fill:var(--soft)}
svg .tick{fill:var(--faint);font-variant-numeric:tabular-nums}svg .axis{fill:var(--faint)}
svg .label{font-size:11.5px;font-weight:600}svg .rule-label{fill:var(--faint);font-weight:400}
svg path{fill:none}.grid{stroke:var(--grid)}.rule{stroke:var(--faint);stroke-dasharray:3 4}
.run{stroke-width:1;opacity:.4}.mean{stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.c-student{stroke:var(--student)}.c-teacher{stroke:var(--teacher)}.c-green{stroke:var(--green)}.c-grey{stroke:var(--grey)}
.c-violet{stroke:var(--violet)}.c-gold{stroke:var(--gold)}.c-rose{stroke:var(--rose)}.c-sky{stroke:var(--sky)}
svg .f-violet{fill:var(--violet)}svg .f-gold{fill:var(--gold)}svg .f-rose{fill:var(--rose)}svg .f-sky{fill:var(--sky)}
.f-violet{color:var(--violet)}.f-gold{color:var(--gold)}.f-rose{color:var(--rose)}.f-sky{color:var(--sky)}
.f-teacher{color:var(--teacher)}.heat{border-left:1px solid var(--paper);padding-right:10px}
svg .f-student{fill:var(--student)}svg .f-teacher{fill:var(--teacher)}svg .f-green{fill:var(--green)}
svg .f-grey{fill:var(--grey)}
.f-student{color:var(--student)}.f-green{color:var(--green)}.f-grey{color:var(--grey)}
.track{stroke:var(--line);stroke-width:2}.mark{stroke:var(--grey);stroke-width:1.5}
.mark.teacher{stroke:var(--teacher);stroke-width:2}
.interval{stroke:var(--student);stroke-width:6;opacity:.35;stroke-linecap:round}
.dot{fill:var(--student);fill-opacity:.78;stroke:var(--paper)}
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:10px 16px;align-items:center;font-size:14.5px;margin-top:12px}
.bars p{margin:0;font-variant-numeric:tabular-nums}
.bar{position:relative;height:18px;border-radius:3px;background:var(--wash);overflow:hidden}
.segment{position:absolute;top:0;bottom:0;background:var(--teacher);border-right:1px solid var(--paper)}
.segment.student{background:var(--student);min-width:2px}
details{margin-top:14px}summary{cursor:pointer;color:var(--soft);font-size:14px}
summary:hover{color:var(--ink)}summary:focus-visible{outline:2px solid var(--student);outline-offset:3px}
details dl{margin:10px 0 0;font-size:13px}details dt{color:var(--soft);margin-top:8px}details dd{margin:0;line-height:1.9}
dd code{background:var(--wash);border-radius:4px;padding:2px 6px;white-space:nowrap}
.versions{display:flex;flex-wrap:wrap;gap:12px 32px;margin:14px 0 6px}.versions dt{color:var(--soft);font-size:13px}
.versions dd{margin:0;font-variant-numeric:tabular-nums}
.hashes{font-size:13px;margin-top:10px}.hashes td{padding:5px 14px 5px 0}
@media (max-width:640px){main{padding:36px 18px 64px}section{margin-top:48px}article{padding:18px}}
@media print{body{background:#fff}main{max-width:none;padding:0}article{break-inside:avoid}}
"""
