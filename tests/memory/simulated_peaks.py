"""Predicted beside simulated peaks of trainings as scripts do them: `... RESULT FOLDER shapes|numbers`."""

import contextlib
import gc
import os
import sys
from functools import partial
from pathlib import Path

import torch

os.environ["BALANCE_LOSS"] = "full"  # the maps are explicit ones, where `auto` leaves the logits as they are

from balance_shim import simulation

SHAPES = sys.argv[3] == "shapes"
simulation.install(simulation.parse_spec("4x64GiB:shapes" if SHAPES else "4x4GiB"))

import transformers  # noqa: E402 - as in a script, where the simulation is there before anything else
from transformers import Trainer, TrainingArguments  # noqa: E402

from balance_shim.devices import inventory  # noqa: E402
from balance_shim.memory.blocks import chain  # noqa: E402
from balance_shim.memory.training_case import TrainingCase  # noqa: E402
from balance_shim.memory.workload import Workload  # noqa: E402
from balance_shim.placement import planner  # noqa: E402
from balance_shim.placement.plan import evaluate  # noqa: E402
from balance_shim.placement.request import Request  # noqa: E402
from balance_shim.settings import Settings  # noqa: E402
from balance_shim.training.actual_workload import actual_workload  # noqa: E402
from balance_shim.training.current_request import evaluating  # noqa: E402
from balance_shim.virtual import grouped_attention  # noqa: E402
from tests.memory.simulated_cases import CASES, REAL_CASES, device_map  # noqa: E402
from tests.simulation.child import main  # noqa: E402
from tests.simulation.sparse_checkpoint import write_sparse_checkpoint  # noqa: E402

transformers.logging.set_verbosity_error()
FOLDER = Path(sys.argv[2])
DTYPE = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
SLACK = 64 * 1024  # bytes: inputs, norms of gradients, step counts


def loaded(name, case):
    config = case.config()
    folder = FOLDER / name
    if SHAPES:
        write_sparse_checkpoint(config, folder, case.dtype)
    else:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(case.dtype).save_pretrained(folder)
    model_class = getattr(transformers, (config.architectures or ["LlamaForCausalLM"])[0])
    with torch.device("meta"):
        blocks = chain(model_class(config))
    places = device_map(blocks, case)
    options = {DTYPE: case.dtype, "attn_implementation": getattr(config, "_attn_implementation", None) or "sdpa"}
    return model_class.from_pretrained(folder, device_map=places, **options), places


def prepared(model, kind):
    """Return (what is given to the Trainer, the model in it that was placed)."""
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
        return wrapped, wrapped.base_model.model
    trains = {
        "frozen": lambda name: "visual" not in name,
        "frozen embedding": lambda name: "embed_tokens" not in name,
        "head only": lambda name: "lm_head" in name,
    }.get(kind, lambda _: True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    return model, model


def examples_of(case, batch):
    torch.manual_seed(1)
    ids = torch.randint(200, 500, ((32 if case.examples == "ragged" else 4) * batch, case.tokens))
    if case.examples == "classes":
        return [{"input_ids": sequence, "attention_mask": torch.ones_like(sequence), "labels": 1} for sequence in ids]
    if case.examples == "translation":
        return [
            {"input_ids": sequence, "attention_mask": torch.ones_like(sequence), "labels": sequence[:128]}
            for sequence in ids
        ]
    if case.examples == "pictures":
        side = 32  # patches; four of them make a token
        ids[:, 10 : 10 + side * side // 4] = 100
        pixels, grid = torch.rand(side * side, 3 * 2 * 14 * 14), torch.tensor([1, side, side])
        return [
            {"input_ids": sequence, "attention_mask": torch.ones_like(sequence), "labels": sequence,
             "pixel_values": pixels, "image_grid_thw": grid}
            | ({"mm_token_type_ids": (sequence == 100).long()} if TYPES else {})
            for sequence in ids
        ]  # fmt: skip
    if case.examples == "ragged":
        lengths = [case.tokens - 37 * number % 300 for number in range(len(ids))]
        return [{"input_ids": sequence[:end].tolist()} for sequence, end in zip(ids, lengths, strict=True)]
    return [{"input_ids": sequence, "labels": sequence} for sequence in ids]


TYPES = transformers.__version__ >= "5"


def padded(features):
    """Pad on the right, as a collator for language models does."""
    longest = max(len(example["input_ids"]) for example in features)

    def fill(example, value):
        return example["input_ids"] + [value] * (longest - len(example["input_ids"]))

    mask = [[1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"])) for example in features]
    return {
        "input_ids": torch.tensor([fill(example, 0) for example in features]),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor([fill(example, -100) for example in features]),
    }


def pictures(features):
    unstacked = {"pixel_values", "image_grid_thw"}
    batch = {
        name: torch.stack([example[name] for example in features]) for name in features[0] if name not in unstacked
    }
    batch["pixel_values"] = torch.cat([example["pixel_values"] for example in features])
    batch["image_grid_thw"] = torch.stack([example["image_grid_thw"] for example in features])
    return batch


# Of what the allocator reserves; where segments are split depends on tensors that plans do not count.
RESERVED_TOLERANCE = 0.2
RESERVED_SLACK = 44 << 20  # two segments of 20 MiB and two of 2
# Whether a large request finds a whole segment depends on where the optimizer's state went, and that on what trained in
# the process before: 1082 to 1338 MiB were found for the first case, and 216 to 272 for the second.
RESERVED_OFF = {"tied-accumulation": 0.25, "accumulation-checkpointing-foreach": 0.3}

COLLATORS = {"ragged": padded, "pictures": pictures}


@contextlib.contextmanager
def grouped_queries(repeats):
    """Treat grouped queries as the shim does for models that it has placed, if `repeats`; versions before 4.54 do."""
    module = sys.modules[grouped_attention.MODULE]
    before = getattr(module, grouped_attention.NAME, None)
    if repeats and before is not None:
        seen = []
        around = grouped_attention.around_use_gqa(before, lambda key: True, lambda key: seen.append(key.shape))
        setattr(module, grouped_attention.NAME, around)
    yield
    if repeats and before is not None:
        setattr(module, grouped_attention.NAME, before)
        assert seen, "no grouped queries met"


def compare(name, case):
    """Train, and raise if the predicted peak of a device is off by more than the tolerance of `case`."""
    model, places = loaded(name, case)
    given, placed = prepared(model, case.prepare)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # 4.x leaves it behind, for whoever trains next
    arguments = {"per_device_train_batch_size": 2, **case.arguments}
    settings = TrainingArguments(
        output_dir=str(FOLDER / "out"),
        max_steps=16 if case.examples == "ragged" else 3,  # until what is reserved no longer grows
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **arguments,
    )
    data = examples_of(case, arguments["per_device_train_batch_size"])
    trainer = Trainer(
        model=given,
        args=settings,
        train_dataset=data,
        data_collator=COLLATORS.get(case.examples),
        eval_dataset=examples_of(case, 7) if case.metrics else None,
        compute_metrics=(lambda _: {}) if case.metrics in ("logits", "classes") else None,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if case.metrics == "classes" else None,
    )
    trainer.remove_callback(transformers.PrinterCallback)

    workload, batch = actual_workload(trainer, Workload())
    workload, evaluation_batch = evaluating(trainer, workload)
    treated = grouped_queries(case.repeats)
    devices = inventory(Settings())[: case.devices]
    request = Request(
        TrainingCase.of(
            placed,
            workload,
            trains=lambda _, parameter: parameter.requires_grad,
            batch=batch,
            evaluation_batch=evaluation_batch,
        ),
        devices,
        repeats_grouped_keys=case.repeats,
    )
    costed = planner.cost(request)
    plan = evaluate("map", costed, places, devices)
    predicted = [device.predicted_peak for device in plan.devices]

    gc.collect()  # loading leaves cycles behind, which keep what was loaded until Python happens to look for them
    torch.npu.empty_cache()
    simulation.reset_peaks()
    with treated:
        trainer.train()
    peaks = [usage.peak for usage in simulation.usage()[: case.devices]]
    reserved = [usage.peak_reserved for usage in simulation.usage()[: case.devices]]
    text = [f"{name}: {costed.method}"]
    wrong = costed.method != "traced"
    for device, expected, peak in zip(plan.devices, predicted, peaks, strict=True):
        error = expected / peak - 1
        wrong |= abs(expected - peak) > max(case.tolerance * peak, SLACK)
        terms = ", ".join(f"{term} {size / 2**20:.2f}" for term, size in device.terms.items())
        text.append(
            f"  {device.name}: predicted {expected / 2**20:.2f}, found {peak / 2**20:.2f} ({error:+.2%}): {terms}"
        )
    for device, peak in zip(plan.devices, reserved, strict=True):
        expected, allowed = device.predicted_reserved, RESERVED_OFF.get(name, RESERVED_TOLERANCE)
        wrong |= expected is None or abs(expected - peak) > max(allowed * peak, RESERVED_SLACK)
        text.append(f"  {device.name}: predicted to reserve {(expected or 0) / 2**20:.0f}, found {peak / 2**20:.0f}")
    print("\n".join(text), flush=True)
    assert not wrong, "\n".join(text)


wanted = sys.argv[4:]
cases = CASES if SHAPES else REAL_CASES
main({f"check_{name}": partial(compare, name, case) for name, case in cases.items() if not wanted or name in wanted})
