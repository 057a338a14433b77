"""The fifth proof: each lesson in JupyterLab, in a real browser, as a learner uses it."""

import ast
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build
import install
import nbformat
import psutil
import pytest
import rules
import solve
from outputs import WIDGET

from dsv3_tutorial.learn.registry import find

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
RUN_SECONDS = 180
SHORT = {"DSV3_LIVE_SECONDS": "1"}  # that a live cell runs is what is asked here
NOTIFICATIONS = "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
WAITING = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const code = [...panel.content.model.cells].filter(cell => cell.type === 'code');
    const waiting = code.filter(cell => !cell.executionCount).map(cell => cell.id);
    return {waiting, kernel: panel.sessionContext.session?.kernel?.status};
}"""
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    return {notebook: panel?.content?.model?.toJSON(), kernel: kernel?.status};
}"""
DRAWN = """async (e) => e.tagName !== 'IMG' ? e.outerHTML
    : new Uint8Array(await (await fetch(e.src)).arrayBuffer()).join()"""
SHOW_CELL = """async (at) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = at;
    await notebook.scrollToItem(at, 'start');
}"""

pytestmark = [pytest.mark.browser, pytest.mark.notebooks]


def browser_path():
    """The browser to drive: DSV3_BROWSER, or the first of the known names on the path."""
    named = os.environ.get("DSV3_BROWSER")
    return named or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    """A headless browser; skipped with the reason where there is none."""
    if browser_path() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is here; DSV3_BROWSER names one")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab over an empty folder, with a home of its own; gone afterwards with its kernels.

    One serves all the lessons, as a learner's does: starting and ending it takes seconds each time.
    """
    own_folder = tmp_path_factory.mktemp("jupyter")
    folder, home = own_folder / "my", own_folder / "home"
    settings = home / "config" / NOTIFICATIONS
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(next(iter(install.QUIET_JUPYTER.values()))))
    folder.mkdir()
    own = {f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "config/lab/user-settings")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "config/lab/workspaces")}
    own |= {"HOME": str(home), "IPYTHONDIR": str(home), "JUPYTER_TOKEN": secrets.token_hex(16)}
    own |= {"JUPYTER_PREFER_ENV_PATH": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}"]
    command += ["--expose-app-in-browser"]  # the test asks the page what a cell holds
    variables = build.variables(str(home / "dsv3"), threads=1) | own | SHORT
    with (own_folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        port = json.loads(wait_for_file(home / "runtime", process).read_text())["port"]
        served = f"http://127.0.0.1:{port}", own["JUPYTER_TOKEN"]
        yield Server(folder, *served, psutil.Process(process.pid))
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        left = psutil.wait_procs(started, timeout=20)[1]
        for one in [*left, process]:
            one.kill()
        process.wait(timeout=20)
    assert started, "no kernel was ever started"
    assert not left, f"still there after the server was told to end: {left}"


class Server:
    """JupyterLab as it serves: the folder that it shows, its address, its process."""

    def __init__(self, folder, address, token, process):
        self.folder, self.address, self.token, self.process = folder, address, token, process

    def at(self, page):
        return f"{self.address}{page}?token={self.token}"

    def end_kernels(self, requests):
        """End every kernel, as closing and shutting down a lesson does, and what it started."""
        started = self.process.children(recursive=True)
        for kernel in requests.get(self.at("/api/kernels")).json():
            assert requests.delete(self.at(f"/api/kernels/{kernel['id']}")).ok
        left = psutil.wait_procs(started, timeout=20)[1]
        assert not left, f"still there after its kernel was told to end: {left}"


def wait_for_file(folder, process):
    """The file in which Jupyter says where it serves."""
    for _ in range(300):
        found = sorted(folder.glob("jpserver-*.json"))
        if found and found[0].stat().st_size:
            return found[0]
        assert process.poll() is None, "JupyterLab ended before it served"
        time.sleep(0.2)
    raise AssertionError("JupyterLab did not serve within a minute")


class Lesson:
    """One lesson, open in the browser."""

    def __init__(self, page, name):
        self.page, self.name = page, name

    def state(self):
        return self.page.evaluate(STATE)

    def cells(self):
        return nbformat.from_dict(self.state()["notebook"]).cells

    def at(self, wanted):
        """The number of the first cell for which wanted(cell) holds; None without one."""
        return next((i for i, cell in enumerate(self.cells()) if wanted(cell)), None)

    def show(self, at):
        """Bring a cell into view; the cell as an element of the page."""
        self.page.evaluate(SHOW_CELL, at)
        return self.page.locator(".jp-Notebook .jp-mod-active.jp-Cell").first

    def wait_until_run(self):
        """Wait until every code cell has run and the kernel rests."""
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            state = self.page.evaluate(WAITING)
            if state["kernel"] == "idle" and not state["waiting"]:
                return
            self.page.wait_for_timeout(300)
        raise AssertionError(f"not done after {RUN_SECONDS} s; waiting for {state['waiting']}")

    def run_all(self):
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.wait_until_run()

    def verdict_after_typing(self, at, text):
        """Replace a cell's text at the keyboard, run it, and read the verdict beneath it."""
        cell = self.show(at)
        before = self.cells()[at].execution_count
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Control+Enter")
        for _ in range(200):
            now = self.cells()[at]
            if now.execution_count not in (None, before) and self.state()["kernel"] == "idle":
                break
            self.page.wait_for_timeout(100)
        assert now.source.strip() == text.strip()
        return self.verdict(at)

    def verdict(self, at):
        """A cell's verdict: its status, after making sure that the page shows it in words."""
        cell = nbformat.from_dict({"cells": [self.cells()[at]]})  # one cell, read as a lesson
        verdicts = list(solve.verdicts(cell).values())
        assert verdicts, f"no verdict stands beneath the cell: {cell.cells[0].outputs}"
        verdict = verdicts[0]
        label = verdict["status"].replace("_", " ").upper()
        self.show(at).get_by_text(f"[{label}]").first.wait_for(timeout=5000)
        return verdict["status"]

    def picture(self, name):
        """Keep a screenshot where DSV3_SCREENSHOTS says."""
        if folder := os.environ.get("DSV3_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{self.name}-{name}.png")


@pytest.fixture(scope="module")
def learner(browser):
    """One learner's browser: what it has loaded of JupyterLab it has for the next lesson too."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    yield context
    context.close()


@pytest.fixture
def opened(learner, server, lesson):
    """The lesson's copy in JupyterLab, as first opened but for the execution counts.

    Its kernel is ended before the next lesson's starts; the last one's ends with the server.
    """
    server.end_kernels(learner.request)
    notebook = nbformat.read(lesson, as_version=4)
    for cell in rules.code_cells(notebook):
        cell.execution_count = None  # so that a new count says that the cell has run
    nbformat.write(notebook, server.folder / lesson.name)
    page = learner.new_page()
    # In a workspace of its own: the default one would open the lesson before beside it.
    page.goto(server.at(f"/lab/workspaces/{lesson.stem}/tree/{lesson.name}"))
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.model")
    open_lesson = Lesson(page, lesson.stem)
    for _ in range(300):
        if open_lesson.state()["kernel"] == "idle":
            break
        page.wait_for_timeout(200)
    yield open_lesson
    page.close()


@pytest.mark.timeout(600)
def test_a_learner_runs_the_lesson_moves_a_slider_and_solves_an_exercise(opened):
    opened.picture("opened")
    opened.run_all()
    errors = [c.id for c in opened.cells() for o in c.get("outputs", []) if "ename" in o]
    assert not errors
    opened.picture("run")
    move_an_explorer(opened)
    solve_an_exercise(opened)


def move_an_explorer(lesson):
    """Moving the first explorer's slider, or choosing where it has none, changes its picture."""
    at = lesson.at(lambda c: any(WIDGET in o.get("data", {}) for o in c.get("outputs", [])))
    if at is None:
        assert not any("explore(" in c.source for c in lesson.cells()), "the explorer did not show"
        return
    cell = lesson.show(at)
    picture = cell.locator(".jupyter-widgets img, .jupyter-widgets svg").first
    picture.wait_for(timeout=15000)
    before = picture.evaluate(DRAWN)
    lesson.picture("explorer-before")
    sliders = cell.locator(".widget-slider [role=slider]")
    control = (sliders if sliders.count() else cell.locator(".widget-dropdown select")).first
    if control.evaluate("element => element.tagName") == "SELECT":
        other = control.evaluate("e => [...e.options].findIndex(o => !o.selected)")
        control.select_option(index=other)
    else:
        forward = control.get_attribute("aria-valuenow") != control.get_attribute("aria-valuemax")
        control.focus()
        lesson.page.keyboard.press("ArrowRight" if forward else "ArrowLeft")
    for _ in range(100):
        if picture.evaluate(DRAWN) != before:
            break
        lesson.page.wait_for_timeout(100)
    else:
        raise AssertionError("the picture did not change in ten seconds")
    lesson.picture("explorer-after")


def solve_an_exercise(lesson):
    """The first exercise goes from not attempted to not yet to passed, by typing."""
    at = lesson.at(rules.stubs)
    assert at is not None, "the lesson has no exercise"
    ((name, stub),) = rules.stubs(lesson.cells()[at]).items()
    exercise, head = find(name), f'@exercise("{name}")\n'
    assert lesson.verdict(at) == "not_attempted"
    lesson.picture("exercise-not-attempted")
    wrong = f"{head}def {stub.name}({ast.unparse(stub.args)}):\n    return -1"
    assert lesson.verdict_after_typing(at, wrong) == "not_yet"
    lesson.picture("exercise-not-yet")
    answer = head + solve.pasted(exercise.function, stub.name)
    assert lesson.verdict_after_typing(at, answer) == "passed"
    lesson.picture("exercise-passed")
