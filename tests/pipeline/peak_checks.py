"""Peaks with micro-batches in flight on four simulated devices, beside those that were planned: `... RESULT FOLDER`."""

import os
import statistics
import sys
from pathlib import Path

from balance_shim import simulation

simulation.install(simulation.parse_spec("4x1GiB"))

from peft import LoraConfig, get_peft_model  # noqa: E402 - where the simulation is there before anything else
from transformers import AutoModelForCausalLM  # noqa: E402

from balance_shim.placement import placed_models  # noqa: E402
from balance_shim.placement.plan import Plan  # noqa: E402
from tests import models  # noqa: E402
from tests.pipeline import trainings  # noqa: E402
from tests.simulation.child import main  # noqa: E402

FOLDER = Path(sys.argv[2])
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "vocab_size": 2048}
LLAMA = models.saved_llama(FOLDER / "llama", **SIZES)
LENGTH = 256
os.environ["BALANCE_SEQ_LEN"] = str(LENGTH)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def errors(count, **options):
    """Return what each device's measured peak is off the planned one, as a fraction of it, and the plan."""
    measured, plans = [], []

    def begin(model):
        simulation.reset_peaks()
        plans.append(placed_models.placed(model)[1].plan)

    def load():
        return AutoModelForCausalLM.from_pretrained(LLAMA, device_map="auto")

    trainings.train(
        count, load, trainings.tokens(8, LENGTH, 2000), prepare=begin,
        at_end=lambda: measured.extend(device.peak for device in simulation.usage()), **options,
    )  # fmt: skip
    plan: Plan = plans[0]
    predicted = [device.predicted_peak - device.terms["overhead"] for device in plan.devices]
    print(plan.workload.describe(), [f"{one / other - 1:+.3f}" for one, other in zip(predicted, measured, strict=True)])
    return [abs(one / other - 1) for one, other in zip(predicted, measured, strict=True)], plan


def check_predicted_peaks():
    """Full fine-tuning, adapters, checkpointing; all of an accumulation in flight, and chunks: 2 % in the median."""
    off = []
    cases = (
        (4, {}), (2, {}), (4, {"wrap": lora}), (4, CHECKPOINTING), (2, {"wrap": lora, **CHECKPOINTING}),
    )  # fmt: skip
    for count, options in cases:
        found, plan = errors(count, **options)
        assert plan.workload.in_flight == count and plan.workload.shares_inputs
        off += found
    assert statistics.median(off) <= 0.02 and max(off) <= 0.06, sorted(off)


def check_as_many_as_fit():
    """`auto` takes the most that fit: all where there is room, fewer on small devices, where one more would not fit."""
    assert errors("auto")[1].workload.in_flight == 4
    needed = max(max(device.predicted_peak, device.predicted_reserved or 0) for device in errors(2)[1].devices)
    os.environ["BALANCE_MAX_MEMORY"] = f"{int(needed * 1.02) // 2**10 + 1}KiB"
    os.environ["BALANCE_RESERVE"] = "0"
    plan = errors("auto")[1]
    assert plan.workload.in_flight == 2 and not plan.shortfall, plan.workload
    plan = errors(4)[1]
    assert plan.workload.in_flight == 4 and plan.shortfall
    del os.environ["BALANCE_MAX_MEMORY"], os.environ["BALANCE_RESERVE"]


if __name__ == "__main__":
    main(globals())
