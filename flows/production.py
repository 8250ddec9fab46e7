"""Promoting and rolling back: commits of ``data/production.dvc``, the one file that says what is in production.

Either all of it happens or nothing does. What the new pointer names is in DVC's cache before anything changes in the checkout. Then
the commit is made, beside the index and the files, and the branch moves to it only from where it was seen to be; pointer and
files of the checkout follow, and where they cannot, the branch goes back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.workspace import PRIVATE, git, own_worktree, remove_worktree, worktrees
from stillhouse.config import near, parse
from stillhouse.errors import StillhouseError
from stillhouse.files import check_folder, write_atomic
from tasks.git import read
from tasks.production import FOLDER, NOTHING, POINTER, Production, read_production
from tasks.promotion import Pointer, build, describe_student, parse_pointer, read_params
from tasks.recorded import is_in, object_path, recorded_files
from tasks.run_stage import call_dvc
from tasks.stage import cache_folder

ATTEMPTS = "refs/stillhouse/generation"  # a git reference for each number that was taken
# What git has begun and not ended, by the file or folder that it leaves in its own.
_UNFINISHED = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


@dataclass(frozen=True)
class Standing:
    """Where the checkout stands.

    Attributes:
        branch: that is checked out, as a full reference.
        commit: at its tip.
        pointer: what is in production there, or None.
    """

    branch: str
    commit: str
    pointer: Pointer | None

    def in_production(self) -> Pointer:
        """The pointer.

        Raises:
            StillhouseError: there is none.
        """
        if self.pointer is None:
            raise StillhouseError(NOTHING)
        return self.pointer


def standing(checkout: Path) -> Standing:
    """Where the checkout stands, if what is in production can be changed there.

    Raises:
        StillhouseError: git is in the middle of something, no branch is checked out, or the pointer is damaged or has changes that
            are not committed.
    """
    folder = Path(git(checkout, "rev-parse", "--absolute-git-dir").strip())
    for name, what in _UNFINISHED.items():
        if (folder / name).exists():
            raise StillhouseError(
                f"a {what} is in progress here, and what is in production is changed by a commit; end it, or undo it with "
                f"`git {what} --abort`, first"
            )
    commit = git(checkout, "rev-parse", "--verify", "HEAD").strip()
    try:
        branch = git(checkout, "symbolic-ref", "--quiet", "HEAD").strip()
    except StillhouseError:
        raise StillhouseError(
            f"no branch is checked out (HEAD is at {commit[:12]}), and what is in production is changed by a commit, which needs one; "
            "`git switch BRANCH` first"
        ) from None
    if git(checkout, "status", "--porcelain", "--", str(POINTER)).strip():
        raise StillhouseError(f"{POINTER} has changes that are not committed; commit or undo them first")
    text = read(checkout, str(POINTER), commit)
    return Standing(branch, commit, None if text is None else parse_pointer(text, str(POINTER)))


@contextlib.contextmanager
def one_at_a_time(checkout: Path) -> Iterator[None]:
    """Two schedulers, or a scheduler and a person, may meet; only one of them changes what is in production.

    Raises:
        StillhouseError: the other does.
    """
    path = checkout / PRIVATE / "retraining.lock"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StillhouseError(
                "another retraining, promotion or rollback is in progress here; let it end first"
            ) from None
        yield


def promote(
    checkout: Path, start: Standing, source: Path, workspace: Path, about: Production, why: str
) -> str:
    """Put what ``source`` has made into production: track it, and bring it to the checkout by a commit on its branch.

    Args:
        checkout: where the commit is made; nothing else of it is touched.
        start: where the checkout stood when the work began that led here.
        source: the checkout itself or a worktree of it, whose ``data/`` has the student, its teachers and datasets.
        workspace: a worktree of the checkout, in which the bundle is made.
        about: what is promoted.
        why: the rest of the commit's message.

    Returns:
        The commit.

    Raises:
        StillhouseError: something is missing or does not belong together, or the checkout does not stand where it did.
    """
    _check_since(start, standing(checkout))  # before the work of it, and again after
    build(source, workspace, about)
    meta = about.model_dump_json(include={"generation", "student", "seed", "suite"})
    call_dvc(workspace, "promote", "add", str(FOLDER), meta)
    pointer = parse_pointer((workspace / POINTER).read_text(), str(workspace / POINTER))
    now = standing(checkout)
    _check_since(start, now)
    return _replace(
        checkout, now, pointer, f"Promote {about.student} of generation {about.generation}\n\n{why}"
    )


def rollback(checkout: Path, generation: int = -1) -> tuple[int, str]:
    """Put back what was in production before, or a certain generation: a new commit of the old pointer.

    Returns:
        The generation, and the commit.

    Raises:
        StillhouseError: there is none to go back to, its files are nowhere, or the checkout is not ready for a commit.
    """
    with one_at_a_time(checkout):
        start = standing(checkout)
        now = start.in_production().generation
        known = _promoted(checkout, start.commit)
        earlier = [each for each in known if each < now]
        if generation < 0 and not earlier:
            raise StillhouseError(
                f"generation {now} is the first that was in production; there is none to go back to"
            )
        wanted = generation if generation >= 0 else max(earlier)
        if wanted not in known or wanted == now:
            others = ", ".join(str(each) for each in sorted(known) if each != now) or "none"
            raise StillhouseError(
                f"generation {wanted} cannot be put back; there are {others} beside the present one, {now}"
            )
        commit, pointer = known[wanted]
        bring(checkout, pointer, commit)
        return wanted, _replace(
            checkout, start, pointer, f"Roll production back from generation {now} to {wanted}"
        )


def _run_folder(checkout: Path, run: str) -> Path:
    kept = {path.name: path for path in worktrees(checkout)}
    if run not in kept:
        raise StillhouseError(
            f"{run!r} is no run whose worktree is kept{near(run, list(kept))}; there are {', '.join(kept) or 'none'}"
        )
    return kept[run]


def promote_by_hand(checkout: Path, name: str, run: str = "") -> str:
    """Put a student into production, with its teachers: generation 0, or the next.

    Args:
        checkout: where the commit is made.
        name: of the student, as in ``data/students/``.
        run: of the worktree that it lies in, one of ``.stillhouse/worktrees/``; "": the checkout itself.

    Returns:
        The commit.

    Raises:
        StillhouseError: no such student or run, something of it is missing, or the checkout is not ready for a commit.
    """
    source = _run_folder(checkout, run) if run else checkout
    found = {
        path.name: match
        for path in sorted((source / "data/students").glob("*"))
        if path.is_dir() and (match := re.fullmatch(r"(.+)-s([0-9]+)", path.name))
    }
    if name not in found:
        raise StillhouseError(
            f"{name!r} is no student here{near(name, list(found))}; there are {', '.join(found) or 'none: `stillhouse run` makes some'}"
        )
    with one_at_a_time(checkout):
        start = standing(checkout)
        params = read_params(source)
        distilled = params.get("distill_student") or {}
        if found[name][1] not in distilled:
            raise StillhouseError(
                f"{name}: suite {params['suite']} does not distil this student from teachers, and what is in production is trained on with its "
                f"teachers; a student of distill_student can be put into production: {', '.join(distilled) or 'there is none'}"
            )
        teachers, learnt = (
            params.get("train_teacher") or {},
            distilled[found[name][1]].get("environments", []),
        )
        if adopted := [
            each for each in learnt if (teachers.get(each) or {}).get("algorithm") == "fine_tuned"
        ]:
            raise StillhouseError(
                f"{name}: its teacher of {adopted[0]} is adopted from fine_tune and cannot be trained on; a student of teachers of their own can "
                "be put into production"
            )
        generation = next_generation(checkout) if _known(checkout) else 0
        given = {
            "generation": generation,
            "suite": params["suite"],
            "student": found[name][1],
            "seed": int(found[name][2]),
            "environments": sorted(describe_student(source, name).get("environments", {})),
            "params": params,
        }
        about = parse(Production, given, f"data/students/{name}")
        # A worktree of its own, so that nothing changes here unless all goes well.
        with own_worktree(checkout, f"promotion-{os.getpid()}", start.commit) as workspace:
            why = f"By hand, of run {run}." if run else "By hand."
            commit = promote(checkout, start, source, workspace, about, why)
        remove_worktree(checkout, workspace)
        return commit


def next_generation(checkout: Path) -> int:
    """A number that no attempt here has had, and nothing that was ever in production: it is taken by asking.

    A rejected attempt's results are in the cache; with its number again, and so its seeds, they would be found there for ever.
    """
    form = "--format=%(refname:lstrip=3)"
    taken = [int(name) for name in git(checkout, "for-each-ref", form, ATTEMPTS).split() if name.isdecimal()]
    number = max([0, *taken, *_known(checkout)]) + 1
    git(checkout, "update-ref", f"{ATTEMPTS}/{number}", "HEAD", "")
    return number


def bring(workspace: Path, pointer: Pointer, commit: str) -> None:
    """See that DVC's cache has all that a pointer names, from the remote where need be; nothing else changes.

    Args:
        workspace: the checkout, or a worktree that shares its cache.
        pointer: what is wanted.
        commit: at which this is the pointer.

    Raises:
        StillhouseError: something of it is nowhere.
    """
    cache = cache_folder(workspace)
    if is_in(cache, pointer.out):
        return
    _, answer, _ = call_dvc(workspace, "production", "fetch", "--revision", commit, str(POINTER))
    # DVC would remove the folder before it notices that the files of the other one are nowhere.
    if not is_in(cache, pointer.out):
        files = recorded_files(cache, pointer.out)
        lost = sum(not object_path(cache, md5).exists() for md5 in files.values()) if files else "all"
        reason = answer["reason"] or "the remote has not got them either"
        raise StillhouseError(
            f"generation {pointer.generation}: {lost} of its files are not in the cache and cannot be fetched ({reason}); `stillhouse "
            "push` where they are, and `dvc remote add --default NAME URL` with that remote here"
        )


def _promoted(checkout: Path, *where: str) -> dict[int, tuple[str, Pointer]]:
    """Every generation in the history of ``where``, the newest first, with the commit that put it there last."""
    found: dict[int, tuple[str, Pointer]] = {}
    # Full: a merge may have taken the other side's, and what was in production on this one was so all the same.
    for commit in git(checkout, "log", "--full-history", "--format=%H", *where, "--", str(POINTER)).split():
        text = read(checkout, str(POINTER), commit)
        # A commit may have removed it, or broken it; there is nothing to go back to in either.
        with contextlib.suppress(StillhouseError):
            if text is not None:
                pointer = parse_pointer(text, commit)
                found.setdefault(pointer.generation, (commit, pointer))
    return found


def _known(checkout: Path) -> list[int]:
    """Every generation that ever was in production, on any branch: a rolled back one has had its number too."""
    return [*_promoted(checkout, "--all", "HEAD")]


def _check_since(start: Standing, now: Standing) -> None:
    """Raises StillhouseError where the checkout has gone elsewhere; commits that leave the pointer alone do not matter."""
    if now.branch != start.branch:
        raise StillhouseError(
            f"{_short(start.branch)} was checked out when this began, and {_short(now.branch)} is now, so that it is not clear whose "
            f"production is meant; `git switch {_short(start.branch)}`, and begin again"
        )
    before, after = (each.pointer.out.md5 if each.pointer else "" for each in (start, now))
    if before != after:
        which = f"generation {now.pointer.generation}" if now.pointer else "nothing"
        raise StillhouseError(
            f"{which} has come into production on {_short(now.branch)} since this began (commit {now.commit[:12]}), and what was compared "
            "is something else; begin again"
        )


def _short(branch: str) -> str:
    return branch.removeprefix("refs/heads/")


def _replace(checkout: Path, now: Standing, pointer: Pointer, message: str) -> str:
    """Commit the pointer on top of where the checkout stands, and let the checkout follow; or leave all as it was."""
    commit = _commit(checkout, now, pointer.text, message)
    try:
        git(checkout, "update-ref", "-m", message.splitlines()[0], now.branch, commit, now.commit)
    except StillhouseError as error:
        raise StillhouseError(
            f"{_short(now.branch)} could not be moved to the new commit, and is as it was ({error}); begin again"
        ) from None
    try:
        _follow(checkout, pointer)
        read_production(checkout)
        check_folder(checkout / FOLDER)
    except BaseException as error:
        try:
            git(checkout, "update-ref", now.branch, now.commit, commit)
        except StillhouseError:
            raise StillhouseError(
                f"{error}; commit {commit[:12]} was made all the same, and cannot be taken back, as {_short(now.branch)} has moved on: "
                f"`dvc checkout {POINTER}` brings its files"
            ) from error
        # As far as it goes: what has led here may stand in the way again.
        with contextlib.suppress(StillhouseError):
            _follow(checkout, now.pointer)
        raise
    return commit[:12]


def _follow(checkout: Path, pointer: Pointer | None) -> None:
    """Bring pointer and files of the checkout, and the pointer's entry in git's index, to what was committed."""
    if pointer is None:
        (checkout / POINTER).unlink(missing_ok=True)
        git(checkout, "update-index", "--force-remove", "--", str(POINTER))
        return
    write_atomic(checkout / POINTER, pointer.text)
    git(checkout, "update-index", "--add", "--", str(POINTER))
    call_dvc(checkout, "production", "checkout", str(POINTER))


def _commit(checkout: Path, now: Standing, text: str, message: str) -> str:
    """A commit of this one file on top of ``now``, which no branch has yet.

    Made beside the index: what is edited or staged in the checkout stays as it is. It runs no hook and is not signed, as nobody may
    be there to answer at night.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        file = Path(folder, POINTER.name)
        file.write_text(text)
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        blob = git(checkout, "hash-object", "-w", "--no-filters", "--", str(file)).strip()
        git(checkout, "read-tree", now.commit, **index)
        git(checkout, "update-index", "--add", "--cacheinfo", f"100644,{blob},{POINTER}", **index)
        tree = git(checkout, "write-tree", **index).strip()
    variables: dict[str, str] = {}
    for key, value in (("name", "stillhouse"), ("email", "stillhouse@localhost")):
        if not _configured(checkout, f"user.{key}"):
            names = (f"GIT_{role}_{key.upper()}" for role in ("AUTHOR", "COMMITTER"))
            variables |= {name: os.environ.get(name, value) for name in names}
    return git(checkout, "commit-tree", "-m", message, "-p", now.commit, tree, **variables).strip()


def _configured(checkout: Path, key: str) -> bool:
    try:
        return bool(git(checkout, "config", key).strip())
    except StillhouseError:
        return False
