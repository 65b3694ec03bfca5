"""records/compare.py: differences of runs, stage by stage, with their noise."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_make_record import ROOT, real_path, record

sys.path.insert(0, str(ROOT / "records"))
import compare  # noqa: E402
import runs  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs that are 0, 0.0004 and -0.0003 bpb worse than the real one in every stage."""
    return record(tmp_path_factory.mktemp("compare"))


def row(text, name):
    """n, difference, error and p of a measure."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_stages_are_compared_with_their_standard_error_and_p(folder, tmp_path, capsys):
    from scipy.stats import ttest_ind

    worse = json.loads(real_path().read_text())["stages"]["quantized"]["val_bpb"]
    other = {"seed_results": [dict(quantized_val_bpb=worse + d, val_bpb=1) for d in (0.002, 0.003)]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert compare.main([str(folder), str(tmp_path / "other.json")]) == 0
    ours, theirs = [worse, worse + 0.0004, worse - 0.0003], [worse + 0.002, worse + 0.003]
    n, difference, error, p = row(capsys.readouterr().out, "quantized")
    assert n == "3, 2"
    assert float(difference) == pytest.approx(np.mean(theirs) - np.mean(ours), abs=1e-5)
    expected = np.sqrt(np.var(ours, ddof=1) / 3 + np.var(theirs, ddof=1) / 2)
    assert float(error) == pytest.approx(expected, abs=1e-5)
    test = ttest_ind(theirs, ours, equal_var=False, alternative="less")
    assert float(p) == pytest.approx(test.pvalue, rel=0.05)


def test_a_shift_of_all_stages_leaves_the_differences_between_stages(folder, capsys):
    assert compare.main([str(real_path()), str(folder)]) == 0
    text = capsys.readouterr().out
    for name in ("before quantization", "quantized", "sliding", "adapted"):
        assert row(text, name)[:2] == ["1, 3", "+0.00003"]
    for name in ("quantized - before quantization", "sliding - quantized", "adapted - sliding"):
        assert float(row(text, name)[1]) == 0


def test_a_single_run_is_told_what_it_cannot_show(folder, capsys):
    assert compare.main([str(folder), str(real_path())]) == 0
    text = capsys.readouterr().out
    assert row(text, "quantized")[2:] == ["-", "-"]
    assert "about 0.0003 to 0.001 bpb, so n = 1 cannot show a smaller difference" in text
    assert compare.main([str(folder), str(folder)]) == 0
    assert "single run" not in capsys.readouterr().out


def test_the_picture_is_drawn_and_the_same_each_time(folder, tmp_path):
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        assert compare.main([str(folder), str(real_path()), "--out", str(picture)]) == 0
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_published_figures_can_be_compared_too(capsys):
    published = ROOT / "records" / "published"
    assert compare.main([str(published / "1493.json"), str(published / "1487.json")]) == 0
    # Its fine-tuning on the validation text, the reason why it is no record, shows here.
    assert float(row(capsys.readouterr().out, "quantized")[1]) < -0.02


@pytest.mark.parametrize("what", ["nowhere", "text", "other"])
def test_what_cannot_be_compared_ends_with_status_2_and_one_line(what, folder, tmp_path, capsys):
    path = Path(tmp_path / what)
    if what != "nowhere":
        path.write_text("hello" if what == "text" else json.dumps({"seed_results": {}}))
    assert compare.main([str(folder), str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_error_of_a_difference_is_none_without_two_runs_on_both_sides():
    one, two = runs.Sample.of([1.0]), runs.Sample.of([1.0, 2.0])
    assert runs.standard_error(one, two) is None
    assert runs.standard_error(two, two) == pytest.approx(np.sqrt(0.5))
