"""A report says what the run's files say, whatever is missing or hostile in them, and a browser needs nothing else to show it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from trainer import report, report_figures, run_log

EVERY = 128
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome-headless-shell")


def line(clock: int, attempt: int, second: float, **more) -> str:
    """A line such as trainer/metrics.py writes."""
    bucket = "side=Enc,resolution=8,statistic="
    values = {
        "evenkeel_images_seen": clock,
        "evenkeel_duration_images": 1024,
        "evenkeel_images_per_second": 64.0,
        "evenkeel_checkpoint_clock_images": 256 if attempt == 2 else 0,
        "evenkeel_model_flops_per_image": 1e6,
        "evenkeel_loss": 1.0 / clock,
        "evenkeel_denoising_loss": 2.0 / clock,
        "evenkeel_gradient_norm": None,  # it was not finite
        "evenkeel_phase_seconds": {"phase=forward": 0.5, "phase=communication": 9.0},
        "evenkeel_loss_by_logsnr": {"logsnr=-2": 0.9, "logsnr=10": 0.1, "logsnr=0": 0.5},
        "evenkeel_activation_magnitude": {bucket + "mean": 1.0, bucket + "max": 2.0},
        "evenkeel_run_info": {"commit=abc<i>,config=0123,world=2": 1},
    }
    return json.dumps({"time": 1e9 + second, "attempt": attempt} | values | more)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that was killed at 512 images, and goes on from its checkpoint at 256."""
    folder = tmp_path / "<b>$a_b$"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "run: x\nseed: 1\nmodel: {family: '<script>alert(1)</script>', channel_mult: [1, 2]}\n"
    )
    (folder / "state.json").write_text('{"status": "failed", "last_error": "<img src=http://example.org/x.png>"}')
    lines = [line(clock, 1, clock / 64) for clock in range(EVERY, 513, EVERY)]
    lines += [line(clock, 2, 100 + clock / 64) for clock in range(256 + EVERY, 769, EVERY)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"time": 3, "evenkeel_ima')  # cut off
    return folder


def made(folder: Path, *more) -> tuple[int, str]:
    out = folder.parent / "out" / "report.html"
    status = report.main([str(folder), *map(str, more), "--out", str(out)])
    return status, out.read_text() if out.exists() else ""


def test_what_was_repeated_counts_as_cost_and_is_not_drawn_twice(run):
    lines = run_log.read(run)
    assert [(x["attempt"], x["evenkeel_images_seen"]) for x in lines][-1] == (2, 768)
    clocks = [(x["attempt"], x["evenkeel_images_seen"]) for x in run_log.lineage(lines)]
    assert clocks == [(1, 128), (1, 256), (2, 384), (2, 512), (2, 640), (2, 768)]
    assert run_log.restarts(lines) == [(2, 384)]
    spent = run_log.cost(lines)
    assert (spent.images, spent.repeated, spent.flops) == (512 + 512, 256, 1024e6)
    assert spent.seconds == pytest.approx(1024 / 64) and spent.rank_seconds == 2 * spent.seconds


def test_text_of_a_run_stays_text_and_the_page_asks_for_nothing(run):
    status, text = made(run)
    assert status == 0
    assert "<script" not in text and "<img src=http" not in text and "<b>" not in text and "abc<i>" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;$a_b$" in text and "start 2 by 384" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert f'content="{report.POLICY}"' in text and "default-src 'none'" in text
    shown = re.findall(r'alt="([^"]*)" src="data:image/png;base64,', text)
    assert [s.split(",")[0] for s in shown] == ["Loss", "Throughput", "Loss per logSNR", "Magnitudes", "Time of a step"]
    beside = sorted((run.parent / "out" / "report").iterdir())
    assert [p.stem for p in beside] == ["logsnr", "loss", "magnitudes", "phases", "throughput"]
    assert all(Image.open(p).width > 600 for p in beside)


def test_sweep_evaluations_and_grids_are_shown_where_they_are(run):
    (run / "sweep").mkdir()
    (run / "sweep" / "sweep.csv").write_text(
        "sigma_rel,guidance,fid,latent\n0.1,1.0,3,1\n0.05,1.0,4,1\n0.1,1.4,2,1\n0.15,1.0\n"
    )
    e = {"evenkeel_images_seen": 256, "sigma_rel": 0.1, "snapshot": "a", "mean": 0.5}
    (run / "evaluations.jsonl").write_text(json.dumps(e) + "\n{")
    (run / "samples").mkdir()
    for clock in range(0, 3000, 100):
        for sigma_rel in ("0.050", "0.100"):
            Image.new("RGB", (2000, 10)).save(run / "samples" / f"grid-{clock:010d}-{sigma_rel}.png")
    (run / "samples" / "grid-0000009999-0.100.png").write_bytes(b"half")
    status, text = made(run)
    subject = report.open_run(run)
    assert [title for title, _ in report_figures.sweeps(subject, subject)] == ["EMA sweep: fid", "EMA sweep: latent"]
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert status == 0 and "EMA sweep" in text and "Loss of the snapshots" in text
    assert captions[0] == "0 images, sigma_rel 0.100" and 6 <= len(captions) <= report.GRIDS
    assert len(text) < 2**20, "grids are made smaller"


def test_several_runs_stand_beside_each_other_and_what_differs_is_named(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text("run: x\nseed: 2\nmodel: {channel_mult: [1, 2]}\n")
    status, text = made(run, other)
    assert status == 0
    differ = text[text.index("Where they differ") : text.index("<details>")]
    assert set(re.findall(r"<tr><th>([\w.]+)</th>", differ)) == {"seed", "model.family"}
    same = report.told_apart([report.open_run(folder) for folder in (run, other, other)])
    assert [s.name for s in same] == [run.name, str(other), str(other)]
    assert text.count('alt="Magnitudes, ') == 2 and text.count('alt="Loss"') == 1


def test_a_run_of_one_line_with_nothing_but_the_clock_has_a_report(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("[")
    (folder / "metrics.jsonl").write_text('{"evenkeel_images_seen": 7}\n')
    status, text = made(folder)
    assert status == 0 and "images seen" in text and "not readable" in text


@pytest.mark.parametrize("what", ["nowhere", "file", "no config", "no lines", "junk", "out"])
def test_what_is_no_run_is_one_line_and_leaves_nothing(what, run, tmp_path, capsys):
    folder, more = run, []
    if what in ("nowhere", "file"):
        folder = tmp_path / what
        (tmp_path / "file").write_text("x")
    elif what == "no config":
        (run / "config.yaml").unlink()
    elif what in ("no lines", "junk"):
        (run / "metrics.jsonl").write_bytes(b"" if what == "no lines" else bytes(range(256)) + b'\n[1]\n{"a": 1}\n')
    else:
        more = ["--out", "report.pdf"]
    out = tmp_path / "out" / "report.html"
    assert report.main([str(folder), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.parent.exists()


# ---------------------------------------------------------------------------------------------------------------------
# A real browser.


def browse(page: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Open a page in headless Chromium; return (the document, console lines, addresses it asked for beyond file: and data:)."""
    log = folder / "net.json"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        "--no-first-run",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    flags += [f"--log-net-log={log}", f"--screenshot={folder / 'page.png'}", "--window-size=1400,2400", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    events = json.loads(log.read_text())["events"]
    # what the browser asks for on its own account (the time, updates) has no origin
    asked = [
        e["params"]["url"] for e in events if e.get("params", {}).get("initiator", "not an origin") != "not an origin"
    ]
    asked = [url for url in asked if not url.startswith(("file:", "data:"))]
    return done.stdout, [x for x in done.stderr.splitlines() if "CONSOLE" in x], asked


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: chromium)")
def test_a_browser_shows_it_without_network_or_complaint(run, tmp_path):
    _, text = made(run)
    document, console, asked = browse(run.parent / "out" / "report.html", tmp_path)
    assert "Loss per logSNR" in document and document.count("<img") == text.count("<img")
    assert console == [] and asked == []
    shot = Image.open(tmp_path / "page.png").convert("L")
    assert len(set(shot.resize((140, 240)).tobytes())) > 20, "the figures are on it"
    # the check itself sees what must not be there
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><script>alert(1)</script><h1>', 1))
    assert browse(bad, tmp_path)[1] != [], "the page's own policy refuses both, and says so"
    bad.write_text('<img src="http://127.0.0.1:9/x.png">')
    assert browse(bad, tmp_path)[2] == ["http://127.0.0.1:9/x.png"]
