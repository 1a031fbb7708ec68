"""A report in a browser: nothing fails, nothing leaves the file; it is for phones, the dark and paper, too."""

import shutil
import time

import pytest

from makd.report import write_report
from tests.report.made_up import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
READY = "document.documentElement.dataset.ready === 'true'"
HOSTILE = "</script><img src=http://example.org/x onerror=alert(2)> a text"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium` (or any Chrome) brings one"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of playwright's own pipes
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of a decoder of 3 layers, with hostile text."""
    return write_report([make_run(tmp_path_factory.mktemp("runs") / "student", layers=3, text=HOSTILE)])


@pytest.fixture
def visit(browser):
    """Open a file; gives the page, and what went wrong there or was asked of the network."""
    contexts = []

    def open_(path, size, **settings):
        context = browser.new_context(viewport=size, reduced_motion="reduce", **settings)
        contexts.append(context)
        faults = []

        def route(request):
            if request.request.url.startswith("file:"):
                request.continue_()
            else:
                faults.append(f"request: {request.request.url}")
                request.abort()

        context.route("**/*", route)
        page = context.new_page()
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function(READY)
        return page, faults

    yield open_
    for context in contexts:
        context.close()


def findings(page):
    """What axe-core finds, of the kinds that keep somebody out."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(PHONE, "light"), (PHONE, "dark"), (DESKTOP, "light")],
    ids=["phone", "phone in the dark", "desktop"],
)
def test_it_can_be_read(report, visit, size, scheme):
    page, faults = visit(report, size, color_scheme=scheme)
    charts = page.locator("[data-chart] svg[role=img]")
    assert charts.count() == page.locator("[data-chart]").count() > 10
    assert charts.first.get_attribute("aria-label")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert findings(page) == []
    assert faults == []


def test_on_paper_all_maps_are_shown_and_charts_fit(report, visit):
    page, faults = visit(report, DESKTOP)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})
    assert page.locator(".view").evaluate_all("views => views.every(view => view.offsetParent !== null)")
    assert not page.locator("nav").is_visible()
    assert page.locator("[data-chart] svg").evaluate_all(
        "charts => charts.every(chart => chart.getBoundingClientRect().right <= innerWidth + 1)"
    )
    assert faults == []


def test_the_map_is_switched_by_the_keyboard(report, visit):
    page, _ = visit(report, DESKTOP)
    assert page.locator(".map-measured").is_visible()
    page.focus(".pick-measured")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".map-predicted").is_visible()
    assert not page.locator(".map-measured").is_visible()


def test_a_report_of_thirty_layers_is_small_and_opens_soon(tmp_path, visit):
    report = write_report([make_run(tmp_path / "student", layers=30)])
    assert report.stat().st_size <= 5_000_000
    visit(report, DESKTOP)  # the browser itself has started
    taken = []
    for _ in range(4):  # the machine may have other work
        started = time.perf_counter()
        visit(report, DESKTOP)
        taken.append(time.perf_counter() - started)
    assert min(taken) <= 5  # 2 on two idle cores with AVX-512


def test_without_scripts_every_number_is_there(report, browser):
    context = browser.new_context(viewport=PHONE, java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    page.locator("#spectra details").first.locator("summary").click()
    assert page.locator("#spectra details").first.locator("td").first.is_visible()
    assert "Charts need JavaScript" in page.locator("noscript").inner_text()
    context.close()


def test_runs_that_are_folded_are_drawn_when_they_are_opened(tmp_path, visit):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    page, faults = visit(write_report(runs, tmp_path / "both.html"), PHONE)
    assert page.locator("#frontier svg").count() == 2
    assert page.locator("#run-1 svg").count() == 0
    page.locator("#run-1 > summary").click()
    page.wait_for_function("document.querySelectorAll('#run-1 [data-chart] svg[role=img]').length > 10")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert faults == []
    assert findings(page) == []
