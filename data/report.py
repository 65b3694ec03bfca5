"""How the tools of data/ and records/ report and end.

Exit status of a tool that checks: 0, all checks passed; 1, a check failed; 2, it could not check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import UserError  # noqa: E402 -- in the folder above


class Row(NamedTuple):
    """The result of one check. verdict: True passed, False failed, None a remark."""

    check: str
    verdict: bool | None
    found: str
    expected: str = ""


class Report:
    """The results of all checks, in order: `rows`."""

    def __init__(self):
        self.rows: list[Row] = []

    def add(self, check: str, verdict: bool | None, found: str, expected: str = "") -> None:
        """Add one row."""
        self.rows.append(Row(check, verdict, found, expected))

    def faults(self, check: str, problems: Sequence[str], fine: str) -> None:
        """Add one failed row per problem, or, without problems, one passed row that says `fine`."""
        for problem in problems:
            self.add(check, False, problem)
        if not problems:
            self.add(check, True, fine)

    @property
    def clean(self) -> bool:
        """Whether no check failed."""
        return all(row.verdict is not False for row in self.rows)

    @property
    def status(self) -> int:
        """The exit status."""
        return 0 if self.clean else 1

    def text(self) -> str:
        """The rows as a table, one row per line, with a heading if any row has `expected`."""
        words = {True: "ok", False: "FAIL", None: "remark"}
        rows = [(words[row.verdict], row.check, row.found, row.expected) for row in self.rows]
        if any(row.expected for row in self.rows):
            rows.insert(0, ("", "check", "found", "expected"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def exit_status(job: Callable[[], int]) -> int:
    """Run a tool: its own status, or 2 after one line on stderr for an error the user can fix."""
    try:
        return job()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
    return 2
