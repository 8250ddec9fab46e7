"""What is in production, under real git and real DVC: all of a promotion or a rollback happens, or nothing does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.production import (
    Standing,
    next_generation,
    one_at_a_time,
    promote,
    promote_by_hand,
    rollback,
    standing,
)
from flows.workspace import make_worktree
from stillhouse.errors import StillhouseError
from stillhouse.files import replace_folder, sha256
from tasks.plan import to_yaml
from tasks.production import POINTER, Production, read_production
from tasks.recorded import content_hash
from tasks.stage import cache_folder

PARAMS = {
    "suite": "toy",
    "train_teacher": {"easy": {"gamma": 0.9}},
    "distill_student": {"small": {"environments": ["easy"]}},
    "retraining": {"generation": 0},
}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def folder(path: str, **files: object) -> str:
    """A stage's out; its digest."""
    with replace_folder(Path(path)) as inside:
        for name, content in files.items():
            (inside / f"{name}.json").write_text(json.dumps(content))
    return sha256(Path(path, "manifest.json"))


def train(note: str) -> None:
    """What the pipeline leaves: a student, its teacher, its dataset, and what is recorded of them."""
    folder("data/training_state/easy-s0", state=note)
    teacher = folder("data/teachers/easy-s0", weights=note)
    folder("data/datasets/easy-s0", schema={"teacher": teacher})
    details = {"environments": {"easy": {}}, "teachers": {"easy": teacher}}
    folder("data/students/small-s0", spec={"details": details}, weights=note)
    record()


def record() -> None:
    """What `dvc.lock` says of all this."""
    made = {
        "train_teacher-easy-s0": ("data/teachers/easy-s0", "data/training_state/easy-s0"),
        "collect_dataset-easy-s0": ("data/datasets/easy-s0",),
        "distill_student-small-s0": ("data/students/small-s0",),
    }
    stages = {
        name: {
            "cmd": name,
            "params": {"params/pipeline.yaml": {"train_teacher.easy": PARAMS["train_teacher"]["easy"]}},
            "outs": [{"path": path, "md5": content_hash(Path(path))} for path in paths],
        }
        for name, paths in made.items()
    }
    Path("dvc.lock").write_text(to_yaml({"schema": "2.0", "stages": stages}))


@pytest.fixture
def checkout(toy: Path) -> Path:
    (toy / "data/.gitignore").write_text("*\n!.gitignore\n!production.dvc\n")
    (toy / ".gitignore").write_text(".stillhouse/\nlogs/\ndvc.lock\n")
    (toy / "params/pipeline.yaml").write_text(to_yaml(PARAMS))
    (toy / "params/suites").mkdir()
    (toy / "params/suites/toy.yaml").write_text("{}\n")
    for key, value in (("name", "test"), ("email", "test@example.org")):
        git("config", f"user.{key}", value)
    # Nobody can sign at night.
    git("config", "commit.gpgsign", "true")
    git("config", "gpg.program", "false")
    git("branch", "--move", "main")
    git("add", "--all")
    git("-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "toy")
    train("first")
    return toy


@pytest.fixture
def promoted(checkout: Path) -> Path:
    promote_by_hand(checkout, "small-s0")
    return checkout


def state() -> tuple[str, ...]:
    """All of a checkout that a promotion might change."""
    pointer = POINTER.read_text() if POINTER.exists() else ""
    return (
        git("rev-parse", "HEAD"),
        git("symbolic-ref", "HEAD"),
        git("status", "--porcelain"),
        pointer,
        content_hash(Path("data/production")),
    )


@contextlib.contextmanager
def unchanged(match: str) -> Iterator[None]:
    """A block that is refused in one line, and leaves all as it was."""
    before = state()
    with pytest.raises(StillhouseError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert state() == before
    assert "promotion-" not in git("worktree", "list")


def generation() -> int:
    return read_production().generation


def weights_of(root: Path) -> str:
    return json.loads((root / "data/students/small-s0/weights.json").read_text())


def weights() -> str:
    return json.loads(Path("data/production/students/small/weights.json").read_text())


def test_a_candidate_is_promoted_from_the_worktree_that_was_kept(checkout: Path) -> None:
    first = weights_of(checkout)
    kept = make_worktree(checkout, "candidate", "HEAD")
    with contextlib.chdir(kept):
        train("candidate")
    with unchanged(r"'candidat' is no run whose worktree is kept \(did you mean 'candidate'"):
        promote_by_hand(checkout, "small-s0", "candidat")
    promote_by_hand(checkout, "small-s0", "candidate")
    assert weights() != first
    assert weights() == weights_of(kept)
    assert weights_of(checkout) == first  # the checkout's own student is as it was
    assert "of run candidate" in git("log", "-1", "--format=%b")


def test_no_number_is_used_twice_and_what_else_is_edited_stays(checkout: Path) -> None:
    Path("edited").write_text("staged")
    git("add", "edited")
    Path("edited").write_text("edited")
    hook(checkout, "pre-commit", "exit 1")  # for a person's commits: it is not asked
    commit = promote_by_hand(checkout, "small-s0")
    assert (
        git("rev-parse", "--short=12", "HEAD") == commit and git("symbolic-ref", "HEAD") == "refs/heads/main"
    )
    assert git("show", "--format=%s", "--name-only").split("\n\n") == [
        "Promote small of generation 0",
        "data/production.dvc",
    ]
    assert git("log", "-1", "--format=%an") == "test"
    assert git("status", "--porcelain") == "AM edited" and git("show", ":edited") == "staged"
    first = read_production()
    assert (first.generation, first.environments, first.params) == (0, ["easy"], PARAMS)

    train("second")
    promote_by_hand(checkout, "small-s0")
    assert (generation(), weights()) == (1, "second")
    assert rollback(checkout)[0] == 0
    assert (generation(), weights()) == (0, "first")
    train("third")
    promote_by_hand(checkout, "small-s0")
    assert (generation(), weights()) == (2, "third")
    assert rollback(checkout, 1)[0] == 1
    assert next_generation(checkout) == 3, "though 1 is what is in production"
    assert git("status", "--porcelain") == "AM edited"
    assert not git("worktree", "list").count("\n")

    # A clone has the commits, and none of the numbers that were taken here; a branch that was left has its own.
    git("switch", "--quiet", "--orphan", "other")
    git("commit", "--no-gpg-sign", "--no-verify", "--quiet", "--allow-empty", "--message", "nothing")
    for reference in git("for-each-ref", "--format=%(refname)", "refs/stillhouse").split():
        git("update-ref", "-d", reference)
    assert next_generation(checkout) == 3


def hook(checkout: Path, name: str, body: str) -> Path:
    path = checkout / ".git/hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# Before it moves a branch, git asks this one.
REFUSE = 'if [ "$1" = prepared ] && grep -q refs/heads/; then exit 1; fi'


def test_a_commit_that_fails_leaves_everything_as_it_was(checkout: Path) -> None:
    refusing = hook(checkout, "reference-transaction", REFUSE)
    with unchanged("main could not be moved to the new commit, and is as it was"):
        promote_by_hand(checkout, "small-s0")  # where there is no production yet
    refusing.unlink()
    promote_by_hand(checkout, "small-s0")
    train("second")
    refusing = hook(checkout, "reference-transaction", REFUSE)
    with unchanged("main could not be moved"):
        promote_by_hand(checkout, "small-s0")
    refusing.unlink()
    promote_by_hand(checkout, "small-s0")
    hook(checkout, "reference-transaction", REFUSE)
    with unchanged("main could not be moved"):
        rollback(checkout)


def test_files_that_cannot_follow_take_the_commit_back(promoted: Path) -> None:
    train("second")
    mine = Path("data/production/students/small/weights.json")
    mine.unlink()
    mine.write_text("an edit that is in no cache")
    with unchanged("data/production|weights"):
        promote_by_hand(promoted, "small-s0")
    assert mine.read_text() == "an edit that is in no cache"


def test_the_first_one_leaves_what_nobody_has_recorded(checkout: Path) -> None:
    Path("data/production").mkdir()
    Path("data/production/mine").write_text("mine")
    with unchanged("data/production|mine"):
        promote_by_hand(checkout, "small-s0")
    assert Path("data/production/mine").read_text() == "mine"


def test_a_rollback_needs_the_files_and_fetches_them(promoted: Path, tmp_path_factory) -> None:
    remote = tmp_path_factory.mktemp("remote")
    train("second")
    promote_by_hand(promoted, "small-s0")
    cache = cache_folder(promoted) / "files/md5"
    shutil.copytree(cache, remote / "files/md5", dirs_exist_ok=True)
    first = git("show", "HEAD~1:data/production.dvc").partition("md5: ")[2].split()[0]
    names = [entry["md5"] for entry in json.loads((cache / first[:2] / first[2:]).read_text())]
    for name in {first, *names}:
        (cache / name[:2] / name[2:]).unlink()
    with unchanged(
        "generation 0: all of its files are not in the cache and cannot be fetched .no default remote"
    ):
        rollback(promoted)
    config = promoted / ".dvc/config"
    text = config.read_text().replace("[core]\n", "[core]\n    remote = far\n")
    config.write_text(f"{text}['remote \"far\"']\n    url = {remote}\n")
    git("commit", "--no-gpg-sign", "--quiet", "--all", "--message", "remote")
    away = remote.rename(remote.with_name("away"))
    with unchanged("generation 0: all of its files are not in the cache and cannot be fetched"):
        rollback(promoted)
    away.rename(remote)
    assert rollback(promoted)[0] == 0
    assert weights() == "first"


def test_a_damaged_file_of_the_cache_is_not_put_into_production(promoted: Path) -> None:
    train("second")
    promote_by_hand(promoted, "small-s0")
    (damaged,) = [
        path
        for path in (cache_folder(promoted) / "files/md5").glob("*/*")
        if path.read_bytes() == b'"first"' and path.chmod(0o644) is None
    ]
    damaged.write_text('"worse"')
    with unchanged("data/production"):
        rollback(promoted)


def test_git_must_be_ready_for_a_commit(promoted: Path) -> None:
    def refused(match: str) -> None:
        with unchanged(match):
            promote_by_hand(promoted, "small-s0")
        with unchanged(match):
            rollback(promoted)

    text = POINTER.read_text()
    POINTER.write_text(f"{text}# edited\n")
    refused("production.dvc has changes that are not committed")
    POINTER.write_text(text)
    git("checkout", "--quiet", "--detach")
    with pytest.raises(StillhouseError, match="no branch is checked out .HEAD is at .*git switch BRANCH"):
        promote_by_hand(promoted, "small-s0")
    git("checkout", "--quiet", "main")
    for name, what in (("MERGE_HEAD", "merge"), ("rebase-merge", "rebase")):
        (promoted / ".git" / name).write_text(git("rev-parse", "HEAD"))
        with pytest.raises(StillhouseError, match=f"a {what} is in progress here.*git {what} --abort"):
            rollback(promoted)
        (promoted / ".git" / name).unlink()
    for damaged in (
        "outs: [",
        "outs:\n- path: production\n",
        "- a list\n",
        "meta: {generation: x}\nouts: [{md5: a}]\n",
    ):
        POINTER.write_text(damaged)
        git("commit", "--no-gpg-sign", "--quiet", "--all", "--message", "damaged")
        refused("production.dvc: damaged")


def test_one_at_a_time(promoted: Path) -> None:
    with one_at_a_time(promoted):
        for attempt in (lambda: promote_by_hand(promoted, "small-s0"), lambda: rollback(promoted)):
            with unchanged("another retraining, promotion or rollback is in progress here"):
                attempt()
    with open(promoted / ".stillhouse/retraining.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was given back


def test_what_began_before_another_promotion_ends_without_one(promoted: Path) -> None:
    start = standing(promoted)
    workspace = make_worktree(promoted, "run", "HEAD")
    about = Production(
        generation=7, suite="toy", student="small", seed=0, environments=["easy"], params=PARAMS
    )

    def end(since: Standing) -> str:
        return promote(promoted, since, promoted, workspace, about, "")

    git("switch", "--quiet", "--create", "feature")
    with unchanged("main was checked out when this began, and feature is now"):
        end(start)
    git("switch", "--quiet", "main")
    train("second")
    promote_by_hand(promoted, "small-s0")
    with unchanged("generation 1 has come into production on main since this began"):
        end(start)
    with unchanged("generation 1 has come into production"):
        end(replace(start, pointer=None))
    # Commits that leave it alone do not matter.
    start = standing(promoted)
    git("commit", "--no-gpg-sign", "--quiet", "--allow-empty", "--message", "meanwhile")
    end(start)
    assert generation() == 7 and git("log", "-1", "--skip=1", "--format=%s") == "meanwhile"


def test_what_does_not_belong_together_is_not_promoted(promoted: Path) -> None:
    def refused(match: str) -> None:
        with unchanged(match):
            promote_by_hand(promoted, "small-s0")

    params = Path("params/pipeline.yaml")
    params.write_text(to_yaml({**PARAMS, "train_teacher": {"easy": {"gamma": 0.5}}}))
    with pytest.raises(
        StillhouseError, match="made with another train_teacher.easy than params/pipeline.yaml has"
    ):
        promote_by_hand(promoted, "small-s0")
    params.write_text("[")
    with pytest.raises(StillhouseError, match="params/pipeline.yaml: not YAML"):
        promote_by_hand(promoted, "small-s0")
    params.write_text(to_yaml(PARAMS))
    folder("data/teachers/easy-s0", weights="another")
    refused("data/teachers/easy-s0: not what dvc.lock records")
    record()
    refused("data/students/small-s0: made from the teacher [0-9a-f]{12} of easy, but data/teachers/ holds")
    teacher = sha256(Path("data/teachers/easy-s0/manifest.json"))
    folder(
        "data/students/small-s0",
        spec={"details": {"environments": {"easy": {}}, "teachers": {"easy": teacher}}},
    )
    record()
    refused("data/datasets/easy-s0: made from the teacher")
    folder("data/students/small-s0", spec={"details": {"environments": {"easy": {}}, "teachers": {}}})
    record()
    refused("data/students/small-s0: names no teacher of easy that was kept")
    folder("data/students/small-s0", spec={"details": {"environments": {}}})
    refused("data/students/small-s0.environments: List should have at least 1 item")
    folder("data/students/small-s0", spec=[])
    refused("data/students/small-s0/spec.json: missing or damaged")
    train("again")
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    refused("data/students/small-s0: dvc.lock does not record how it was made")
    shutil.rmtree("data/training_state")
    record()
    refused("data/training_state/easy-s0: missing or unfinished")


def test_only_a_distilled_student_is_promoted(checkout: Path) -> None:
    shutil.copytree("data/students/small-s0", "data/students/soup-s0")
    with unchanged(
        "soup-s0: suite .* does not distil this student from teachers.*can be put into production: small$"
    ):
        promote_by_hand(checkout, "soup-s0")


def test_a_name_without_a_seed_is_no_student(checkout: Path) -> None:
    Path("data/students/my-student").mkdir()
    with unchanged("'my-student' is no student here.*; there are small-s0$"):
        promote_by_hand(checkout, "my-student")
    with unchanged("nothing is in production yet: `stillhouse promote"):
        rollback(checkout)


def test_a_damaged_production_is_said_in_one_line(promoted: Path) -> None:
    about = Path("data/production/production.json")
    made = about.read_bytes()
    about.unlink()  # it may be a link into the cache
    for content, match in (
        (b"{", "production.json: damaged; `dvc checkout --force"),
        (b"\xff", "production.json: damaged"),
        (b"[]", "schema version None, but this stillhouse reads version 2"),
        (
            made.replace(b'"schema_version": 2', b'"schema_version": 1'),
            "schema version 1, .* `stillhouse promote",
        ),
        (made.replace(b'"student"', b'"pupil"'), "production.json.student: this parameter is required"),
    ):
        about.write_bytes(content)
        with pytest.raises(StillhouseError, match=match) as caught:
            read_production()
        assert "\n" not in str(caught.value)


def test_a_commit_that_cannot_be_taken_back_is_named(promoted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(*_: object) -> None:
        git("commit", "--no-gpg-sign", "--quiet", "--allow-empty", "--message", "somebody")
        raise StillhouseError("disk full")

    monkeypatch.setattr("flows.production._follow", follow)
    train("second")
    with pytest.raises(
        StillhouseError, match="disk full; commit .* cannot be taken back, as main has moved on"
    ):
        promote_by_hand(promoted, "small-s0")
    assert git("log", "-2", "--format=%s").splitlines() == ["somebody", "Promote small of generation 1"]
