"""The page in a real browser: the what-if table answers; nothing is cut or overlaps, in three widths and two themes."""

import pytest

from balance_shim.report import folder
from balance_shim.report.page import render
from balance_shim.report.recorded_plan import plan_of
from balance_shim.report.what_if import Before, Replanned
from tests.report import browser, folders
from tests.report.test_page import GRID

pytestmark = pytest.mark.skipif(
    not (browser.DRIVER and browser.BROWSER),
    reason="needs Chromium and chromedriver (Debian: chromium chromium-driver); test_page.py checks the page's data",
)
# Elements whose content is wider than they are, where nothing scrolls; texts of charts that meet another one or leave
# the chart; whether the page itself scrolls sideways.
LAYOUT = """
const found = [];
if (document.documentElement.scrollWidth > innerWidth) found.push("page " + document.documentElement.scrollWidth);
for (const each of document.querySelectorAll("main *, header *"))
  if (!each.closest("svg, .scroll, pre, details:not([open])") && each.scrollWidth > each.clientWidth + 1
      && getComputedStyle(each).display !== "inline")
    found.push("cut: " + each.tagName + " " + each.textContent.slice(0, 40));
for (const chart of document.querySelectorAll("svg.chart")) {
  const frame = chart.getBoundingClientRect();
  const texts = [...chart.querySelectorAll("text")].map(each => [each.textContent, each.getBoundingClientRect()]);
  texts.forEach(([words, box], place) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push("outside: " + words);
    for (const [others, other] of texts.slice(place + 1))
      if (box.left < other.right - 1 && other.left < box.right - 1 && box.top < other.bottom - 4 &&
          other.top < box.bottom - 4) found.push("overlap: " + words + " / " + others);
  });
}
return found;
"""
# The contrast of each element's text with what is behind it, as WCAG 2 computes it; those below 4.5.
CONTRAST = """
function values(colour) { return colour.match(/[\\d.]+/g).map(Number); }
function luminance([r, g, b]) {
  const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
function behind(each) {
  for (; each; each = each.parentElement) {
    const colour = values(getComputedStyle(each).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
}
const found = [];
for (const each of document.querySelectorAll("main *, header *, footer *")) {
  if (!each.childNodes.length || ![...each.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
  if (each.closest("script, title, desc, option")) continue;
  const style = getComputedStyle(each);
  const colour = each.closest("svg") ? style.fill : style.color;
  const [a, b] = [luminance(values(colour)), luminance(behind(each))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(ratio.toFixed(2) + " " + each.tagName + " " + each.textContent.slice(0, 30));
}
return found;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with all sections, eight devices, long names, and every kind of finding."""
    path = tmp_path_factory.mktemp("page")
    facts = {
        "headline": "out of memory on cuda:1 in the forward pass of model.layers.3.self_attn, step 6, of 1000.0 MiB",
        "causes": ["cause: this micro-batch is 16.0 times as large as any before"],
        "table": [["device", "as planned", "for this batch", "measured", "others", "of"]]
        + [[name, "900.0 MiB", "1200.0 MiB", "990.0 MiB", "0 B", "1000.0 MiB"] for name in folders.DEVICES],
        "remedies": ["BALANCE_DEVICE_MAP=/a/very/long/path/to/a/report/folder/of/somebody/device_map_that_fits.json"],
        "step": 6,
    }
    said = [folders.event("out of memory", "x", **facts), folders.event("kept", "memory grows", since=3)]
    folders.write(path, **{"events.jsonl": folders.lines(said)})
    before = Before(plan_of(folders.plan(), 1).devices, {"cpu": 5 * folders.MIB}, fits=False)
    written = render.page(folder.read(str(path)), Replanned(before, "", tuple(GRID)))
    (path / "report.html").write_text(written, encoding="utf-8")
    return path / "report.html"


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as session:
        yield session


def test_the_what_if_table_answers(chromium, page):
    """Choosing another length, micro-batch or checkpointing gives the sentence and marks the cell of that choice."""
    chromium.open(page)
    state = (
        "return [document.getElementById('answer').textContent, document.getElementById('answer').className, "
        "[...document.querySelectorAll('td.chosen')].map(each => each.dataset.key)]"
    )
    assert chromium.run(state) == ["fits: fullest device cuda:1, 128.0 MiB of 256.0 MiB (50%).", "fits", ["0|64|2"]]
    chromium.choose("#choose-length", "128")
    chromium.choose("#choose-batch", "4")
    text, css, chosen = chromium.run(state)
    assert text == "does not fit: fullest device cuda:1, 512.0 MiB of 256.0 MiB (200%)."
    assert (css, chosen) == ("over", ["0|128|4"])
    chromium.choose("#choose-checkpointing", "on")
    assert chromium.run(state)[2] == ["1|128|4"]
    assert not chromium.errors()  # nothing is loaded from elsewhere, and no script is refused


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_nothing_is_cut_overlaps_or_is_faint(chromium, page, width, dark):
    """Texts stay inside, apart from each other, and have a contrast of at least 4.5 to 1."""
    chromium.open(page, width, dark)
    chromium.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert chromium.run(LAYOUT) == []
    assert chromium.run(CONTRAST) == []
