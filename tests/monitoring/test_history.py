"""The record of a whole training in bounded memory, its table and its picture."""

import xml.etree.ElementTree as ET

from balance_shim.monitoring import report
from balance_shim.monitoring.history import MOST_POINTS, History
from balance_shim.monitoring.readings import Reading
from balance_shim.report.charts import curves

GIB = 1 << 30


def history(steps, highest_at=None):
    records = History(["cuda:0", "cuda:1"], [24 * GIB, 24 * GIB])
    for step in range(1, steps + 1):
        peak = 20 * GIB if step == highest_at else 8 * GIB + step
        records.add(step, [Reading(4 * GIB, 9 * GIB, peak, None if step % 2 else GIB), Reading(GIB, GIB, 2 * GIB, 0)])
    return records


def test_long_trainings_keep_their_peaks_in_few_points():
    """Points are joined and not dropped: one high peak among a hundred thousand steps stays, in order."""
    records = history(100_000, highest_at=77_777)
    assert len(records.points) <= MOST_POINTS
    assert records.highest("peaks") == (20 * GIB, 2 * GIB) and records.highest("others") == (GIB, 0)
    steps = [point.step for point in records.points]
    assert steps == sorted(set(steps)) and steps[-1] == 100_000


def test_the_table_has_predicted_beside_measured():
    """A row a device, with the difference as a part of the prediction; a device without a plan has blanks."""
    text = report.predicted_and_measured(history(5, highest_at=3), {"cuda:0": 16 * GIB})
    first, second = text.splitlines()[2:]
    assert first.split() == ["cuda:0", "16.0", "GiB", "20.0", "GiB", "+25.0%", "1.0", "GiB", "24.0", "GiB"]
    assert second.split() == ["cuda:1", "2.0", "GiB", "0", "B", "24.0", "GiB"]


def test_the_picture_is_whole():
    """It is well-formed, all of it is inside, and has a line for each device, predictions, capacity and a key."""
    name = "{http://www.w3.org/2000/svg}"
    for steps in (1, 2, 9, 3000):
        root = ET.fromstring(report.picture(history(steps), {"cuda:0": 16 * GIB, "cuda:1": 3 * GIB}))
        lines = list(root.iter(f"{name}polyline"))
        assert len(lines) == 2
        for line in lines:
            for pair in line.attrib["points"].split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= curves.UNITS and 0 <= y <= curves.UNITS
        texts = [text.text for text in root.iter(f"{name}text")]
        assert "capacity 24.0 GiB" in texts and any(text.endswith(" GiB") and text[0].isdigit() for text in texts)
        assert any(text.startswith("cuda:1: 2.0 GiB, predicted 3.0 GiB") for text in texts)
        drawn = [line.attrib["class"].split()[0] for line in root.iter(f"{name}line")]
        assert drawn.count("predicted") == 2 and drawn.count("capacity") == 1
        assert len([text for text in texts if text.removeprefix("step ").isdigit()]) >= 2
