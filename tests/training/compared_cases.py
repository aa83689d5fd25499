"""Trains students with teachers of the same vocabulary on simulated devices of several sizes; writes JSON.

Run by test_compared_heads.py: `python compared_cases.py FOLDER_OF_A_STUDENT RESULT.json`. The teacher is made here.
"""

import contextlib
import gc
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import balance_shim
from balance_shim.placement import colocations

student_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
teacher_folder = result_path.parent / "teacher"
# Four devices of 64 MiB are simulated; some of them are capped.
LAYOUTS = {
    "alike": "",
    "larger first": "2=20MiB,3=20MiB",
    "larger last": "0=20MiB,1=20MiB",
    "small first": "0=6MiB",
}
results = {}


class ByHeads(Trainer):
    """Calls backbones and heads one by one, and compares what the heads give where they give it."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"].to(self.teacher.device)
        taught = self.teacher.lm_head(self.teacher.model(input_ids=ids).last_hidden_state).detach()
        logits = model.lm_head(model.model(input_ids=inputs["input_ids"]).last_hidden_state)
        return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(taught, -1), log_target=True, reduction="batchmean")


class ByLogits(Trainer):
    """Compares the logits that the models return."""

    teacher = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(input_ids=inputs["input_ids"]).logits
        return outputs.loss + F.mse_loss(outputs.logits, taught)


def arguments(**options):
    return TrainingArguments(
        output_dir=str(result_path.parent / "out"), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip


def head_device(model):
    return str(model.get_output_embeddings().weight.device)


def train(trainer_class=ByHeads, device_map="auto", teacher_map="auto", length=24, **options):
    set_seed(7)
    args = arguments(**options)
    student = AutoModelForCausalLM.from_pretrained(student_folder, device_map=device_map)
    before = head_device(student)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, device_map=device_map and teacher_map)
    teacher.eval().requires_grad_(False)
    if device_map is None:
        teacher.to(args.device)
    ids = [[(11 * number + 5 * place) % 500 for place in range(length)] for number in range(12)]
    data = [{"input_ids": sequence, "labels": sequence} for sequence in ids]
    trainer = trainer_class(model=student, args=args, train_dataset=data)
    trainer.teacher = teacher
    loaded = head_device(teacher)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "heads": [before, loaded, head_device(student), head_device(teacher)],
        "devices": sorted({str(parameter.device) for parameter in student.parameters()}),
    }


def distilled(device_map="auto"):
    """Train with TRL's `DistillationTrainer`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer

    set_seed(7)
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "three": 5}, "[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )
    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder, device_map=device_map) for folder in (student_folder, teacher_folder))
    trainer = DistillationTrainer(
        student,
        teacher,
        DistillationConfig(
            output_dir=str(result_path.parent / "out"), max_steps=2, per_device_train_batch_size=2, logging_steps=1,
            max_completion_length=6, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["one two", "two three one", "three", "one one"]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "heads": [head_device(student), head_device(teacher)],
        "devices": sorted({str(parameter.device) for parameter in student.parameters()}),
    }


def case(name, perform=train, mode="balanced", caps="", environ=None, **options):
    balance_shim.uninstall()
    colocations.forget()  # as a process of its own would
    gc.collect()
    before = dict(os.environ)
    os.environ.update({"BALANCE_MAX_MEMORY": caps} if caps else {})
    os.environ.update(environ or {})
    stderr, outcome = io.StringIO(), {}
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            balance_shim.install(mode=mode)
            outcome = perform(**options)
        except Exception as failure:
            outcome = {"error": str(failure), "traceback": traceback.format_exc()}
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = stderr.getvalue()
    results[name] = outcome


def main():
    torch.manual_seed(1)
    config = json.loads((student_folder / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 10})).save_pretrained(teacher_folder)
    one = {"device_map": None, "mode": "off"}
    case("heads, one device", **one)
    for name, caps in LAYOUTS.items():
        case(f"heads, {name}", caps=caps)
    case("logits, one device", trainer_class=ByLogits, **one)
    case("logits, larger first", trainer_class=ByLogits, caps=LAYOUTS["larger first"])
    case("rebalanced", caps=LAYOUTS["larger last"], environ={"BALANCE_REBALANCE": "1"})
    case("teacher of a map of its own", teacher_map={"": 1})
    from trl import __version__

    if int(__version__.split(".")[0]) >= 1:
        case("TRL, one device", distilled, **one)
        case("TRL, larger last", distilled, caps=LAYOUTS["larger last"])
    result_path.write_text(json.dumps(results))


main()
