"""Write a run as one HTML page: the template, its style and script, filled with the sections' values."""

import base64
import hashlib
import json
import time
from importlib import resources

from ... import __version__
from ..charts import svg
from ..folder import RunFolder
from ..run_record import home_as_tilde
from ..texts import PAGE
from ..what_if import Replanned
from . import findings, sections, summary, table

FILES = "balance_shim.report.page"


def page(run: RunFolder, replanned: Replanned) -> str:
    """Return the page. Texts of the run are escaped: names of models and messages are anybody's."""
    # torch depends on it, so it is there wherever a training was.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_file("page.html.j2"))
    script = _file("page.js")
    combinations = table.what_if(run, replanned)
    return template.render(
        t=PAGE,
        style=f"{svg.style(standalone=False)}\n{_file('page.css')}",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made_by=PAGE["made_by"].format(
            version=__version__, date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), folder=home_as_tilde(run.path)
        ),
        remarks=run.remarks,
        summary=summary.of(run),
        findings=findings.of(run),
        memory=sections.memory(run, replanned),
        compared=sections.compared(run),
        over_time=sections.over_time(run),
        timing=sections.timing(run),
        maps=sections.maps(run),
        what_if=combinations,
        # Inside of <script> neither quotes nor entities count: only "<" could end it.
        data=json.dumps(combinations["data"]).replace("<", "\\u003c") if combinations["data"] else "",
        machine=summary.machine(run),
    )


def _file(name: str) -> str:
    return resources.files(FILES).joinpath(name).read_text(encoding="utf-8")
