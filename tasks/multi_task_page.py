"""The page of multi-task results: its sections. Drawn by :func:`tasks.results_page.render`."""

from __future__ import annotations

from pathlib import Path

from tasks import charts
from tasks.results_page import Page, Section, improvement, scores_table, table
from tasks.studies import Study, array

FOLDER = Path("benchmarks/results/multi_task")


def sharing_tables(study: Study) -> list[str]:
    """Every network of a suite, then environments by environments for those that learn two at a time."""
    pairs = [name for name in study.names() if len(study.columns(study.arms[name])) == 2]
    whole = [name for name in study.names() if name not in pairs]
    lines = scores_table(study.model_copy(update={"order": whole, "arms": {k: study.arms[k] for k in whole}}))
    return [*lines, "", *_interference(study, pairs)]


def _interference(study: Study, pairs: list[str]) -> list[str]:
    if len(pairs) < 2:
        return []
    scores: dict[tuple[str, str], float] = {}
    for name in pairs:
        first, second = study.columns(study.arms[name])
        of_first, of_second = array(study.arms[name].scores).mean(axis=0)
        scores[first, second], scores[second, first] = float(of_first), float(of_second)
    names = sorted({row for row, _ in scores})
    rows = [
        [row, *(charts.score(scores[row, column]) if (row, column) in scores else "–" for column in names)]
        for row in names
    ]
    return [
        "Two at a time: the score of the row's environment where one network learns it together with the column's.",
        "",
        *table(["", *(f"with {name}" for name in names)], rows),
        "",
    ]


def improvement_table(study: Study) -> list[str]:
    """Scores, and how probably a run of the first arm beats one of each other arm."""
    first, *others = study.names()
    return [*scores_table(study), "", *improvement(study, first, others)]


SECTIONS = (
    Section(
        "multi_task_classic",
        "One network for four classic environments",
        sharing_tables,
        "Of the balancings' papers PCGrad's alone has reinforcement learning, in other environments (Meta-World). All networks here have the same "
        "settings; which balancing is best was not known before, and these seeds do not say which is best elsewhere.",
    ),
    Section(
        "multi_task_minatar",
        "One network for five MinAtar games",
        sharing_tables,
        "Rusu et al. 2016's Multi-DQN, one network for three Atari games without balancing, has 83.5 % of single networks in the geometric mean, and what "
        "is distilled into such a network 116.9 %. Here the joint network is four times as wide as one expert; its learning rate and structure were chosen on "
        "development seeds. For time, before any network was judged (returns in training had been seen), networks without balancing, with own adapters and "
        "by soft sharing were taken out of the suite, and the student's updates were halved.",
    ),
    Section(
        "distral_two_rooms",
        "Distral in two rooms",
        improvement_table,
        "The paper shows curves, no table: Distral is above independent soft Q-learning, with KL and entropy above KL alone at the end.",
    ),
    Section(
        "distral_deep",
        "Deep Distral in four mazes",
        improvement_table,
        "The paper shows curves, no table: on DMLab mazes all forms of Distral learn faster than A3C on each task and than A3C on all, two columns "
        "faster than one; with the KL alone less is reached in the end. Its policies have convolutions and an LSTM, and 32 workers a task.",
    ),
    Section(
        "vtrace_lag",
        "V-trace and an actor that is behind",
        scores_table,
        "The paper has no such table: its table 2 compares corrections by the tasks on which each is best.",
    ),
    Section(
        "popart_scales",
        "PopArt and rewards of three sizes",
        scores_table,
        "The paper's median human-normalised score on 57 Atari games with unclipped rewards is near zero without PopArt and about "
        "100 % with it.",
    ),
    Section(
        "unreal_mazes",
        "UNREAL in sparse mazes",
        improvement_table,
        "The paper reports a mean speed-up of 10 on Labyrinth, at 3D scale and with 32 workers.",
    ),
)

HEAD = """# Multi-task reinforcement learning: results

Made by the stage `publish_results` from the score matrices in `benchmarks/results/multi_task/`; do not edit it by hand. The methods:
[hard sharing](../algorithms/hard-sharing.md), [soft sharing](../algorithms/soft-sharing.md), [balancing](../algorithms/balancing.md),
[Distral](../algorithms/distral.md), [IMPALA](../algorithms/impala.md), [UNREAL](../algorithms/unreal.md).

A score is normalised, 0 for random play and 1 for the expert of the same seed, which learns one environment alone with as many env
steps: (return - random) / (expert - random), unless a section says otherwise. Geometric means are over max(score, 0.01). From 5 seeds
on, 95 % stratified bootstrap intervals and the interquartile mean (IQM); below that the seeds themselves."""

MULTI_TASK = Page(FOLDER, Path("docs/results/multi-task.md"), HEAD, SECTIONS)
