"""transformers' own example scripts, unmodified: trained with evaluation, then resumed from the checkpoint.

`EXAMPLES` is the folder `examples/pytorch` of a checkout of transformers. Models and data are local files; metrics,
which the scripts would download, are small modules in the folder where the scripts run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import MODELS, NAME, OUTPUT, ROWS, words, write

EXAMPLES = Path(os.environ["EXAMPLES"])
METRIC = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features({features}))

    def _compute(self, predictions, references):
        return {result}
"""
ACCURACY = {
    "features": '{"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}',
    "result": '{"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}',
}
TEXT = 'datasets.Value("string")'
SQUAD = {
    "features": f'{{"predictions": {{"id": {TEXT}, "prediction_text": {TEXT}}}, "references": {{"id": {TEXT}, '
    f'"answers": datasets.features.Sequence({{"text": {TEXT}, "answer_start": datasets.Value("int32")}})}}}}',
    "result": '{"exact_match": 0.0, "f1": float(len(predictions))}',
}


def metric(name, content):
    folder = OUTPUT / "here" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(METRIC.format(name=name.title(), **content))


def files(kind, lines, *, join="\n".join):
    """Write the data, and eight lines of it for evaluation; return the scripts' options."""
    options = {}
    for name, count in (("train", None), ("validation", 8)):
        file = OUTPUT / f"{name}.{kind}"
        file.write_text(join(lines[:count]))
        options[f"{name}_file"] = file
    return options


def run_clm():
    metric("accuracy", ACCURACY)
    lines = [words(row, 48) for row in range(40)]
    return "language-modeling", "llama", "CausalLM", {**files("txt", lines), "block_size": 48}


def run_classification():
    metric("accuracy", ACCURACY)
    rows = [json.dumps({"sentence": words(row, 16 + row % 8), "label": f"kind {row % 3}"}) for row in range(32)]
    more = {"text_column_names": "sentence", "label_column_name": "label", "max_seq_length": 64}
    return "text-classification", "classifier", "SequenceClassification", {**files("json", rows), **more}


def run_qa():
    metric("squad", SQUAD)
    rows = []
    for row in range(32):
        context = words(row + 3, 20 + row % 6)
        answer = " ".join(context.split()[5:7])
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": str(row), "question": words(row, 8), "context": context, "answers": answers})
    both = files("json", rows, join=lambda chosen: json.dumps({"data": chosen}))
    return "question-answering", "answers", "QuestionAnswering", {**both, "max_seq_length": 64, "doc_stride": 16}


def start(script, options, flags=()):
    command = [sys.executable, str(script)]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command += [f"--{flag}" for flag in flags]
    done = subprocess.run(command, cwd=OUTPUT / "here")
    if done.returncode:
        sys.exit(done.returncode)


OUTPUT.mkdir(parents=True, exist_ok=True)
folder, model, kind, own = globals()[NAME]()
saved = OUTPUT / "saved"
options = {
    "model_name_or_path": MODELS / model, "output_dir": saved, "per_device_train_batch_size": ROWS,
    "per_device_eval_batch_size": ROWS, "learning_rate": "1e-3", "logging_steps": 1, "save_strategy": "steps",
    "save_steps": 2, "report_to": "none", "seed": 1, "cache_dir": OUTPUT / "cache", **own,
}  # fmt: skip
flags = ("do_train", "do_eval")
start(EXAMPLES / folder / f"{NAME}.py", {**options, "max_steps": 2}, flags)
resumed = {"max_steps": 4, "resume_from_checkpoint": saved / "checkpoint-2"}
start(EXAMPLES / folder / f"{NAME}.py", {**options, **resumed}, flags)
history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
losses = [entry["loss"] for entry in history if "loss" in entry]
results = json.loads((saved / "all_results.json").read_text())
write([*losses, results.get("eval_loss", results.get("eval_f1"))], kind=kind)
