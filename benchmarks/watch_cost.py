"""Host time per training step of the notes that ranks take under ZeRO-3 (`zero/divergence/passes.py`, `desync.py`).

python benchmarks/watch_cost.py [--layers 32] [--steps 50]

A Llama of that many layers, so narrow that its own products take no time, runs forward and backward with and without
the hooks, in processor time, which other programs do not change; the checksum, and the exchange with a second rank
through a real TCPStore, are timed by themselves.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shim"))

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from balance_shim.zero.divergence import flight_record, passes


def milliseconds(work: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Return the median time of `work`."""
    times = []
    for _ in range(repeats):
        started = clock()
        work()
        times.append(1000 * (clock() - started))
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=options.layers, vocab_size=16))
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel = number, parameter.numel()  # as DeepSpeed marks them
    ids = torch.arange(4).view(1, 4)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    subject = passes.noted(model, bucket := int(1e6))
    written = flight_record.FlightRecord(list(subject.modules), list(subject.parameters), 0)
    checksum = passes.Checksum(subject)

    def noted_step() -> None:
        written.begin(["input_ids", "labels"])
        step()
        written.end()

    step()
    plain, with_hooks = [], []
    for _ in range(options.steps):  # in turn, so that what else the machine does meets both
        plain.append(milliseconds(step, 1))
        hooks = passes.note(written, subject)
        with_hooks.append(milliseconds(noted_step, 1))
        for hook in hooks:
            hook.remove()
    hooks = passes.note(written, subject)
    noted_step()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", store.port, is_master=False)

    def exchange() -> None:
        other.set("end/1/1", "1")
        store.wait(["end/1/1"])
        store.check(["end/1/1"])
        store.multi_get(["end/1/1"])

    print(f"{len(subject.modules)} modules, {len(subject.parameters)} parameters, buckets of {bucket} values")
    print(f"step without notes {median(plain):8.2f} ms")
    print(f"notes              {median(with_hooks) - median(plain):8.2f} ms")
    print(f"checksum           {milliseconds(lambda: checksum.of(written), options.steps):8.2f} ms")
    print(f"exchange           {milliseconds(exchange, options.steps, time.perf_counter):8.2f} ms")


if __name__ == "__main__":
    main()
