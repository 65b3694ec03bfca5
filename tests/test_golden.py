"""The three systems give the numbers that the originals' own code gave: see golden/README.md."""

import pytest
from golden import GOLDEN, PARTS, Project, Report

CASES = [(system, part) for system in GOLDEN for part in GOLDEN[system]]


@pytest.mark.parametrize(("system", "part"), CASES)
def test_a_part_of_a_system_gives_the_numbers_of_its_original(system, part):
    report = Report()
    PARTS[part](Project(system), GOLDEN[system][part], report)
    assert not report.failed, "\n".join(report.failed)
    assert report.passed
