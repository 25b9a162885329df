"""Lines that fit beside another file on a screen."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = "*.py", "aya_min/**/*.py", "tests/**/*.py", "*.md", "results/*.md", ".ci/run"
WRITTEN = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_has_more_than_110_characters(path):
    """Rows of a table in Markdown are one line each, however long."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 110 and line[0] != "|"] == []
