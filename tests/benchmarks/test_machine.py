"""Parts of a study are made once, and never taken for those of other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machine import kept


def test_a_part_is_made_once_and_belongs_to_its_settings(tmp_path: Path) -> None:
    path, made = tmp_path / "part.json", []

    def make() -> dict[str, int]:
        made.append(1)
        return {"score": len(made)}

    for _ in range(2):
        assert kept(path, {"rates": (0.1, 1.0)}, make) == {"score": 1}
    with pytest.raises(SystemExit, match=r"part\.json is of other settings; remove it"):
        kept(path, {"rates": (0.1, 2.0)}, make)
    path.write_text('{"score": 7}')  # of before settings were kept
    with pytest.raises(SystemExit, match="is of other settings"):
        kept(path, {"rates": (0.1, 1.0)}, make)
    assert made == [1]
