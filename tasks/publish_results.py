"""Stage: the pages of ``docs/results/``, from the results that are committed as JSON.

Trains nothing. A study that was not run leaves one line.
"""

from __future__ import annotations

import json
from pathlib import Path

from stillhouse.files import write_atomic
from tasks import meta_page, transfer_page
from tasks.multi_task_page import MULTI_TASK
from tasks.results_page import ONLINE_CURVE, POLICY_DISTILLATION, online_curve, render
from tasks.stage import StageContext, main
from tasks.studies import FOLDER, read_study


def publish_results(context: StageContext) -> None:
    """Score matrices, and what other benchmarks have measured, to their pages; the online study to its curve."""
    paths = [Path(dep) for dep in sorted(context.deps)]
    studies = {path.stem: read_study(path) for path in paths if path.parent == FOLDER}
    measured = {path.stem: path.read_text() for path in paths if path.parent == FOLDER.parent}
    write_atomic(POLICY_DISTILLATION.path, render(POLICY_DISTILLATION, studies, measured))
    if "online" in studies:
        write_atomic(ONLINE_CURVE, online_curve(studies["online"]))
    moved = {path.stem: json.loads(path.read_text()) for path in paths if path.parent == transfer_page.FOLDER}
    shared = {path.stem: read_study(path) for path in paths if path.parent == MULTI_TASK.folder}
    if shared:
        write_atomic(MULTI_TASK.path, render(MULTI_TASK, shared))
    learnt = {path.stem: json.loads(path.read_text()) for path in paths if path.parent == meta_page.FOLDER}
    if learnt:
        write_atomic(meta_page.PAGE, meta_page.render(learnt))
    if moved:
        write_atomic(transfer_page.PAGE, transfer_page.render(moved))


if __name__ == "__main__":
    main(publish_results)
