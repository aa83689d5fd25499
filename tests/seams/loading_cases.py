"""Seam 1 on simulated devices: loads one small model in many ways and writes what came of each, as JSON.

One process for all of them, because importing transformers takes longer than all loads together. Run by
test_loading.py: `python loading_cases.py FOLDER_OF_A_TINY_MODEL RESULT.json`.
"""

import contextlib
import gc
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import balance_shim
from balance_shim.placement import planner

model_folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
results = {}


def case(name, environ, load, install=True):
    """Arm with `environ`, run `load`, disarm; keep the device map or the error, and what was said."""
    gc.collect()  # accelerate's hooks make cycles: without this, earlier models still fill the devices
    before = dict(os.environ)
    os.environ.update({"BALANCE_SEQ_LEN": "64", **environ})
    stderr = io.StringIO()
    outcome = {}
    with contextlib.redirect_stderr(stderr):
        try:
            if install:
                balance_shim.install(mode=environ.get("BALANCE_MODE"))
            model = load()
            device_map = getattr(model, "hf_device_map", None)
            outcome["map"] = None if device_map is None else {key: str(place) for key, place in device_map.items()}
            outcome["devices"] = sorted({str(parameter.device) for parameter in model.parameters()})
            outcome["types"] = sorted({type(place).__name__ for place in (device_map or {}).values()})
        except Exception as error:
            outcome["error"] = type(error).__name__
            outcome["message"] = str(error)
    os.environ.clear()
    os.environ.update(before)
    outcome["log"] = [line for line in stderr.getvalue().splitlines() if line.startswith("balance_shim")]
    results[name] = outcome
    balance_shim.uninstall()


def auto(device_map="auto", loader=AutoModelForCausalLM, folder=model_folder, **options):
    return lambda: loader.from_pretrained(folder, device_map=device_map, **options)


original_loader = vars(transformers.modeling_utils.PreTrainedModel)["from_pretrained"]
case("library's own", {}, auto(), install=False)
case("auto", {}, auto())
case("balanced", {}, auto("balanced"))
case("base class", {}, auto(loader=LlamaForCausalLM))
case("sequential", {}, auto("sequential"))
case("sequential intercepted", {"BALANCE_INTERCEPT": "sequential"}, auto("sequential"))
case("explicit map", {}, auto({"": 2}))
case("one device", {}, auto(torch.device("npu:1")))
case("no map", {}, lambda: AutoModelForCausalLM.from_pretrained(model_folder))
case(
    "no map intercepted", {"BALANCE_INTERCEPT": "auto,none"}, lambda: AutoModelForCausalLM.from_pretrained(model_folder)
)
case("off", {"BALANCE_MODE": "off"}, auto())
case("script's max_memory", {}, auto(max_memory={1: "500MiB", 3: "500MiB", "cpu": "8GiB"}))
case("script's max_memory without devices", {}, auto(max_memory={"cpu": "8GiB"}))
case("device kept free", {}, auto(max_memory={0: 0, 1: "500MiB", 2: "500MiB", 3: "500MiB"}))
case("max_memory", {"BALANCE_MAX_MEMORY": "0=30MiB"}, auto())
case("too small", {"BALANCE_MAX_MEMORY": "2MiB"}, auto())
case("too small, strict", {"BALANCE_MAX_MEMORY": "2MiB", "BALANCE_STRICT": "1"}, auto())
case("report off", {"BALANCE_REPORT": "off"}, auto())
report_folder = result_path.parent / "report"
case("report in a folder", {"BALANCE_REPORT": str(report_folder)}, auto())
results["report in a folder"]["files"] = {
    path.name: json.loads(path.read_text()) for path in sorted(report_folder.glob("*.json"))
}
case("torchrun with one process", {"WORLD_SIZE": "1"}, auto())
case("torchrun with two processes", {"WORLD_SIZE": "2", "RANK": "0"}, auto("balanced"))

complete_map = json.dumps({"model": 1, "lm_head": "cuda:2"})
case("user's map", {"BALANCE_DEVICE_MAP": complete_map}, auto())
case("mode auto with a map", {"BALANCE_DEVICE_MAP": complete_map, "BALANCE_MODE": "auto"}, auto())
case("mode auto without a map", {"BALANCE_MODE": "auto"}, auto())
case("user's map not used", {"BALANCE_DEVICE_MAP": complete_map}, auto("sequential"))
# A checkpoint with a tensor of a wrong shape: an error about the map shows that it was checked before weights were.
damaged = result_path.parent / "damaged"
shutil.copytree(model_folder, damaged)
weights = load_file(damaged / "model.safetensors")
save_file({**weights, "lm_head.weight": torch.zeros(3, 3)}, damaged / "model.safetensors", metadata={"format": "pt"})
case("wrong map, damaged weights", {"BALANCE_DEVICE_MAP": '{"model": 0, "lm_haed": 1}'}, auto(folder=damaged))
case("good map, damaged weights", {"BALANCE_DEVICE_MAP": complete_map}, auto(folder=damaged))


@contextlib.contextmanager
def machine_where(name, replacement):
    """Have a function of `torch.npu` behave otherwise for a while."""
    before = getattr(torch.npu, name)
    setattr(torch.npu, name, replacement(before))
    try:
        yield
    finally:
        setattr(torch.npu, name, before)


queried = []


def full_device(original):
    def mem_get_info(device=None):
        queried.append(device)
        if device == 1:
            raise RuntimeError("CUDA error: out of memory")
        return original(device)

    return mem_get_info


def screens(*small):
    """Devices that have 1 MiB in all."""

    def replacement(original):
        def get_device_properties(device=None):
            properties = original(device)
            properties.total_memory = 1 << 20 if device in small else properties.total_memory
            return properties

        return get_device_properties

    return replacement


with machine_where("mem_get_info", full_device):
    case("full device", {}, auto())
    queried.clear()
    case("devices not asked", {"BALANCE_MAX_MEMORY": "1=0"}, auto(max_memory={0: "500MiB", 1: "500MiB", 3: "500MiB"}))
    results["devices not asked"]["asked"] = sorted(set(queried) - {None})
with machine_where("get_device_properties", screens(2)):
    case("display card", {}, auto())
    case("display card, named", {"BALANCE_MAX_MEMORY": "2=500MiB"}, auto())
with machine_where("get_device_properties", screens(1, 2, 3)):
    case("one large device", {}, auto())
    case("display cards needed", {"BALANCE_MAX_MEMORY": "90MiB"}, auto())


def broken(request):
    raise ZeroDivisionError("planted")


planner.balanced, original_balanced = broken, planner.balanced
case("planner fails", {}, auto())
case("planner fails, strict", {"BALANCE_STRICT": "1"}, auto())
planner.balanced = original_balanced

balance_shim.uninstall()
results["restored"] = vars(transformers.modeling_utils.PreTrainedModel)["from_pretrained"] is original_loader

balance_shim.install(mode="balanced", report="off")
model = AutoModelForCausalLM.from_pretrained(model_folder, device_map="auto")
results["devices of the model that ran"] = sorted(set(model.hf_device_map.values()))
inputs = torch.arange(12).reshape(1, 12).to("npu:0")
with torch.no_grad():
    balanced = model(input_ids=inputs).logits.cpu().tolist()
    plain = AutoModelForCausalLM.from_pretrained(model_folder)(input_ids=inputs.cpu()).logits.tolist()
results["largest difference of logits"] = max(
    abs(value - reference)
    for ours_row, theirs_row in zip(balanced[0], plain[0], strict=True)
    for value, reference in zip(ours_row, theirs_row, strict=True)
)
result_path.write_text(json.dumps(results))
