"""Charts: what they draw is in proportion, inside, and escaped; the picture of `balance-shim plan --picture`."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from balance_shim.cli.main import main
from balance_shim.report.charts import bars, curves, svg
from balance_shim.report.charts.bars import Bar, memory_bar
from balance_shim.report.charts.curves import Curve, thinned
from tests.report import folders

NAME = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parents[2]


def drawn(picture):
    """Return [(class, x, width)] of the rectangles whose place is a share of the width."""
    number = "([0-9.]+)%?"
    pattern = rf'<rect x="{number}" y="[0-9.]+" width="{number}%" height="18" class="([^"]+)"'
    return [(css, float(x), float(width)) for x, width, css in re.findall(pattern, picture)]


def test_segments_are_in_proportion():
    """They follow each other without a gap, on one scale for all bars, and none is wider than the picture."""
    first = memory_bar("a", {"weights": 300, "activations": 100, "optimizer": 0}, 500)
    second = memory_bar("b", {"weights": 800}, 500)
    found = drawn(bars.fluid([first, second], "alternative"))
    segments = [each for each in found if each[0].startswith("segment")]
    assert [css for css, _, _ in segments] == [
        "segment term-weights",
        "segment term-activations",
        "segment term-weights",
    ]
    (_, _, weights), (_, start, activations), (_, _, more) = segments
    assert start == pytest.approx(weights, abs=0.01) and weights == pytest.approx(3 * activations, abs=0.01)
    assert more == pytest.approx(8 * activations, abs=0.02) and more <= 100
    assert second.is_over and not first.is_over
    (over,) = [each for each in found if each[0] == "over"]  # what is beyond the capacity has a frame
    assert over[2] == pytest.approx(3 * activations, abs=0.01)


def test_texts_are_escaped():
    """Labels, headings, titles and keys are anybody's."""
    worst = '"><script>&'
    picture = bars.standalone([Bar(worst, worst, {worst: 1.0}, 2.0, worst)], worst, worst, {worst: worst})
    assert "<script>" not in picture and len(list(ET.fromstring(picture).iter(f"{NAME}text"))) >= 4
    lines = curves.standalone([Curve(worst, ((1, 2.0), (2, 3.0)), 2.5)], worst, worst, {worst: 4.0}, worst)
    assert "<script>" not in lines and ET.fromstring(lines) is not None


def test_long_series_keep_their_highest_value():
    """Neighbours are joined: the last step and the highest value of each group stay."""
    points = [(step, 9.0 if step == 777 else 1.0) for step in range(1, 5001)]
    joined = thinned(points)
    assert len(joined) <= curves.MOST_POINTS and joined[-1][0] == 5000
    assert max(value for _, value in joined) == 9.0
    assert thinned([]) == () and thinned(points[:3]) == tuple(points[:3])


def test_no_line_crosses_a_figure_of_the_axis():
    """A capacity just above a round number leaves that number out: its line would go through the text."""
    curve = Curve("cuda:0", ((1, 40.0 * folders.MIB), (2, 43.0 * folders.MIB)))
    texts = {most: curves.fluid([curve], "", {"capacity": most * folders.MIB}) for most in (230, 256)}
    assert ">200 MiB<" in texts[256] and ">250 MiB<" not in texts[256]
    assert ">200 MiB<" in texts[230]


@pytest.mark.parametrize("most", [0.004, 0.9, 1, 7, 23.5, 1e3, 8.4e6])
def test_axes_have_few_round_numbers(most):
    """Two to nine, evenly spaced, none beyond the ends."""
    found = svg.ticks(0, most)
    assert 2 <= len(found) <= 9 and found[0] == 0 and found[-1] <= most * (1 + 1e-9)
    steps = [round(after - before, 9) for before, after in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))


def test_a_plan_is_drawn(tmp_path, capsys):
    """`plan --picture`: each device twice, under auto and under the plan, with terms and a text alternative."""
    (tmp_path / "config.json").write_text(json.dumps(folders.LLAMA))
    path = tmp_path / "map.svg"
    words = ["plan", str(tmp_path), "--gpus", "2x64MiB", "--seq-len", "64", "--picture"]
    assert main([*words, str(path)]) == 0
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    texts = [text.text for text in root.iter(f"{NAME}text")]
    assert texts.count("before: transformers' auto") == texts.count("after: balanced map") == 2
    assert {"cuda:0", "cuda:1", "weights", "optimizer state"} <= set(texts)
    assert "cuda:1" in root.find(f"{NAME}desc").text and root.find(f"{NAME}title").text.startswith("LlamaForCausalLM")
    assert "xlink" not in path.read_text() and "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert main([*words, str(tmp_path / "config.json")]) == 2  # the model's own config
    assert "must not be overwritten" in capsys.readouterr().err


def test_the_readme_opens_with_a_picture():
    """It is there, well-formed, names the cards that run out of memory, and has a script that draws it."""
    (place,) = re.findall(r"!\[[^\]]{40,}\]\((docs/pictures/[\w-]+\.svg)\)", (ROOT / "README.md").read_text("utf-8"))
    root = ET.fromstring((ROOT / place).read_text(encoding="utf-8"))
    over = [text.text for text in root.iter(f"{NAME}text") if "bad" in text.attrib["class"]]
    assert len(over) == 2 and all("GiB" in text for text in over)
    assert Path(place).name in (ROOT / "docs" / "pictures" / "draw.py").read_text(encoding="utf-8")
