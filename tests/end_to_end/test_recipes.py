"""The recipes of docs/recipes.md work as written: their commands and scripts, on small models and simulated devices."""

import json
import re
import sys

import pytest

from benchmarks.models import MODELS, REMOTE_CODE
from tests import models, recipes
from tests.cli.running import together
from tests.end_to_end import internvl, swift
from tests.end_to_end.run import SHIM, read_peaks, run_command

TEXT = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", device_map="auto")
"""
PICTURES = """
import torch
rows = [{"input_ids": [5, 502, *[500] * 4, 9, 10 + number], "labels": [5, 502, *[500] * 4, 9, 10 + number],
         "mm_token_type_ids": [0, 0, 1, 1, 1, 1, 0, 0],
         "pixel_values": torch.ones(16, 1176).tolist(), "image_grid_thw": [[1, 4, 4]]} for number in range(8)]

def collate(rows):
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "pixel_values": batch["pixel_values"].flatten(0, 1),
            "image_grid_thw": batch["image_grid_thw"].flatten(0, 1)}
"""
SENTENCES = """
rows = [{"input_ids": [5 + number] * 32, "labels": [5 + number] * 32} for number in range(64)]
collate = None
"""
TRAIN = """
from transformers import Trainer, TrainingArguments
arguments = TrainingArguments("output", max_steps=STEPS, per_device_train_batch_size=2, report_to=[],
                              save_strategy="no", disable_tqdm=True, seed=1)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=CALLBACKS)
trainer.train()
"""


# Runs out of memory in the second layer, as if the batch were that large.
WANTS = """
import torch

class WantsMore(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: torch.empty(1 << 31, device="npu:0"))
        return super().training_step(model, inputs, *args, **kwargs)

"""
CATCHES = """
try:
    trainer.train()
except torch.OutOfMemoryError:
    pass
"""


def training(load, examples, steps=2, callbacks="[]"):
    return load + examples + TRAIN.replace("STEPS", str(steps)).replace("CALLBACKS", callbacks)


def command(heading, which=0):
    """The one of the recipe's commands that trains."""
    trains = [
        candidate for candidate in recipes.commands(heading) if candidate.arguments[:2] == ["balance-shim", "run"]
    ]
    assert trains[which].arguments[2:] == ["train.py"], trains
    return trains[which]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Recipe -> what it wrote to standard error; all of them train in one process, on unequal devices."""
    folder = tmp_path_factory.mktemp("recipes")
    models.saved_llama(folder / "model", hidden_size=128, num_hidden_layers=8)
    models.save_tokenizer(folder / "model")
    vision = models.qwen_vl()
    type(vision)(vision.config).save_pretrained(folder / "pictures")
    pairs = [{"prompt": f"w{n} w8", "chosen": f" w{n + 1} w3 w4", "rejected": f" w{n + 2} w5"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    (load_vision,) = recipes.blocks("Qwen2.5-VL: full fine-tuning", "python")
    (dpo,) = recipes.blocks("TRL: DPO with a model path", "python")
    (keeps,) = recipes.blocks("Memory that grows", "python")
    batch = "\nbatch = {name: torch.tensor([rows[0][name]] * 8, device='npu:0') for name in ('input_ids', 'labels')}\n"
    load_vision = load_vision.replace("Qwen/Qwen2.5-VL-7B-Instruct", "pictures")
    scripts = {
        "Qwen2.5-VL: full fine-tuning": training(load_vision, PICTURES),
        "TRL: DPO with a model path": dpo.replace("Qwen/Qwen2.5-7B-Instruct", "model"),
        "Unequal cards": training(TEXT, SENTENCES),
        "Memory that grows": training(
            f"import torch\n{TEXT}{keeps}", SENTENCES + batch, 24, callbacks="[KeepsLosses()]"
        ),
    }  # fmt: skip
    tight = training(f"from transformers import Trainer\n{TEXT}", SENTENCES).partition("trainer = Trainer(")
    advice = f"{tight[0]}{WANTS}trainer = WantsMore({tight[2]}".replace("trainer.train()", CATCHES)
    jobs = [{"name": name, "variables": command(name).variables, "script": script} for name, script in scripts.items()]
    jobs.append({"name": "advice", "variables": {"BALANCE_LANG": "zh"}, "script": advice})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [
        sys.executable,
        *SHIM,
        str(recipes.PAGE.parents[1] / "tests/end_to_end/recipe_trainings.py"),
        "jobs.json",
    ]
    outcome = run_command(program, {"BALANCE_SIMULATE": "2x256MiB+2x512MiB"}, cwd=folder).expect_success()
    parts = re.split(r"^RECIPE (.+)\n", outcome.stderr, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), folder


def test_plans_have_the_figures_of_the_page(tmp_path):
    """`balance-shim plan` as on the page, with the configs of those models, exits with 0 and prints what it quotes."""
    config = {"OpenGVLab/InternVL2_5-26B": "InternVL2.5-26B-remote", "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-7B",
              "Qwen/Qwen2.5-7B": "Qwen2.5-7B"}  # fmt: skip
    headings = re.findall(r"^## (.+)$", recipes.PAGE.read_text(encoding="utf-8"), re.M)
    plans = {
        h: candidate.arguments
        for h in headings
        for candidate in recipes.commands(h)
        if candidate.arguments[1] == "plan"
    }
    lines = []
    for arguments in plans.values():
        place = next(argument for argument in arguments if argument in config)
        lines.append(
            [str(_config_of(config[place], tmp_path)) if argument == place else argument for argument in arguments[2:]]
        )
    done = dict(zip(plans, together(*lines, timeout=600), strict=True))
    assert all(code == 0 for code, _, _ in done.values()), done
    page = recipes.PAGE.read_text(encoding="utf-8")
    expected = {
        "ms-swift: InternVL2.5-26B on 4 cards": ["with 14.6 GiB", "28.0 ", "out of memory on cuda:0 and cuda:1"],
        "Qwen2.5-VL: full fine-tuning": ["with 19.6 GiB", "out of memory on cuda:1 and cuda:2"],
        "A model that needs two of eight cards": ["4 replicas:", "with 16.3 GiB", "on 2 x 24.0 GiB"],
        "Unequal cards": ["cuda:2 with 54%", "out of memory on cuda:1"],
    }
    assert done.keys() == expected.keys()
    for heading, texts in expected.items():
        for text in texts:
            assert text in done[heading][1], (heading, done[heading][1])
    assert all(f"{figure}" in page for figure in ("14.6", "28.0", "19.6 GiB", "16.3 GiB", "54 %"))


def _config_of(name, folder):
    """A folder with nothing but the model's config, and the code that comes with it."""
    target = folder / name
    if target.exists():
        return target
    sys.path.insert(0, str(REMOTE_CODE.parent))
    config = MODELS[name].make_config()
    sys.path.remove(str(REMOTE_CODE.parent))
    config.dtype = "bfloat16"
    if MODELS[name].remote_code:
        config.architectures = ["InternVLChatModel"]
        config.save_pretrained(target)
        internvl.add_code(target)
    else:
        config.architectures = config.architectures or ["Qwen2ForCausalLM"]
        config.save_pretrained(target)
    return target


def test_qwen_vl_trains_on_unequal_devices_with_pictures(trained):
    """All weights train, recomputed as the recipe's variable asks, with blocks on every device."""
    log = trained[0]["Qwen2.5-VL: full fine-tuning"]
    placed = log.rpartition("balanced map for Qwen2_5_VLForConditionalGeneration")[2]
    assert "accumulation 1, checkpointing" in placed and "balance_shim: warning" not in log
    assert len(re.findall(r"^  npu:\d  ", placed, re.M)) == 4 and "nothing" not in placed, placed


def test_dpo_by_path_plans_policy_and_reference(trained):
    """TRL loads both by the path, each gets a balanced map, and the training ends."""
    log = trained[0]["TRL: DPO with a model path"]
    models_planned = set(re.findall(r"balanced map for LlamaForCausalLM(?:, model (\d) in this process)? \(", log))
    assert len(models_planned) == 2, log  # their numbers depend on the recipes that this process has run before
    assert "2 x 1024 tokens" in log and "balance_shim: warning" not in log
    assert list((trained[1] / "dpo").glob("checkpoint-*/*.safetensors"))


def test_unequal_devices_are_filled_alike(trained):
    """The larger devices hold more, to a fraction near that of the smaller ones."""
    log = trained[0]["Unequal cards"]
    used = [int(figure) for figure in re.findall(r"^  npu:\d .* (\d+)%", log.partition("(GiB):")[2], re.M)[:4]]
    assert len(used) == 4 and max(used) - min(used) <= 15, log


def test_memory_that_grows_is_explained(trained):
    """The warning names the list and the line of the recipe's callback."""
    log = trained[0]["Memory that grows"]
    assert "retained memory grows on" in log and "history" in log, log[-3000:]
    assert re.search(r"train\.py:\d+", log)
    assert (trained[1] / "report" / "memory.jsonl").exists()


def test_out_of_memory_advice_speaks_chinese(trained):
    """Place, measured table and remedies, in one run with `BALANCE_LANG=zh`; other lines of the log stay English."""
    advice = trained[0]["advice"].partition("balance_shim: error: ")[2]
    assert advice.startswith("npu:0 显存不足，发生在前向传播，模块 model.layers.1"), advice[:300]
    assert "第 1 步，batch 为 2 x 32 个 token" in advice.partition("\n")[0]
    assert "规划预测" in advice and "实测" in advice and ("解决办法" in advice or "都放不下" in advice)
    assert "out of memory on" not in advice and "remedy" not in advice


def test_commands_that_other_tests_run_are_those_of_the_page():
    """Replicas and ZeRO-3 start processes, so their tests run the page's variables: see `recipes.commands` there."""
    one_busy = [candidate.variables for candidate in recipes.commands("Only one GPU is busy")]
    remedies = [
        ("BALANCE_REPLICAS", "auto"),
        ("BALANCE_MODE", "zero3"),
        ("BALANCE_PIPELINE", "auto"),
        ("BALANCE_MODE", "auto"),
    ]
    assert one_busy == [{name: value} for name, value in remedies]
    assert command("A model that needs two of eight cards").variables["BALANCE_REPLICAS"] == "auto"
    assert command("NCCL time-outs").variables == {"BALANCE_MODE": "zero3"}
    assert set(command("NCCL time-outs", 1).variables) == {"BALANCE_MODE", "BALANCE_NCCL_TIMEOUT"}
    assert command("Unequal cards", 1).variables == {"BALANCE_MAX_MEMORY": "0=20GiB,2=0"}


@pytest.mark.swift
def test_internvl_trains_with_ms_swift(tmp_path):
    """The recipe's command, with a small model of that class, trains on all four devices as `swift sft` alone does.

    Without pictures: ms-swift needs torchvision for them, which this environment does not have.
    """
    (command,) = (
        candidate
        for candidate in recipes.commands("ms-swift: InternVL2.5-26B on 4 cards")
        if "swift" in candidate.arguments
    )
    model, data = internvl.make_model(tmp_path / "model"), tmp_path / "train.jsonl"
    turns = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A plain color."}]
    data.write_text("\n".join([json.dumps({"messages": turns})] * 8) + "\n")
    stand_ins = {"OpenGVLab/InternVL2_5-26B": str(model), "train.jsonl": str(data), "output": str(tmp_path / "output")}
    argv = [stand_ins.get(argument, argument) for argument in command.arguments[2:]]
    # The hub tells the type by the name; float32 because bfloat16 is slow on the CPU.
    argv += [
        "--model_type",
        "internvl_chat",
        "--template",
        "internvl2_5",
        "--check_model",
        "false",
        "--use_hf",
        "true",
    ]
    argv += ["--torch_dtype", "float32", "--gradient_accumulation_steps", "2", "--max_steps", "2"]
    argv += ["--add_version", "false", "--logging_steps", "1", "--dataloader_num_workers", "0", "--report_to", "none"]
    report = tmp_path / "report"
    variables = {"BALANCE_SIMULATE": "4x1GiB", "BALANCE_REPORT": str(report), **command.variables}
    outcome = run_command([sys.executable, *SHIM, *argv], variables).expect_success()
    assert len(swift.losses(tmp_path / "output")) == 2
    assert swift.checkpoints(tmp_path / "output") == ["checkpoint-2/adapter_model.safetensors"]
    peaks = read_peaks(report)
    assert min(peaks) > 2**18 and max(peaks) < 200 * 2**20, peaks  # 118 tokens; a trace on real layers took 780 MiB
    assert "balance_shim: warning" not in outcome.stderr and "vision_model" in outcome.stderr
