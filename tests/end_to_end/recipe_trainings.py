"""Train as the recipes do, one after another in this process, with small models: `recipe_trainings.py JOBS.json`.

Each job is {"name", "variables", "script"}: the shim is armed again with the variables, and the script runs in a folder
with the models and `pairs.jsonl`. A line on standard error starts each.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import balance_shim

for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    gc.collect()  # models of the recipe before
    balance_shim.uninstall()
    os.environ.update(job["variables"])
    print(f"RECIPE {job['name']}", file=sys.stderr, flush=True)
    balance_shim.install()
    Path("train.py").write_text(job["script"], encoding="utf-8")
    runpy.run_path("train.py", run_name="__main__")
    for name in job["variables"]:
        del os.environ[name]
