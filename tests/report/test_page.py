"""The page of `balance-shim report`: complete, self-contained, and safe whatever the folder has in it."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from transformers import LlamaConfig

import balance_shim
from balance_shim.report import folder, what_if
from balance_shim.report.page import render, summary
from balance_shim.report.recorded_plan import plan_of
from balance_shim.report.what_if import Before, Combination, Replanned
from tests.report import folders

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&{{ 7*7 }}"
GRID = [
    Combination(seq_len, batch, checkpointing, seq_len * batch < 256, "cuda:1", seq_len * batch * folders.MIB,
                256 * folders.MIB)
    for seq_len in (64, 128) for batch in (1, 2, 4) for checkpointing in (False, True)
]  # fmt: skip


class Elements(HTMLParser):
    """All elements with their attributes, and the text of scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts, self.in_script = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = False

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data


def page_of(path, replanned=None, **files):
    run = folder.read(str(folders.write(path, **files)))
    before = Before(plan_of(folders.plan(), 1).devices, {"cpu": 5 * folders.MIB}, fits=False)
    return render.page(run, replanned or Replanned(before, "", tuple(GRID)))


def test_everything_is_there_and_nothing_comes_from_elsewhere(tmp_path):
    """All sections have a heading, ids are unique, charts have text alternatives, and no resource is loaded."""
    found = Elements(page_of(tmp_path))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    sections = {"found", "memory", "compared", "over-time", "timing", "map", "what-if", "machine"}
    assert len(ids) == len(set(ids)) and sections <= set(ids)
    assert not any(tag in ("link", "iframe", "img", "object") for tag, _ in found.elements)
    assert not any("src" in attributes or "href" in attributes for _, attributes in found.elements)
    charts = [attributes for tag, attributes in found.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) >= 4 and all(attributes["aria-label"] for attributes in charts)
    assert "url(" not in page_of(tmp_path) and "@import" not in page_of(tmp_path)


def test_the_only_script_that_may_run_is_ours(tmp_path):
    """The policy in the page names the hash of its one script; the table's data is no script."""
    page = page_of(tmp_path)
    found = Elements(page)
    kinds = [attributes.get("type") for tag, attributes in found.elements if tag == "script"]
    assert kinds == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page


def test_hostile_texts_are_escaped(tmp_path):
    """In names of models and devices, messages, findings, settings, maps and the table's data."""
    run = folders.run(program=HOSTILE, settings={"BALANCE_X": HOSTILE}, libraries={HOSTILE: HOSTILE})
    run["devices"][0]["card"] = HOSTILE
    plan = folders.plan(HOSTILE, notes=[HOSTILE])
    plan["devices"][0]["name"] = HOSTILE
    plan["device_map"][HOSTILE] = 0
    facts = {"headline": HOSTILE, "causes": [HOSTILE], "table": [[HOSTILE], [HOSTILE]], "remedies": [HOSTILE]}
    said = [folders.event("out of memory", HOSTILE, **facts), folders.event(HOSTILE, HOSTILE)]
    steps = [folders.step(1), folders.step(2)]
    steps[0]["devices"][HOSTILE] = steps[0]["devices"]["cuda:0"]
    files = {
        "run.json": json.dumps(run), "plan.json": json.dumps(plan), "events.jsonl": folders.lines(said),
        "memory.jsonl": folders.lines(steps),
    }  # fmt: skip
    worst = "</script><script>alert(3)</script>"
    grid = Replanned(None, HOSTILE, (Combination(64, 2, False, True, worst, 1, 2),))
    page = page_of(tmp_path, grid, **files)
    found = Elements(page)
    assert sum(tag == "script" for tag, _ in found.elements) == 2
    assert not any(tag == "img" for tag, _ in found.elements)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "49" not in re.findall(r"alert\(2\)>&(.*?)<", page) and "{{ 7*7 }}" in page
    assert json.loads(found.scripts[0])["answers"]["0|64|2"]["text"].count(worst) == 1


def test_the_table_and_its_data_agree(tmp_path):
    """Each cell of the table has an answer of the same outcome; this run is marked once."""
    found = Elements(page_of(tmp_path))
    cells = {each["data-key"]: each["class"] for tag, each in found.elements if tag == "td" and "data-key" in each}
    answers = json.loads(found.scripts[0])["answers"]
    assert cells.keys() == answers.keys() and len(cells) == len(GRID)
    assert all(answers[key]["fits"] == css.startswith("fits") for key, css in cells.items())
    assert [key for key, css in cells.items() if "current" in css] == ["0|64|2"]
    assert {key for key, answer in answers.items() if not answer["fits"]} == {"0|64|4", "1|64|4", "0|128|2", "1|128|2",
                                                                            "0|128|4", "1|128|4"}  # fmt: skip


@pytest.mark.parametrize("missing", ["plan.json", "run.json", "memory.jsonl"])
def test_sections_without_a_record_are_left_out(tmp_path, missing):
    """A page of any two of the three files has no empty chart and no placeholder."""
    nothing = Replanned(no_before="reason", no_combinations="reason")
    found = Elements(page_of(tmp_path, nothing, **{missing: None}))
    ids = {attributes.get("id") for _, attributes in found.elements}
    assert ("over-time" in ids) == ("compared" in ids) == (missing != "memory.jsonl")
    assert ("map" in ids) == (missing != "plan.json")


def test_what_was_found_comes_with_a_remedy(tmp_path):
    """Growth, an out-of-memory with its table, and a step that failed; the gravest first."""
    grows = {"kind": "kept", "since": 3, "text": "memory grows since step 3"}
    steps = [folders.step(1), folders.step(4, findings=[grows]), folders.step(5, unfinished=True)]
    page = page_of(tmp_path, **{"memory.jsonl": folders.lines(steps)})
    assert page.index("memory grows since step 3") < page.index("did not finish")
    assert "detach()" in page and "memory grows</span>" in page
    facts = {
        "headline": "no room",
        "causes": [],
        "table": [["device"], ["cuda:0"]],
        "remedies": ["set this"],
        "step": 5,
    }
    said = [folders.event("repair", "repaired"), folders.event("out of memory", "no room\n  set this", **facts)]
    page = page_of(tmp_path, **{"events.jsonl": folders.lines(said)})
    assert page.index("no room") < page.index("set this") < page.index("repaired") and "ran out of memory" in page


def test_planned_again_from_the_folder_alone(tmp_path):
    """The config in run.json gives transformers' own map and the table, whose cells are what `plan` predicts."""
    run = folder.read(str(folders.write(tmp_path)))
    replanned = what_if.replan(run)
    assert not replanned.no_before and not replanned.no_combinations and replanned.before is not None
    assert [device.name for device in replanned.before.devices] == list(folders.DEVICES)
    cells = {(each.seq_len, each.batch_size, each.checkpointing): each for each in replanned.combinations}
    assert {seq_len for seq_len, _, _ in cells} == {16, 32, 64, 128, 256}  # 256 is the model's longest
    assert cells[64, 2, False].fits and cells[64, 2, False].peak > cells[16, 1, False].peak
    assert cells[256, 8, False].peak > cells[256, 8, True].peak
    for seq_len, batch_size, checkpointing in ((64, 2, False), (128, 4, False), (128, 4, True)):
        planned = balance_shim.plan(
            LlamaConfig(**folders.LLAMA), "2x4GiB", seq_len=seq_len, batch_size=batch_size, reserve=0, cache=False,
            gradient_checkpointing=checkpointing, optimizer="adamw_torch", precision="fp32", loss="full",
        )  # fmt: skip
        peak = planned.worst.predicted_peak - planned.worst.device.overhead  # the folder's devices have none
        assert cells[seq_len, batch_size, checkpointing].peak == peak
    ET.fromstring(re.search(r"<svg.*?</svg>", render.page(run, replanned), re.S)[0])


def test_a_config_that_cannot_be_planned_is_a_reason(tmp_path):
    """A model type that this transformers does not know leaves the page whole, with one sentence."""
    model = folders.run()["models"][0]
    strange = {**model, "config": {"model_type": "not_there", "architectures": ["NotThere"]}}
    files = {"run.json": json.dumps(folders.run(models=[strange]))}
    replanned = what_if.replan(folder.read(str(folders.write(tmp_path, **files))))
    assert "not_there" in replanned.no_combinations and not replanned.combinations
    assert replanned.no_combinations.replace("'", "&#39;") in page_of(tmp_path, replanned, **files)


def test_the_choice_of_mode_auto_is_shown(tmp_path):
    """With the table of all candidates and the reasons: an action, and no problem."""
    table = [["candidate", "step", "reason"], ["* balanced map", "1 s", "the fastest that fits"]]
    said = [folders.event("choice", "candidates", level="info", headline="auto chooses: balanced map", table=table)]
    page = page_of(tmp_path, **{"events.jsonl": folders.lines(said)})
    assert "How mode auto chose" in page and "the fastest that fits" in page and 'class="verdict good"' in page


def test_a_column_without_a_value_is_left_out():
    """Simulated devices of no kind have no product's name; a machine with one such card keeps the column."""
    devices = [{"name": "npu:0", "card": "", "total": 1 << 30}, {"name": "npu:1", "card": "", "total": 1 << 31}]
    run = folder.RunFolder("", folders.run(devices=devices), (), (), (), (), ())
    table = summary.machine(run)["devices"]
    assert table == {"header": ["device", "device memory"], "rows": [["npu:0", "1.0 GiB"], ["npu:1", "2.0 GiB"]]}
    devices[1]["card"] = "NVIDIA Test"
    assert summary.machine(run)["devices"]["header"] == ["device", "name", "device memory"]
