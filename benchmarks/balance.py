"""How evenly each way of placing a model fills the devices in training, and how true the shim's predictions are.

    python benchmarks/balance.py                              run what is not in the results yet, then print the tables
    python benchmarks/balance.py --list                       the cases, and which of them there are results for
    python benchmarks/balance.py --cases 'Qwen2.5-7B/*/4/*'   only these: model/workload/machine/method
    python benchmarks/balance.py --table                      only print the tables, as Markdown

All of it takes some two hours. Several of these may run at a time, each with cases of its own.

An ordinary script (train.py) trains models of real size for two steps on simulated devices, with shapes only. Methods:

    auto, balanced_low_0    transformers' own
    split_model             the rule that InternVL gives its users, as an explicit map
    shim                    balance_shim, told the length of the rows and what trains: the script makes its model first
    shim-chunked            the same with the loss in chunks, which is what users get; the others have full logits
    shim-untold             the same with no variable set but the mode; not in the default list
    search                  hill climbing over contiguous maps, each measured; from the shim's map and from an even one

The devices of these machines are so large that nothing runs out of memory, so what is compared are peaks. The figure of
merit is the fill of the fullest device: its peak in GiB where all devices are equal, its peak as a part of its size
where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from balance_cases import CACHE, DEFAULT, MACHINES, RESULTS, WORKLOADS, Case, Results, cases, shown, worst_fill
from balance_tables import tables
from models import REPOSITORY, Model, Unit
from simulated_runs import Run, Simulator

SCRIPT = str(REPOSITORY / "benchmarks" / "train.py")
FULL_LOGITS = {"BALANCE_LOSS": "full"}  # what is compared are maps
EVALUATIONS = 8  # of one search, the two maps it starts from included


class Bench:
    """Runs cases."""

    def __init__(self, simulator: Simulator, results: Results, again: bool):
        self._simulator = simulator
        self._results = results
        self._again = again
        self._fresh: set[str] = set()  # run by this process, so not to be run again

    def result(self, case: Case) -> dict[str, Any]:
        """Return the result of `case`, run now unless it is there already."""
        if case.method == "search":
            return self._known(case.key) or self._keep(case.key, self._search(case))
        return self._known(case.key) or self._keep(case.key, self._measure(case, *_ways(case)))

    def _known(self, key: str) -> dict[str, Any] | None:
        result = self._results.by_key.get(key)
        if result is None or result["status"] == "failed" or (self._again and key not in self._fresh):
            return None
        return result

    def _keep(self, key: str, result: dict[str, Any]) -> dict[str, Any]:
        self._fresh.add(key)
        return self._results.add(key, result)

    def _measure(self, case: Case, arguments: Sequence[str], variables: dict[str, str]) -> dict[str, Any]:
        workload, machine = WORKLOADS[case.workload], MACHINES[case.machine]
        folder = str(CACHE / case.model.name)
        run = self._simulator.run(machine.spec, [SCRIPT, folder, *workload.arguments, *arguments], variables)
        if run.status != "ok":
            log = CACHE / "failed" / f"{case.key.replace('/', ' ')}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(run.log, encoding="utf-8")
            say(f"  {run.status}: {_last_line(run.log)} ({log})")
        return {
            "status": run.status,
            "seq_len": workload.seq_len,
            # Blocks may have moved since the model was loaded; a device has to bear the more of the two.
            "peaks": [max(pair) for pair in zip(run.peaks, run.loading_peaks or run.peaks, strict=True)],
            "training_peaks": run.peaks,
            "predicted": _predicted(run, len(machine.sizes)),
            "device_map": run.device_map,
            "seconds": run.seconds,
        }

    def _search(self, case: Case) -> dict[str, Any]:
        """Return the best contiguous map that hill climbing finds, as the result of `case`."""
        model, sizes = case.model, MACHINES[case.machine].sizes
        start = time.monotonic()
        tried: dict[tuple[int, ...], float] = {}
        results: dict[tuple[int, ...], dict[str, Any]] = {}

        def fill(places: tuple[int, ...]) -> float:
            """Return the fill of the fullest device under the map that puts unit i on device places[i]."""
            if places not in tried:
                result = self._of_map(case, _as_map(model.chain, places))
                tried[places], results[places] = worst_fill(result["peaks"], sizes), result
            return tried[places]

        even = _even_places(model, len(sizes))
        fill(even)
        origins = [even]
        shim = self.result(case.beside("shim"))
        if shim["status"] == "ok":  # its run is the measurement of its map
            origins.append(_as_places(model.chain, shim["device_map"]))
            tried[origins[-1]], results[origins[-1]] = worst_fill(shim["peaks"], sizes), shim
        for origin in sorted(set(origins), key=lambda places: tried[places]):
            current = origin
            while True:
                better = next(
                    (
                        moved
                        for moved in _moves(current, results[current]["peaks"], sizes)
                        if (moved in tried or len(tried) < EVALUATIONS) and fill(moved) < tried[current]
                    ),
                    None,
                )
                if better is None:
                    break
                current = better
        best = min(tried, key=lambda places: tried[places])
        return {
            **{name: value for name, value in results[best].items() if name not in ("key", "commit")},
            "device_map": _as_map(model.chain, best),
            "evaluations": len(tried),
            "from_even": tried[even],
            "seconds": round(time.monotonic() - start, 1),
        }

    def _of_map(self, case: Case, device_map: dict[str, int]) -> dict[str, Any]:
        """Return the result of an explicit map, which is kept, since it holds whatever becomes of the shim."""
        text = json.dumps(device_map, sort_keys=True)
        key = case.beside(f"map-{hashlib.sha256(text.encode()).hexdigest()[:12]}").key
        earlier = self._results.by_key.get(key)
        if earlier is not None and earlier["status"] == "ok":
            return earlier
        result = self._keep(key, self._measure(case, [], _map_variables(case, device_map)))
        if result["status"] != "ok":
            raise RuntimeError(f"{key}: {result['status']}")
        return result


def _ways(case: Case) -> tuple[list[str], dict[str, str]]:
    """Return the script's arguments and the variables that make the run one of `case.method`."""
    workload = WORKLOADS[case.workload]
    if case.method in ("auto", "balanced_low_0"):
        return ["--device-map", case.method], {"BALANCE_MODE": "off"}
    if case.method == "split_model":
        return [], _map_variables(case, split_model(case.model, len(MACHINES[case.machine].sizes)))
    variables = {} if case.method == "shim-untold" else workload.variables
    logits = {} if case.method == "shim-chunked" else FULL_LOGITS
    return [], {"BALANCE_MODE": "balanced", **variables, **logits}


def _map_variables(case: Case, device_map: dict[str, int]) -> dict[str, str]:
    variables = WORKLOADS[case.workload].variables
    return {"BALANCE_MODE": "map", "BALANCE_DEVICE_MAP": json.dumps(device_map), **variables, **FULL_LOGITS}


def split_model(model: Model, devices: int) -> dict[str, int]:
    """Return the map that InternVL's README makes: the first device counts as half a device for decoder layers.

    All that is no decoder layer is on the first device, and so is the last decoder layer.
    """
    layers = len(model.layers)
    share = -(-2 * layers // (2 * devices - 1))  # ceil(layers / (devices - 0.5))
    counts = [-(-share // 2), *[share] * (devices - 1)]
    places = [device for device, count in enumerate(counts) for _ in range(count)][:layers]
    device_map = {name: 0 for unit in model.chain for name in unit}
    device_map |= dict(zip(model.layers, places, strict=True))
    device_map[model.layers[-1]] = 0
    return device_map


def _as_map(chain: Sequence[Unit], places: Sequence[int]) -> dict[str, int]:
    return {name: place for unit, place in zip(chain, places, strict=True) for name in unit}


def _as_places(chain: Sequence[Unit], device_map: dict[str, Any]) -> tuple[int, ...]:
    """Return the device of each unit under `device_map`, which may name wholes of units, or parts."""
    places: list[int] = []
    for unit in chain:
        place = _device_of(unit[0], device_map)
        places.append(places[-1] if place is None else place)
    return tuple(places)


def _device_of(name: str, device_map: dict[str, Any]) -> int | None:
    """Return the device of the module `name`; None for one that no map names, because it holds nothing."""
    above = name
    while above not in device_map and above:
        above = above.rpartition(".")[0]
    place = device_map.get(above)
    if place is None:
        place = next((place for key, place in device_map.items() if key.startswith(f"{name}.")), None)
    return None if place is None else int(str(place).rpartition(":")[2])  # 2, "2" or "npu:2"


def _even_places(model: Model, devices: int) -> tuple[int, ...]:
    """Return the split that gives each device as many decoder layers, what is before them to the first device."""
    places, place, number = [], 0, 0
    for unit in model.chain:
        if unit[0] in model.layers:
            place = number * devices // len(model.layers)
            number += 1
        places.append(place)
    return tuple(places)


def _moves(places: tuple[int, ...], peaks: Sequence[float], sizes: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """Yield what `places` becomes when the fullest device hands on one block.

    A block goes over the boundary to a neighbour, which may hand on one of its own to the next, until it stays: first
    where it goes to the emptiest device. Handing on only to the neighbour is one of these.
    """
    fills = [peak / size for peak, size in zip(peaks, sizes, strict=True)]
    fullest = fills.index(max(fills))
    bounds = [i for i in range(1, len(places)) if places[i] != places[i - 1]]
    runs = [(start, end) for start, end in zip([0, *bounds], [*bounds, len(places)], strict=True)]
    moves = []
    for index, (start, _) in enumerate(runs):
        if places[start] != fullest:
            continue
        for step in (1, -1):
            moved, at = list(places), index
            while 0 <= at + step < len(runs):
                last = runs[at][1] - 1 if step > 0 else runs[at][0]
                target = places[runs[at + step][0]]
                moved[last] = target
                if target != fullest:
                    moves.append((fills[target], abs(at + step - index), tuple(moved)))
                at += step
    for _, _, moved in sorted(moves):
        yield moved


def _predicted(run: Run, devices: int) -> list[int] | None:
    """Return the peak of the tensors on each device as the plan has it: what the simulation counts.

    Context and workspaces, which a plan counts as overhead, do not exist on simulated devices.
    """
    if run.plan is None:
        return None
    predicted = [0] * devices
    for device in run.plan["devices"]:
        index = int(device["name"].rpartition(":")[2])
        predicted[index] = device["predicted_peak"] - device["terms"].get("overhead", 0)
    return predicted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help="model/workload/machine/method, with * and ?")
    parser.add_argument("--again", action="store_true", help="run the cases though there are results for them")
    parser.add_argument("--list", action="store_true", help="list the cases and run nothing")
    parser.add_argument("--table", action="store_true", help="print the tables of what there is and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="start each run by the command that users have; slower")
    options = parser.parse_args()

    chosen = cases(options.cases or DEFAULT)
    results = Results(options.results)
    if not chosen:
        parser.error("no case fits")
    if options.list:
        for case in chosen:
            print(f"{'done' if results.get(case) else '    '} {case.key}")
        return 0
    if not options.table and not _run(chosen, results, options):
        return 1
    print(tables(results))
    return 0


def _run(chosen: list[Case], results: Results, options: argparse.Namespace) -> bool:
    """Run `chosen`; return whether all of them could be."""
    write_checkpoints({case.model.name for case in chosen})
    failed = 0
    start = time.monotonic()
    with Simulator(cold=options.cold) as simulator:
        bench = Bench(simulator, results, options.again)
        for number, case in enumerate(chosen, 1):
            result = bench.result(case)
            failed += result["status"] == "failed"
            worst = result["status"]
            if worst == "ok":
                machine = MACHINES[case.machine]
                worst = shown(worst_fill(result["peaks"], machine.sizes), machine, case.model)
            minutes = (time.monotonic() - start) / 60
            say(f"{number}/{len(chosen)} {case.key}: {worst}, {result['seconds']:.0f} s; {minutes:.0f} min in all")
    return not failed


def write_checkpoints(names: Iterable[str]) -> None:
    """Write the checkpoints that are not there; in a process of its own, which may import what it likes."""
    missing = sorted(name for name in names if not (CACHE / name / "written").exists())
    if missing:
        say(f"writing checkpoints without weights: {', '.join(missing)}")
        script = str(REPOSITORY / "benchmarks" / "models.py")
        subprocess.run([sys.executable, script, str(CACHE), *missing], check=True, stdout=subprocess.DEVNULL)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
