"""The study of "Distilling Policy Distillation" (Czarnecki et al. 2019) on random grid worlds, with tables.

    python -m benchmarks.tabular_distillation            # every part that has no result yet, then the page
    python -m benchmarks.tabular_distillation --part actions-100-unused
    python -m benchmarks.tabular_distillation --page     # the page and figure from the results alone

A result is kept per part, so that an interrupted run goes on where it was. Learning rates are chosen on worlds of their
own; results are of others.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import load, provenance, save
from stillhouse import seeding
from stillhouse.distillation.tabular import (
    VARIANTS,
    Condition,
    SamplingName,
    TabularStudents,
    q_learning,
    teacher_policy,
)
from stillhouse.envs.gridworld import GridWorlds, random_grid_worlds

NAME = "tabular_distillation"
PAGE = Path("docs/results/distilling-policy-distillation.md")
FIGURE = Path("docs/images/distilling-policy-distillation.svg")

GAMMA = 0.99
TEMPERATURE = 0.1
FLOOR = 0.01
STEPS = 20_000
TIMES = [0, *np.unique(np.geomspace(50, STEPS, 19).round().astype(int)).tolist()]
SAMPLINGS: tuple[SamplingName, ...] = ("student", "teacher", "uniform")
RATES = (0.1, 0.3, 1.0, 3.0)
# Among more actions every logit moves less, so that larger rates are tried too; a copy's gradient is smaller by their number.
ACTION_RATES = {
    (4, "unused"): RATES,
    (100, "unused"): (0.3, 1.0, 3.0, 10.0, 30.0),
    (1000, "unused"): (1.0, 3.0, 10.0, 30.0, 100.0),
    (100, "copies"): (0.1, 0.3, 1.0, 2.5, 7.5, 25.0, 75.0),
    (1000, "copies"): (0.3, 3.0, 25.0, 75.0, 250.0, 750.0),
}
CHOICE_SEED, TEST_SEED = 1, 2  # the worlds on which rates are chosen, and the worlds of the results
# Worlds: to choose rates on, to report.
WORLDS = (20, 100)
ACTION_WORLDS = {4: (20, 100), 100: (30, 60), 1000: (12, 24)}
ACTION_STEPS = {4: STEPS, 100: STEPS, 1000: STEPS // 2}  # a thousand actions take long

MAIN = [f"{teacher}-noise{noise}" for teacher in ("q-learning", "optimal") for noise in (0, 25)]
ACTIONS = [f"actions-{count}-{use}" for count, use in ACTION_RATES]


def make(
    teacher: str, noise: float, count: int, seed: int, copies: int = 1, use_copies: bool = False
) -> tuple[GridWorlds, np.ndarray, np.ndarray]:
    """Worlds, their teacher's policy [G, S, A] and its exact values [G, S]."""
    worlds = random_grid_worlds(count, seed)
    q_values = q_learning(worlds, GAMMA, seed) if teacher == "q-learning" else worlds.optimal_q_values(GAMMA)
    policy = teacher_policy(q_values, TEMPERATURE, FLOOR, noise, copies, use_copies)
    moves = policy.reshape(*policy.shape[:2], copies, 4).sum(axis=2)
    return worlds, policy, worlds.values(moves, GAMMA)


def run(
    worlds: GridWorlds,
    policy: np.ndarray,
    values: np.ndarray,
    conditions: list[Condition],
    steps: int = STEPS,
) -> np.ndarray:
    """Returns at TIMES up to ``steps``, [times, conditions, worlds]."""
    students = TabularStudents(worlds, policy, values, conditions, GAMMA, seed=0)
    results = []
    for step in range(steps + 1):
        if step in TIMES:
            results.append(students.returns())
        students.step()
    return np.array(results)


def shares(returns: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Mean return over the worlds, relative to the teacher's: [..., worlds] -> [...]."""
    mean: np.ndarray = returns.mean(axis=-1) / teacher.mean(axis=-1)
    return mean


def steps_to(level: float, curve: np.ndarray) -> float:
    """Env steps at which ``curve`` [times] first reaches ``level``, interpolated in log(steps); infinite: never."""
    reached = np.flatnonzero(curve >= level)
    if not len(reached):
        return float("inf")
    after = int(reached[0])
    if after <= 1:
        return float(TIMES[after])
    below, above = curve[after - 1], curve[after]
    low, high = np.log(TIMES[after - 1]), np.log(TIMES[after])
    return float(np.exp(low + (high - low) * (level - below) / (above - below)))


def resampled(returns: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Curves [1000, times] of resampled worlds; the same worlds for every condition, so that ratios are paired."""
    choice = seeding.generator(0, "bootstrap").integers(len(teacher), size=(1000, len(teacher)))
    return shares(returns[:, choice].swapaxes(0, 1), teacher[choice][:, None])


def summary(condition: Condition, returns: np.ndarray, teacher: np.ndarray) -> dict[str, Any]:
    """What is kept of one condition: its mean curve and steps to 95 and 99 %, with 95 % intervals over the worlds."""
    curves = resampled(returns, teacher)
    curve = shares(returns, teacher)
    low, high = np.quantile(curves, (0.025, 0.975), axis=0)
    result: dict[str, Any] = {
        "variant": condition.variant,
        "sampling": condition.sampling,
        "learning_rate": condition.learning_rate,
        "share": curve.round(4).tolist(),
        "share_low": low.round(4).tolist(),
        "share_high": high.round(4).tolist(),
    }
    for level in (0.95, 0.99):
        found = np.sort([steps_to(level, each) for each in curves])
        result[f"steps_to_{level:.0%}"] = [
            _plain(value) for value in (steps_to(level, curve), found[25], found[974])
        ]
    return result


def _plain(value: float) -> float | None:
    return round(value, 2) if np.isfinite(value) else None


def choose(
    rates: tuple[float, ...],
    cases: list[tuple[str, SamplingName]],
    setting: tuple[Any, ...],
    steps: int,
) -> list[Condition]:
    """The best rate of each variant and sampling on worlds of their own: the fewest steps to 95 %; where none gets there, the largest
    area under the share over log(steps)."""
    worlds, policy, values = setting
    tried = [
        Condition(variant, sampling, rate)  # type: ignore[arg-type]
        for (variant, sampling), rate in itertools.product(cases, rates)
    ]
    curves = shares(run(worlds, policy, values, tried, steps), values[:, worlds.start])  # [times, tried]
    areas = np.minimum(curves[1:], 1).mean(axis=0)
    order = [(steps_to(0.95, curves[:, row]), -areas[row]) for row in range(len(tried))]
    best = []
    for first in range(0, len(tried), len(rates)):
        best.append(tried[min(range(first, first + len(rates)), key=order.__getitem__)])
    return best


def measure(part: str) -> dict[str, Any]:
    """One part of the study."""
    if part in MAIN:
        teacher, noise = part.split("-noise")
        cases = list(itertools.product(VARIANTS, SAMPLINGS))
        rates, counts, steps, options = RATES, WORLDS, STEPS, {}
    else:
        _, actions, use = part.split("-")
        count = int(actions)
        teacher, noise = "optimal", "0"
        cases = [(variant, "student") for variant in VARIANTS]
        rates, counts, steps = ACTION_RATES[count, use], ACTION_WORLDS[count], ACTION_STEPS[count]
        options = {"copies": count // 4, "use_copies": use == "copies"}
    share = int(noise) / 100
    chosen = choose(rates, cases, make(teacher, share, counts[0], CHOICE_SEED, **options), steps)
    worlds, policy, values = make(teacher, share, counts[1], TEST_SEED, **options)
    target = values[:, worlds.start]
    returns = run(worlds, policy, values, chosen, steps)
    result: dict[str, Any] = {
        "worlds": counts[1],
        "worlds_to_choose_rates": counts[0],
        "teacher_return": round(float(target.mean()), 4),
        "uniform_return": round(float(returns[0, 0].mean()), 4),
        "optimal_return": round(float(worlds.optimal_q_values(GAMMA)[:, worlds.start].max(axis=1).mean()), 4),
        "rates": list(rates),
        "steps": steps,
        "conditions": [summary(each, returns[:, row], target) for row, each in enumerate(chosen)],
    }
    if part in ("q-learning-noise0", "optimal-noise0"):
        result["sampling"] = sampling(worlds, policy, values)
    return result


def sampling(worlds: GridWorlds, policy: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
    """Who acts, for the loss Hx(T||S) alone, at each learning rate: steps to a level and their ratios."""
    target = values[:, worlds.start]
    conditions = [Condition("cross_entropy", who, rate) for rate, who in itertools.product(RATES, SAMPLINGS)]
    returns = run(worlds, policy, values, conditions)
    results = [summary(each, returns[:, row], target) for row, each in enumerate(conditions)]
    for row in range(len(RATES)):
        student, teacher = (resampled(returns[:, 3 * row + who], target) for who in (0, 1))
        for level in (0.95, 0.99):
            pairs = [
                steps_to(level, by_teacher) / steps_to(level, by_student)
                for by_student, by_teacher in zip(student, teacher, strict=True)
            ]
            middle = steps_to(level, shares(returns[:, 3 * row + 1], target)) / steps_to(
                level, shares(returns[:, 3 * row], target)
            )
            found = np.sort(np.nan_to_num(pairs, nan=1.0, posinf=np.inf))
            results[3 * row][f"ratio_{level:.0%}"] = [
                _plain(each) for each in (middle, found[25], found[974])
            ]
    return results


NAMES = {
    "cross_entropy": "Hx(T‖S) alone",
    "entropy": "entropy regularised",
    "n_distill": "N-distill",
    "expected_entropy": "expected entropy regularised",
    "expected_kl": "expected KL regularised",
    "teacher_values": "teacher V reward",
}


def spread(values: list[float | None]) -> str:
    """Steps with their interval."""
    middle, low, high = ("never" if value is None else f"{value:,.0f}" for value in values)
    if middle == "never":
        return "not reached" if low == "never" else f"not reached (from {low})"
    return f"{middle} ({low} · {high})"


def main_table(result: dict[str, Any]) -> list[str]:
    """Variants by who acts."""
    found = {(each["variant"], each["sampling"]): each for each in result["conditions"]}
    lines = [
        "| variant | student acts | teacher acts | uniform play | return at the end |",
        "|---|---|---|---|---|",
    ]
    for variant, name in NAMES.items():
        cells = [spread(found[variant, sampling]["steps_to_95%"]) for sampling in SAMPLINGS]
        ends = " / ".join(f"{found[variant, sampling]['share'][-1]:.2f}" for sampling in SAMPLINGS)
        lines.append(f"| {name} | {' | '.join(cells)} | {ends} |")
    return lines


def sampling_table(results: dict[str, Any]) -> list[str]:
    """How much faster the student's own play teaches."""
    lines = [
        "| teacher | learning rate | student acts | teacher acts | uniform play | to 95 %: times faster | to 99 %: times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in ("q-learning-noise0", "optimal-noise0"):
        for row, rate in enumerate(RATES):
            three = results[part]["sampling"][3 * row : 3 * row + 3]
            cells = [spread(each["steps_to_95%"]) for each in three]
            ratios = [ratio(three[0][f"ratio_{level}"]) for level in ("95%", "99%")]
            lines.append(
                f"| {part.removesuffix('-noise0')} | {rate:g} | {' | '.join(cells)} | {' | '.join(ratios)} |"
            )
    return lines


def ratio(values: list[float | None]) -> str:
    """Times, with their interval."""
    middle, low, high = ("∞" if value is None else f"{value:.1f}" for value in values)
    return "not reached by either" if middle == "∞" else f"{middle} ({low} · {high})"


def actions_table(results: dict[str, Any]) -> list[str]:
    """Variants by number of actions."""
    columns = {
        "4": "actions-4-unused",
        "100: copies": "actions-100-copies",
        "1,000: copies": "actions-1000-copies",
        "100: 96 unused": "actions-100-unused",
        "1,000: 996 unused": "actions-1000-unused",
    }
    lines = [f"| variant | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for variant, name in NAMES.items():
        cells = []
        for part in columns.values():
            (found,) = (each for each in results[part]["conditions"] if each["variant"] == variant)
            cells.append(f"{spread(found['steps_to_95%'])}; {found['share'][-1]:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def verdicts(results: dict[str, Any]) -> list[str]:
    """What the tables say, one paragraph for each question, from their numbers."""

    def found(part: str, variant: str, sampling: str = "student") -> dict[str, Any]:
        return next(
            each
            for each in results[part]["conditions"]
            if (each["variant"], each["sampling"]) == (variant, sampling)
        )

    def times(level: str, part: str) -> str:
        ratios = [each[f"ratio_{level}"][0] for each in results[part]["sampling"] if f"ratio_{level}" in each]
        known = [each for each in ratios if each is not None]
        return f"{min(known):.1f} to {max(known):.1f}"

    def end(part: str, variant: str) -> str:
        return f"{found(part, variant)['share'][-1]:.2f}"

    def steps(part: str, variant: str) -> str:
        return spread(found(part, variant)["steps_to_95%"]).split(" (")[0]

    best = [found("q-learning-noise0", "cross_entropy", who)["steps_to_95%"][0] for who in SAMPLINGS[:2]]
    return [
        "**The student's own play teaches faster, by how much depends on the learning rate and the teacher.** To 95 % of the return it is "
        f"{times('95%', 'q-learning-noise0')} times faster than the teacher's with the Q-learning teacher and "
        f"{times('95%', 'optimal-noise0')} with the optimal one; to 99 %, {times('99%', 'q-learning-noise0')} and "
        f"{times('99%', 'optimal-noise0')}. The paper has about 3, to the full return; twice as fast is reached to 99 % at all rates but the "
        "largest with a Q-learning teacher, and to 95 % at the smallest only. A tabular student that may jump to the teacher's policy in one or two visits has little to "
        f"gain: at the best rate of each (3) both need about {best[0]:,.0f} to {best[1]:,.0f} steps.",
        "**Hx(S‖T) sharpens the teacher, KL(S‖T) copies it.** With a quarter of random actions in the optimal teacher, the expected entropy "
        f"regularised student ends at {end('optimal-noise25', 'expected_entropy')} of the teacher's return, better than what it learnt from; with "
        f"KL(S‖T) it ends at {end('optimal-noise25', 'expected_kl')}. That helps where the teacher's best action is its best knowledge, and "
        "does not where its probabilities say what it does not know: with the Q-learning teacher, part of whose states were "
        f"hardly visited, the sharpening form ends at {end('q-learning-noise0', 'expected_entropy')} and needs "
        f"{steps('q-learning-noise0', 'expected_entropy')} steps to 95 %, where KL(S‖T) needs {steps('q-learning-noise0', 'expected_kl')}.",
        "Forms with a pseudo-reward are meant for the student's own play. On the teacher's or a uniform policy's their policy gradient is that of "
        "another policy, and they are slower there by an order of magnitude, or fail; the loss alone is not.",
        "**Expectations stand many actions, samples do not.** Among copies, where a teacher is as easy to follow as before, the expected "
        f"entropy regularised form needs {steps('actions-4-unused', 'expected_entropy')} steps with 4 actions, "
        f"{steps('actions-100-copies', 'expected_entropy')} with 100 and {steps('actions-1000-copies', 'expected_entropy')} with 1,000, while the "
        f"entropy regularised form, its sampled twin, falls from {end('actions-4-unused', 'entropy')} of the teacher's return to "
        f"{end('actions-100-copies', 'entropy')} and {end('actions-1000-copies', 'entropy')}: as the paper says. Among unused actions every form "
        "with S in front is slower, because its gradient for the right action is proportional to the small probability that the student gives it: "
        f"{steps('actions-100-unused', 'expected_entropy')} steps to 95 % with 100 actions for expected entropy regularised, "
        f"{steps('actions-1000-unused', 'expected_entropy')} with 1,000. Hx(T‖S) has T in front and needs "
        f"{steps('actions-100-unused', 'cross_entropy')} and {steps('actions-1000-unused', 'cross_entropy')}.",
    ]


def page(results: dict[str, Any]) -> str:
    """``docs/results/distilling-policy-distillation.md``."""
    first, second = results["q-learning-noise0"], results["optimal-noise0"]
    returns = ", ".join(
        f"{part.replace('-noise', ' with ')} % noise {results[part]['teacher_return']:.2f}" for part in MAIN
    )
    lines = [
        "<!-- generated: python -m benchmarks.tabular_distillation --page -->",
        "# Distilling policy distillation, with tables",
        "",
        "The study of Czarnecki et al. 2019, *Distilling Policy Distillation*, <https://arxiv.org/abs/1902.02186>, on random grid "
        "worlds. Code: `stillhouse/distillation/tabular.py` (the updates), `stillhouse/envs/gridworld.py` (the worlds); results: "
        "`benchmarks/results/tabular_distillation.json`.",
        "",
        f"![returns over env steps](../images/{FIGURE.name})",
        "",
        "## The updates",
        "",
        "A student S with a softmax over logits per state is moved against `E_q[Σ_t -∇ log S(a_t) R_t + ∇ l_t]`, with "
        "`Hx(p‖q) = -E_p log q` and the teacher T. What each update is the gradient of is checked in float64 against finite "
        "differences of that objective, worked out exactly on small problems (`tests/stillhouse/distillation/test_tabular.py`); "
        "on-policy distill is checked to be the gradient of nothing (its Jacobian is not symmetric).",
        "",
        "| variant | loss l | pseudo-reward | the gradient of |",
        "|---|---|---|---|",
        "| Hx(T‖S) alone, teacher acts: *teacher distill* | Hx(T‖S) | 0 | E_T Σ Hx(T‖S) |",
        "| Hx(T‖S) alone, student acts: *on-policy distill* | Hx(T‖S) | 0 | **nothing** |",
        "| entropy regularised | 0 | log T(a_t) | E_S Σ Hx(S‖T), noisy |",
        "| N-distill | Hx(T‖S) | -Hx(T‖S) at t+1 | E_S Σ Hx(T‖S) |",
        "| expected entropy regularised | Hx(S‖T) | -Hx(S‖T) at t+1 | E_S Σ Hx(S‖T) |",
        "| expected KL regularised (not in the paper) | KL(S‖T) | -KL(S‖T) at t+1 | E_S Σ KL(S‖T) |",
        "| teacher V reward | 0 | r + γ V_T(s') - V_T(s) | minus the return |",
        "",
        "## Setup",
        "",
        f"{first['worlds']} worlds of 20x20 cells, the start in the middle; a cell is a wall with probability 0.2, a free one a goal with "
        "probability 0.01 (the paper's probabilities are not known; worlds whose goals cannot be reached are left out). A goal ends the "
        "episode with +10, every step ends it with probability 0.01, and a move is replaced by a random one with probability 0.1. "
        f"Returns are discounted by {GAMMA}, exact (a linear system for each world and student), and relative to the teacher's.",
        "",
        f"Teachers: T = 0.99 softmax(Q / {TEMPERATURE}) + {FLOOR} / |A|, so that **log T ≥ log({FLOOR} / |A|)**: -6.0, -9.2 and -11.5 for 4, "
        "100 and 1,000 actions. Q is that of Q-learning (30,000 steps, learning rate 0.1, epsilon from 1 to 0.1 over the first two thirds) "
        "or the optimal one (value iteration); with 25 % noise T is further mixed with a quarter of uniform actions. Mean returns: "
        f"{returns}; the best possible is {second['optimal_return']:.2f}, uniform play has {second['uniform_return']:.2f}.",
        "",
        "Students: one agent and one table of logits per world, updated at every step; a critic per state with one-step temporal "
        "differences (rate 0.2) in place of R_t, its advantage clipped to ±1; pseudo-returns undiscounted. The learning rate of every "
        f"variant and sampling is the one of {', '.join(f'{rate:g}' for rate in RATES)} that is first at 95 % on "
        f"{first['worlds_to_choose_rates']} other worlds. 'Steps to 95 %': env steps until the mean return over the worlds reaches 0.95 of the teachers' mean, of "
        f"{STEPS:,} played; in brackets 95 % bootstrap intervals over the worlds.",
        "",
        "## Who acts",
        "",
        "Hx(T‖S) alone, at equal learning rates.",
        "",
        *sampling_table(results),
        "",
        *verdicts(results)[:1],
        "",
        "## Variants",
        "",
        "Steps to 95 % of the teacher's return; 'at the end': share of it after "
        f"{STEPS:,} steps, student / teacher / uniform.",
        "",
    ]
    titles = {
        "q-learning-noise0": "Q-learning teacher",
        "q-learning-noise25": "Q-learning teacher, a quarter of its actions random",
        "optimal-noise0": "Optimal teacher",
        "optimal-noise25": "Optimal teacher, a quarter of its actions random",
    }
    for part, title in titles.items():
        lines += [f"### {title}", "", *main_table(results[part]), ""]
    lines += [
        *verdicts(results)[1:3],
        "",
        "## Number of actions",
        "",
        "Optimal teacher, student acts. Action a makes the move a mod 4, so that a uniform student does the same whatever their number. "
        "'Unused': the teacher takes the first four only (and the floor of all); 'copies': it takes all copies of a move alike. "
        f"{', '.join(str(results[f'actions-{count}-unused']['worlds']) for count in ACTION_WORLDS)} worlds with 4, 100 and 1,000 actions; "
        f"learning rates are chosen for each column. Steps to 95 %; share of the teacher's return after {STEPS:,} steps ({STEPS // 2:,} with 1,000 "
        "actions).",
        "",
        *actions_table(results),
        "",
        *verdicts(results)[3:],
        "",
        "## Limits",
        "",
        "The paper used 1,000 worlds, its own probabilities of walls and rewards, and full returns. A floor of "
        f"{FLOOR} makes log T bounded; a smaller one makes the forms with log T noisier. Rates at the end of the list were chosen for "
        "several conditions; larger ones diverged for Hx(T‖S) in trials.",
        "",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """The figure: who acts, and the number of actions."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "stillhouse", "svg.fonttype": "none"}  # the same bytes every time
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    row = RATES.index(0.3)
    three = results["q-learning-noise0"]["sampling"][3 * row : 3 * row + 3]
    colors = ("#0072b2", "#d55e00", "#777777")
    for found, color, label in zip(
        three, colors, ("student acts", "teacher acts", "uniform play"), strict=True
    ):
        left.plot(TIMES[1:], found["share"][1:], color=color, label=label)
        left.fill_between(
            TIMES[1:], found["share_low"][1:], found["share_high"][1:], color=color, alpha=0.15, linewidth=0
        )
    left.axhline(0.95, color="black", linewidth=0.6, linestyle=":")
    left.set(
        xscale="log", xlabel="env steps", ylabel="return / teacher's", title="Hx(T‖S), learning rate 0.3"
    )
    left.legend(frameon=False, loc="lower right")
    styles = {"actions-4-unused": "-", "actions-100-copies": "--", "actions-1000-copies": ":"}
    shown = {"expected_kl": "#009e73", "expected_entropy": "#0072b2", "entropy": "#d55e00"}
    for part, style in styles.items():
        for found in results[part]["conditions"]:
            if color := shown.get(found["variant"]):
                count = f"{int(part.split('-')[1]):,}"
                label = f"{NAMES[found['variant']]}, {count}"
                curve = found["share"][1:]
                right.plot(TIMES[1 : len(curve) + 1], curve, color=color, linestyle=style, label=label)
    right.axhline(0.95, color="black", linewidth=0.6, linestyle=":")
    right.set(xscale="log", xlabel="env steps", title="number of actions (copies added)", ylim=(0, 1.12))
    right.legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*MAIN, *ACTIONS], action="append")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    arguments = parser.parse_args()
    for part in [] if arguments.page else arguments.part or [*MAIN, *ACTIONS]:
        if part in load(NAME) and not arguments.again:
            continue
        started = time.perf_counter()
        result = measure(part)
        seconds = time.perf_counter() - started
        results = load(NAME)
        results["settings"] = {
            "gamma": GAMMA,
            "temperature": TEMPERATURE,
            "floor": FLOOR,
            "times": TIMES,
            "choice_seed": CHOICE_SEED,
            "test_seed": TEST_SEED,
        }
        results[part] = result | {"seconds": round(seconds, 1), "provenance": provenance()}
        save(NAME, results)
        print(f"{part}: {seconds:.0f} s", flush=True)
    if results := load(NAME):
        PAGE.write_text(page(results))
        draw(results)


if __name__ == "__main__":
    main()
