"""The page of `partialfc report` in a browser: what it does there, how large it is, and how fast it is drawn.

    pip install playwright axe-playwright-python        and Debian's package chromium
    python benchmarks/report_page.py --out /tmp/report-page --demo runs/demo

Writes the tables of docs/report.md, and the pictures beside it from the report of a demo. The long runs are 5 of
100,000 logged lines each, written here and not trained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from documents import DOCS, write_between
from partialfc.bench.machine import describe
from partialfc.config.options import HeadConfig, TrainConfig
from partialfc.report.page import write_report
from partialfc.report.subjects import read_subjects

RUNS, LINES = 5, 100_000
_FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
_SERIOUS = ("serious", "critical")


def write_long_run(folder: Path, lines: int, seed: int) -> None:
    """A run folder with so many lines of metrics and an evaluation each tenth of the way, and one spike of the loss."""
    folder.mkdir(parents=True)
    config = TrainConfig(head=replace(HeadConfig(), sample_rate=0.1 * (seed + 1)))
    (folder / "config.yaml").write_text(config.to_yaml())
    noise = np.random.default_rng(seed).normal(size=lines)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            done, value = step / lines, float(noise[step - 1])
            line: dict[str, Any] = {
                "kind": "train", "step": step, "epoch": 20 * done, "loss": 25 * math.exp(-3 * done) + 3 + 0.3 * value,
                "target_cosine": 0.6 - 0.6 * math.exp(-3 * done) + 0.02 * value, "grad_norm": 5 * math.exp(value),
                "lr": 0.1 * (1 - done) ** 2, "lr_head": 0.1 * (1 - done) ** 2, "images_per_second": 800 + 40 * value,
                "data_wait": 0.05 * abs(value), "sampled_classes": 1000, "skipped_steps": 0, "unreadable": 0,
                "peak_bytes": 2 << 30, "schema_version": 1,
            }  # fmt: skip
            if step == lines // 3:
                line["loss"] = 60.0
            file.write(json.dumps(line) + "\n")
            if step % (lines // 10) == 0:
                accuracy = 0.95 - 0.3 * math.exp(-4 * done) - 0.01 * seed
                line = {
                    "kind": "evaluation",
                    "step": step,
                    "benchmark": "lfw",
                    "accuracy": accuracy,
                    "schema_version": 1,
                }
                file.write(json.dumps({**line, "accuracy_std": 0.01, "pairs": 6000}) + "\n")


# -- in the browser ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium, of the system."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)


def drawn_in(browser: Any, path: Path) -> float:
    """Seconds from the call to the second frame after loading."""
    page = browser.new_page()
    started = time.perf_counter()
    page.goto(path.resolve().as_uri())
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.perf_counter() - started
    page.close()
    return seconds


def check_in_browser(browser: Any, path: Path) -> dict[str, str]:
    """What the page does, by the name of the check; AssertionError where it does not."""
    messages: list[str] = []
    requests: list[str] = []
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri())
    found = {"charts": _charts(page)} | _keys_and_pointer(page) | {"tables": _sorts(page)}
    found["CSV"] = _downloads(page)
    for width in (1100, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"wider than {width} px"
    found["390 px wide"] = "nothing is cut or scrolls sideways but wide tables in themselves"
    page.emulate_media(forced_colors="active")
    strokes = page.evaluate("[...document.querySelectorAll('path.line')].map(each => getComputedStyle(each).stroke)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert strokes
    assert ground not in strokes
    found["forced colours"] = f"lines in {' and '.join(sorted(set(strokes)))} on {ground}"
    page.emulate_media(forced_colors="none")
    found["PDF"] = f"{page.pdf().count(b'/Type /Page' + chr(10).encode())} pages"
    external = [url for url in requests if not url.startswith(("file:", "data:"))]
    assert (messages, external) == ([], [])
    found["console, network"] = "no message, no request"
    page.close()
    return found | {"without script": _without_script(browser, path), "axe-core": _axe(browser, path)}


def _charts(page: Any) -> str:
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].filter(each => each.checkVisibility())"
        ".map(each => each.querySelector('path').getBBox().width)"
    )
    assert sizes
    assert min(sizes) > 50
    return f"{len(sizes)} drawn"


def _keys_and_pointer(page: Any) -> dict[str, str]:
    """The values under the pointer, and by the arrow keys."""
    plot = page.locator("svg[role=img]").first
    plot.scroll_into_view_if_needed()
    plot.hover()
    pointed = page.locator("#tip").inner_text()
    page.mouse.move(0, 0)
    plot.focus()
    page.keyboard.press("End")
    last = page.locator("#tip").inner_text()
    page.keyboard.press("ArrowLeft")
    before = page.locator("#tip").inner_text()
    page.keyboard.press("Escape")
    assert len({pointed, last, before}) == 3
    assert not page.locator("#tip").is_visible()
    return {"pointer": " · ".join(pointed.split("\n")[:3]), "arrow keys": " · ".join(before.split("\n")[:3])}


def _sorts(page: Any) -> str:
    """The first visible table, sorted by its last column, both ways."""
    table = page.locator("table:visible").first
    button = table.locator("thead button").last
    orders = []
    for _ in range(2):
        button.click()
        orders.append(table.locator("tbody tr").all_inner_texts())
    assert table.locator("thead th").last.get_attribute("aria-sort") == "descending"
    assert sorted(orders[0]) == sorted(orders[1])
    return f"{page.locator('table').count()}, each sorted by a click or Enter on a head"


def _downloads(page: Any) -> str:
    with page.expect_download() as download:
        page.locator("a[download]:visible").first.click()
    content = Path(download.value.path()).read_text()
    return f"{download.value.suggested_filename}, {len(content.splitlines())} lines"


def _without_script(browser: Any, path: Path) -> str:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    charts = page.locator("svg[role=img] path.line, svg path.area").count()
    titles = page.locator(".strip title").count()
    assert charts
    assert titles
    if page.locator("label[for=by-time]").count():
        page.locator("label[for=by-time]").click()
        assert page.locator(".by-time svg").first.is_visible()
        assert not page.locator(".by-step svg").first.is_visible()
    context.close()
    return f"{charts} curves, {titles:,} values on hovering, by step and by time"


def _axe(browser: Any, path: Path) -> str:
    from axe_playwright_python.sync_playwright import Axe

    found = []
    for scheme, width in (("light", 1100), ("dark", 1100), ("light", 390)):
        # The policy of the page keeps the checker out, as it should.
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
        page = context.new_page()
        page.goto(path.resolve().as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        result = Axe().run(page).response
        found += result["violations"]
        context.close()
    assert not [one for one in found if one["impact"] in _SERIOUS], [(one["id"], one["impact"]) for one in found]
    return f"{len(found)} findings, none serious; light, dark and narrow, all folds open"


def take_pictures(browser: Any, path: Path) -> None:
    """The top of the page and one benchmark, light and dark, for the documents."""
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1000, "height": 1500})
        page = context.new_page()
        page.goto(path.resolve().as_uri())
        image = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        start = page.evaluate("document.querySelector('.wide').offsetTop - 50")
        for name, top, height in (("top", 0, 1400), ("benchmark", start, 1500)):
            part = image.convert("RGB").crop((0, top, image.width, min(top + height, image.height)))
            part.save(DOCS / "images" / f"report-{name}-{scheme}.jpg", quality=72, optimize=True)
        context.close()


def measure(browser: Any, out: Path) -> Mapping[str, str]:
    """Size and times of the page of 5 long runs."""
    folders = [out / f"run-{seed}" for seed in range(RUNS)]
    for seed, folder in enumerate(folders):
        if not folder.exists():
            write_long_run(folder, LINES, seed)
    started = time.process_time()
    subjects = read_subjects(folders)
    read = time.process_time() - started
    page = write_report(subjects, out=out / "long.html")
    written = time.process_time() - started - read
    check_in_browser(browser, page)
    seconds = sorted(drawn_in(browser, page) for _ in range(5))
    return {
        "size of the page": f"{page.stat().st_size / 2**20:.2f} MiB",
        "reading the logs, CPU": f"{read:.1f} s",
        "making the page, CPU": f"{written:.1f} s",
        "drawn, median and slowest of 5": f"{seconds[2]:.2f} s, {seconds[-1]:.2f} s",
    }


def write_table(name: str, where: str, rows: Sequence[str]) -> None:
    write_between("report.md", f"benchmarks/report_page.py {name}", [where, "", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the long runs")
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished demo")
    options = parser.parse_args()
    facts = describe("cpu")
    with chromium() as browser:
        page = options.demo / "report.html"
        rows = [f"| {name} | {value} |" for name, value in check_in_browser(browser, page).items()]
        take_pictures(browser, page)
        version = f"Chromium {browser.version}, headless"
        write_table("checks", f"{version}.", ["| check | found |", "|---|---|", *rows])
        rows = [f"| {name} | {value} |" for name, value in measure(browser, options.out).items()]
    machine = f"{facts['cpu']}, {facts['cores']} cores shared with other work; {version}."
    write_table("size", machine, [f"| {RUNS} runs of {LINES:,} lines | |", "|---|---|", *rows])


if __name__ == "__main__":
    main()
