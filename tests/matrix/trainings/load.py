"""Load what trainings have saved, in plain libraries without the shim: load.py MODELS RESULT FOLDER ...

Writes to RESULT, as JSON, FOLDER -> {parameter: shape}, or FOLDER -> the error's last line.
"""

import json
import sys
from pathlib import Path

import transformers

MODELS, RESULT, FOLDERS = Path(sys.argv[1]), Path(sys.argv[2]), map(Path, sys.argv[3:])


def load(folder, record):
    saved = folder / "saved"
    if record["kind"] == "PEFT":
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(MODELS / record["base"])
        return peft.PeftModel.from_pretrained(base, saved)
    if record["kind"] == "sentences":
        import sentence_transformers

        return sentence_transformers.SentenceTransformer(str(saved))
    kind = "AutoModelForCTC" if record["kind"] == "CTC" else f"AutoModelFor{record['kind']}"
    model, report = getattr(transformers, kind).from_pretrained(saved, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise ValueError(f"{what}: {list(report[what])[:3]}")
    return model


found = {}
for folder in FOLDERS:
    try:
        model = load(folder, json.loads((folder / "losses.json").read_text()))
        found[str(folder)] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception as error:
        found[str(folder)] = f"{type(error).__name__}: {error}".splitlines()[0]
RESULT.write_text(json.dumps(found))
