"""What is damaged is found, though DVC trusts it, and comes back without a sound file being touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from toy_pipeline import dvc, runs, toy_plan, toy_stage

from flows.verification import repair, verify
from stillhouse.errors import StillhouseError
from tasks.cache import cache_in_use
from tasks.plan import Stage
from tasks.recorded import object_path, owners, read_recorded

CACHE = Path(".dvc/cache")

FOLDER = "os.makedirs('data/d', exist_ok=True); open('data/d/one', 'w').write('1'); open('data/d/two', 'w').write('22')"


def commit_all(message: str = "results") -> None:
    Path(".gitignore").write_text("count-*\nlogs/\n.stillhouse/\n")
    subprocess.run(["git", "add", "--all"], check=True)
    somebody = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *somebody, "commit", "--quiet", "--message", message], check=True)


def made(*stages: Stage) -> None:
    toy_plan(*stages)
    dvc("repro")
    commit_all()


@pytest.fixture
def chain(toy: Path) -> Path:
    """``d`` writes a folder, ``b`` reads what ``a`` wrote."""
    folder = toy_stage("d")
    Path("stage_d.py").write_text(f"import os\n{FOLDER}\nopen('count-d', 'a').write('x')\n")
    made(toy_stage("a"), toy_stage("b", "a"), folder)
    return toy


def kept(path: str) -> Path:
    """Where the cache has a file of an out, or (with a slash at its end) the list of a folder's files."""
    entries = owners(read_recorded(Path()))
    for name, entry in entries.items():
        if path in (name, f"{name}/"):
            return object_path(CACHE, entry.outs[name].md5)
        if path.startswith(f"{name}/"):
            listed = json.loads(object_path(CACHE, entry.outs[name].md5).read_text())
            return object_path(
                CACHE, {row["relpath"]: row["md5"] for row in listed}[path.removeprefix(f"{name}/")]
            )
    raise KeyError(path)


def damage(path: Path) -> None:
    """Change a byte in place, with the time, size and mode that it had."""
    status = path.stat()
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(b"#")
    os.chmod(path, status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def broken() -> dict[str, tuple[str, str]]:
    return {file.path: (file.workspace, file.cache) for file in verify(Path(), "")[0] if not file.sound}


def mend() -> str:
    return "\n".join(repair(Path.cwd(), "", verify(Path.cwd(), "")[0]))


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}


def test_damage_that_dvc_does_not_see_is_found_and_that_stage_alone_runs_again(chain):
    before, lock = tree(), Path("dvc.lock").read_text()
    assert broken() == {}
    dvc("config", "--local", "cache.type", "hardlink")
    dvc("checkout", "--relink")
    assert os.path.samefile("data/a", kept("data/a"))
    damage(Path("data/a"))  # and with it the cache's
    assert "up to date" in dvc("status", "a", "b", "d")
    assert broken() == {"data/a": ("damaged", "damaged")}
    assert mend() == "data/a: not in the cache, and no default remote is configured\na: run again"
    assert (broken(), tree(), Path("dvc.lock").read_text()) == ({}, before, lock)
    # It ran in a worktree, which is gone, and nothing else did.
    assert [runs(name) for name in "abd"] == [1, 1, 1]
    assert (
        len(subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout.splitlines())
        == 1
    )


def test_what_is_sound_in_one_place_is_put_back_in_the_other(chain):
    before = tree()
    objects = {path: kept(path) for path in ("data/a", "data/d/", "data/d/one")}
    dvc("config", "--local", "cache.type", "copy")
    dvc("checkout", "--relink")
    damage(objects["data/a"])
    objects["data/d/"].unlink()
    objects["data/d/one"].unlink()
    Path("data/b").unlink()
    assert broken() == {
        "data/a": ("sound", "damaged"),
        "data/d/": ("-", "missing"),
        "data/d/one": ("sound", "missing"),
        "data/b": ("missing", "sound"),
    }
    inode = Path("data/d/one").stat().st_ino
    assert mend() == "put back into the cache from the workspace: 3 objects"
    assert (broken(), tree()) == ({}, before)
    assert Path("data/d/one").stat().st_ino == inode
    assert not os.access(objects["data/a"], os.W_OK) or os.geteuid() == 0
    assert objects["data/a"].stat().st_mode & 0o222 == 0


def test_a_damaged_file_in_a_folder_whose_list_is_lost(chain):
    before = tree()
    dvc("config", "--local", "cache.type", "copy")
    dvc("checkout", "--relink")
    kept("data/d/").unlink()
    damage(Path("data/d/two"))
    assert broken() == {"data/d/": ("-", "missing")}  # without the list nobody knows what was in it
    assert mend().endswith("d: run again")
    assert (broken(), tree()) == ({}, before)


def test_a_folder_of_which_one_place_has_one_file_and_the_other_the_other(chain):
    before = tree()
    dvc("config", "--local", "cache.type", "copy")
    dvc("checkout", "--relink")
    kept("data/d/one").unlink()
    Path("data/d/two").unlink()
    Path("data/d/mine").write_text("not recorded")
    assert broken() == {"data/d/one": ("sound", "missing"), "data/d/two": ("missing", "sound")}
    with pytest.raises(StillhouseError, match="data/d/mine"):  # DVC would remove it
        mend()
    Path("data/d/mine").unlink()
    mend()
    assert (broken(), tree()) == ({}, before)


def test_a_remote_comes_before_running_again_and_may_be_damaged_too(chain, tmp_path_factory):
    before = tree()
    remote = tmp_path_factory.mktemp("remote")
    dvc("remote", "add", "--local", "--default", "there", str(remote))
    dvc("push")
    for path in ("data/a", "data/b"):
        kept(path).unlink()
        Path(path).unlink()
    damage(remote / kept("data/b").relative_to(CACHE))
    assert mend().splitlines() == [
        "fetched from the remote: data/a",
        "data/b: not in the cache, and what the remote has is damaged",
        "b: run again",
    ]
    assert (broken(), tree()) == ({}, before)
    assert [runs(name) for name in "abd"] == [1, 1, 1]


def test_what_comes_out_otherwise_is_said_and_changes_nothing(toy):
    made(toy_stage("a", script="noise = os.urandom(4).hex(); open('data/noise', 'w').write(noise)"))
    rows = Path("dvc.yaml").read_text().replace("    - data/a\n", "    - data/a\n    - data/noise\n")
    Path("dvc.yaml").write_text(rows)
    dvc("repro")
    commit_all()
    lock = Path("dvc.lock").read_text()
    for path in ("data/a", "data/noise"):
        kept(path).unlink()
        Path(path).unlink()
    assert mend().endswith(
        "a: run again; other than recorded (on a processor that was not recorded) came out data/noise"
    )
    assert broken() == {"data/noise": ("missing", "missing")}
    assert Path("dvc.lock").read_text() == lock


def test_a_stage_whose_code_changed_since_cannot_bring_its_outs_back(chain):
    Path("stage_a.py").write_text("print('another')\n")
    kept("data/a").unlink()
    Path("data/a").unlink()
    Path("data/b").unlink()
    assert "a: cannot be run again: stage_a.py: not as recorded" in mend()
    assert broken() == {"data/a": ("missing", "missing")}


def test_nothing_is_pruned_while_it_is_put_back(chain):
    kept("data/a").unlink()
    Path("data/a").unlink()
    lines = repair(Path.cwd(), "", verify(Path.cwd(), "")[0])
    next(lines)
    with cache_in_use(Path(), exclusive=True) as alone:
        assert not alone
    list(lines)
    with cache_in_use(Path(), exclusive=True) as alone:
        assert alone
    assert broken() == {}


def test_parents_are_mended_before_their_children(chain):
    before = tree()
    shutil.rmtree(CACHE / "files")
    shutil.rmtree("data/d")
    for name in "ab":
        Path("data", name).unlink()
    assert [line for line in mend().splitlines() if line.endswith("run again")] == [
        f"{name}: run again" for name in ("a", "d", "b")
    ]
    assert (broken(), tree()) == ({}, before)


def test_at_a_revision_the_cache_is_looked_at_and_mended(chain):
    first = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    old = kept("data/a")
    toy_stage("a")
    Path("stage_a.py").write_text(
        Path("stage_a.py").read_text().replace("write_text(text)", "write_text('other')")
    )
    dvc("repro")
    commit_all("others")
    old.unlink()
    assert broken() == {}
    checked = verify(Path.cwd(), first)[0]
    assert [str(file) for file in checked if not file.sound] == ["data/a: missing in cache (a)"]
    workspace = tree()
    assert "a: run again" in list(repair(Path.cwd(), first, checked))
    assert all(file.sound for file in verify(Path.cwd(), first)[0])
    assert tree() == workspace


def test_what_git_keeps_is_looked_at_and_left_to_git(toy):
    made(Stage("page", ["sh", "-c", "echo page > page"], in_git=["page"]))
    assert broken() == {}
    Path("page").write_text("edited\n")
    assert broken() == {"page": ("damaged", "-")}
    assert mend() == ""
    assert Path("page").read_text() == "edited\n"


def test_what_a_dvc_file_tracks_is_verified_too(chain):
    shutil.copytree("data/d", "kept")
    dvc("add", "kept")
    subprocess.run(["git", "add", "kept.dvc"], check=True)
    assert broken() == {}
    Path("kept/one").unlink()
    assert broken() == {"kept/one": ("missing", "sound")}
    mend()
    assert broken() == {}
    Path("later.dvc").write_text("outs:\n- path: later\n")  # declared, and not made yet
    subprocess.run(["git", "add", "later.dvc"], check=True)
    assert broken() == {}


def test_a_lock_that_cannot_be_read_is_one_line(chain):
    for text, word in (
        ("schema: '2.0'\nstages:\n  a: {", "not YAML"),
        ("stages: {a: {outs: [1]}}", "not as DVC 3"),
    ):
        Path("dvc.lock").write_text(text)
        with pytest.raises(StillhouseError, match=word) as caught:
            verify(Path(), "")
        assert "\n" not in str(caught.value)
    Path("dvc.lock").unlink()
    with pytest.raises(StillhouseError, match="there is none"):
        verify(Path(), "")
