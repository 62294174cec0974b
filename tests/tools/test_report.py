"""Pages about runs, suites and studies: what they say, and that a browser shows them, on a phone as well."""

import html
import json
import os
import re
import shutil
import subprocess

import pages
import pytest

from ettin_foundry.tools.report import write_page

SCORES = {"encoder": (0.61, 0.58, 0.64), "decoder": (0.52, 0.49, 0.55)}
TASK = {"task": "module", "metric": "accuracy", "kind": "classification", "n": 1200,
        "mean": {name: dict(zip(("value", "low", "high"), values)) for name, values in SCORES.items()}}
CLAIM = {"claim": "encoders win", "difference": 0.09, "low": 0.03, "high": 0.15, "n": 1200, "verdict": "holds"}
STUDY = {"name": "small <b>", "models": [*SCORES], "suites": [{"seed": 1, "root": "runs/a"}], "tasks": [TASK],
         "claims": [CLAIM]}
SWEEP = {"name": "rates", "axes": {"x": "learning rate", "lines": "objective"}, "points": [
    {"x": x, "line": line, "metric": f"{line} loss", "value": 5 + 100 * x, **({"stderr": 0.1} if line == "mlm" else {})}
    for x in (3e-4, 3e-3) for line in ("mlm", "clm")]}


@pytest.fixture(scope="module")
def folders(rising_run, tmp_path_factory):
    """A root with two runs, the second from the first one, and a study with a sweep; pages of all."""
    root, study = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("study")
    for name in ("a run", "b"):
        shutil.copytree(rising_run[0], root / name, symlinks=True)
    steps = [json.loads(line) for line in (root / "b" / "steps.jsonl").read_text().splitlines()]
    (root / "b" / "evals.jsonl").write_text("".join(json.dumps({
        "step": step, "tokens": steps[step]["tokens"], "data": "eval", "TargetCrossEntropy": 6.25 - step / 8,
        "TargetAccuracy": 0.125}) + "\n" for step in (1, 5)))
    (study / "a").mkdir()
    (study / "a" / "report.html").touch()
    (study / "study.json").write_text(json.dumps(STUDY))
    (study / "sweep.json").write_text(json.dumps(SWEEP))
    return [write_page(folder) for folder in (root / "b", root, study)], steps


def test_pages_say_what_the_folders_hold(folders):
    (run, root, study), steps = folders
    assert '<a href="a/report.html">runs/a</a>' in study.read_text()
    said, both, studied = (pages.read_page(page) for page in (run, root, study))
    last = sum(step["loss"] for step in steps) / len(steps)
    assert f"{len(steps)} {steps[0]['loss']:.3f} {last:.3f} 5.625 (12.5%)" in said and "validation loss" in said
    assert both.count("a run") >= 4 and "model: " in both and "objective: mlm" in both  # its configuration
    assert "holds encoders win difference +0.09, 95% interval +0.03 to +0.15" in studied and "small <b>" in studied
    assert "0.610 0.580 to 0.640 0.520 0.490 to 0.550" in studied
    assert all(">0.0003<" in (study.parent / name).read_text() for name in ("sweep.svg", "sweep-clm-loss.svg"))
    with pytest.raises(ValueError, match="FOLDER must be a run's save folder, a suite's root"):
        write_page(run.parent / "tokenizer")


def test_a_browser_shows_them_without_errors_and_a_phone_without_scrolling_sideways(folders, tmp_path):
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: install it, or set CHROMIUM to the program, to see the pages in a browser")
    frames = [f'<iframe width="{width}" srcdoc="{html.escape(page.read_text())}"></iframe>'
              for page in folders[0] for width in (390, 1280)]
    (tmp_path / "frames.html").write_text("<!DOCTYPE html>" + "".join(frames) + """<script>onload = () => {
        document.title = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument.documentElement)
            .map(e => `${e.clientWidth} ${e.scrollWidth} ${e.querySelectorAll("svg path").length}`).join()}</script>""")
    ran = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                          f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/frames.html"],
                         capture_output=True, text=True, timeout=120)
    found = [[*map(int, each.split())] for each in re.findall("<title>(.*)</title>", ran.stdout)[-1].split(",")]
    assert len(found) == len(frames) and all(scroll <= width and paths > 10 for width, scroll, paths in found), found
    assert "CONSOLE" not in ran.stderr, ran.stderr
