"""The figures of `balance-shim plan`: what it predicts, says beside it, and writes."""

import json

import pytest
import transformers

from balance_shim.memory.cost import TERMS
from balance_shim.placement.places import device_of
from balance_shim.units import GIB, MIB
from tests import models, processes
from tests.cli.running import (
    QUIET,
    SAVED,
    SHORT,
    plan,
    seven_billion,
    simulated,
    together,
)


@pytest.mark.parametrize("name", SAVED)
def test_json_holds_what_the_contract_names(plans, name):
    """Mode, model, workload, devices by term, map, lower bound and baseline are there, and add up."""
    plan_data = plans[0][name]
    on_meta = models.ALL[name]()
    assert plan_data["mode"] == "balanced" and plan_data["fits"] is True and plan_data["method"] == "traced"
    assert plan_data["model"]["class"] == type(on_meta).__name__ and plan_data["model"]["dtype"] == "fp32"
    assert plan_data["model"]["parameters"] == on_meta.num_parameters()
    assert plan_data["workload"]["seq_len"] == 64 and plan_data["workload"]["tuning"] == "full"
    assert [device["name"] for device in plan_data["devices"]] == [f"cuda:{number}" for number in range(4)]
    for device in (*plan_data["devices"], *plan_data["baseline"]["devices"]):
        assert device["capacity"] == 512 * MIB - int(0.08 * 512 * MIB)
        assert set(device["terms"]) == set(TERMS)
        assert sum(device["terms"].values()) == device["predicted_peak"]
    for device in plan_data["devices"]:
        # Tensors fit into what is reserved, but for overheads that plans count generously.
        assert 0.9 * device["predicted_peak"] <= device["predicted_reserved"] <= 512 * MIB
    worst = max(device["predicted_peak"] for device in plan_data["devices"])
    assert 0 < plan_data["lower_bound"] <= worst
    assert plan_data["gap"] == pytest.approx(worst / plan_data["lower_bound"] - 1)
    assert worst <= max(device["predicted_peak"] for device in plan_data["baseline"]["devices"])
    for key in on_meta.state_dict():
        assert device_of(key, plan_data["device_map"]) in range(4)


@pytest.mark.parametrize("name", SAVED)
def test_baseline_is_what_a_real_load_makes_of_auto(plans, loaded, name):
    """The baseline's map is the one that from_pretrained(device_map="auto") makes on the same machine, simulated."""
    assert plans[0][name]["baseline"]["device_map"] == loaded[name]["auto"]


@pytest.mark.parametrize("name", SAVED)
def test_written_map_loads_with_transformers(plans, loaded, name):
    """json.load of the written file is a device_map, and each tensor then lies where the plan says."""
    assert loaded[name]["written"] == plans[0][name]["device_map"]
    for key, home in loaded[name]["homes"].items():
        assert home == f"npu:{device_of(key, loaded[name]['written'])}"


@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_written_map_loads_in_mode_map(saved, plans, name):
    """BALANCE_MODE=map with the written file places the model as planned, without a word on anything missing."""
    folder, written = saved / name, plans[1] / f"{name}.json"
    device_map = simulated(
        f"""
        import json, transformers
        config = transformers.AutoConfig.from_pretrained({str(folder)!r})
        load = getattr(transformers, config.architectures[0]).from_pretrained
        print(json.dumps(load({str(folder)!r}, device_map="auto").hf_device_map))
        """,
        BALANCE_MODE="map",
        BALANCE_DEVICE_MAP=str(written),
    )
    assert device_map == json.loads(written.read_text())


def test_baseline_shows_what_auto_would_offload(saved):
    """On devices too small for the weights, auto's map leaves blocks on the host, as in a real load; ours is none."""
    arguments = (saved / "mixtral", "--gpus", "2x1MiB", *SHORT)
    (code, text, _), json_run = together(arguments, (*arguments, "--json"))
    json_run = json.loads(json_run[1])
    auto = simulated(
        f"""
        import json, transformers
        load = transformers.MixtralForCausalLM.from_pretrained
        print(json.dumps(load({str(saved / "mixtral")!r}, device_map="auto").hf_device_map))
        """,
        machine="2x1MiB",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # what is loaded in between is a good part of such devices
    )
    assert "cpu" in auto.values() and json_run["baseline"]["device_map"] == auto
    offloaded = json_run["baseline"]["offloaded"]["cpu"]
    assert set(offloaded["blocks"]) >= {name for name, place in auto.items() if place == "cpu"}
    assert offloaded["weights"] > 0 and not json_run["baseline"]["fits"]
    assert code == 1 and "cpu: auto leaves" in text


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    """Full fine-tuning of 7 B on 4 x 16 GiB is refused with exit code 1, the shortfall, and changes that fit."""
    folder = seven_billion(tmp_path)
    arguments = (folder, "--gpus", "4x16GiB", "--seq-len", "2048")
    (code, text, _), (_, output, _) = together(arguments, (*arguments, "--json"))
    plan_data = json.loads(output)
    worst = max(plan_data["devices"], key=lambda device: device["predicted_peak"])
    assert not plan_data["fits"] and plan_data["shortfall"] >= worst["predicted_peak"] - worst["capacity"] > 0
    assert any("8-bit" in remedy for remedy in plan_data["remedies"])
    assert code == 1 and "predicted not to fit" in text and "an 8-bit optimizer" in text


def test_weights_alone_too_large(tmp_path):
    """Where not even the weights fit, there is no map, none is written, and the answer says how much is missing."""
    folder, output = seven_billion(tmp_path), tmp_path / "map.json"
    arguments = (folder, "--gpus", "2x6GiB", "--output", output)
    (code, text, errors), (_, as_json, _) = together(arguments, (*arguments, "--json"))
    plan_data = json.loads(as_json)
    assert plan_data["device_map"] is None and plan_data["shortfall"] > 2 * GIB and plan_data["lower_bound"] > 6 * GIB
    assert code == 1 and "its weights alone are 14.2 GiB" in text
    assert not output.exists() and "not written" in errors


def test_seven_billion_in_under_five_seconds(tmp_path):
    """Beyond imports, a plan for 7 B takes less than five seconds, and is even to within one layer."""
    folder = seven_billion(tmp_path)
    small = tmp_path / "small"
    transformers.LlamaConfig(**models.SIZES).save_pretrained(small)
    seconds = processes.output_of(
        f"""
        import contextlib, io, json, time
        from balance_shim.cli.plan import run
        for folder in ({str(small)!r}, {str(folder)!r}):  # the first one imports what both need
            start, text = time.process_time(), io.StringIO()
            with contextlib.redirect_stdout(text):
                assert run([folder, "--gpus", "4x80GiB", "--json"], {{}}) == 0
            seconds, plan_data = time.process_time() - start, json.loads(text.getvalue())
        peaks = [device["predicted_peak"] for device in plan_data["devices"]]
        assert max(peaks) - min(peaks) < 5 * 2 * 233e6, peaks
        print(seconds)
        """,
        **QUIET,
    )
    assert float(seconds) < 5


def test_text_shows_plan_bound_and_baseline(saved):
    """Without --json, standard output has the plan, the bound, and auto beside it; standard error has nothing."""
    done = plan(saved / "qwen-vl" if "qwen-vl" in SAVED else saved / "llama", "--gpus", "2x512MiB+2x256MiB", *SHORT)
    assert done.returncode == 0 and not done.stderr
    for phrase in ("balanced map, predicted", "cuda:3", "lower bound for any map", "it fits", "transformers' auto"):
        assert phrase in done.stdout


def test_what_chunks_would_save_is_said_where_they_are_off(tmp_path):
    """With full logits a note names the device and the size; the library's own map is predicted with full logits."""
    config = models.llama(vocab_size=65536, max_position_embeddings=8192).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    rest = (tmp_path, "--json", "--gpus", "2x16GiB", "--seq-len", "8192")
    full, chunked = (json.loads(output) for _, output, _ in together(("--loss", "full", *rest), rest))
    assert [data["workload"]["loss"] for data in (full, chunked)] == ["full", "chunked"]
    savings = [note for note in full["notes"] if note.startswith("BALANCE_LOSS=chunked would save ")]
    assert len(savings) == 1 and " GiB on cuda:" in savings[0]
    assert not any("BALANCE_LOSS" in note for note in chunked["notes"])
    worst = [max(device["predicted_peak"] for device in data["devices"]) for data in (full, chunked)]
    assert worst[1] < worst[0] - GIB
    saved = float(savings[0].split()[3]) * GIB
    assert saved > 0.9 * (worst[0] - worst[1])
    assert full["baseline"]["devices"] == chunked["baseline"]["devices"]
    between = f"2x{int(sum(worst) / 2 / 0.92) // 2**20}MiB"  # 8 % are kept in reserve
    ((_, output, _),) = together(("--loss", "full", *rest[:3], between, *rest[4:]))
    assert any(remedy.startswith("BALANCE_LOSS=chunked") for remedy in json.loads(output)["remedies"])


def test_checkpointing_auto_recomputes_no_more_than_it_takes(tmp_path):
    """`--gradient-checkpointing auto` names the layers to recompute: none with room, and some, not all, with less."""
    folder = seven_billion(tmp_path)
    argv = (folder, "--json", "--tuning", "lora", "--seq-len", "2048", "--gradient-checkpointing", "auto", "--gpus")
    plans = [json.loads(output) for _, output, _ in together((*argv, "4x24GiB"), (*argv, "4x8GiB"))]
    assert all(data["fits"] for data in plans)
    assert plans[0]["recomputed"] == [] and 0 < len(plans[1]["recomputed"]) < 28
    assert any("layers are recomputed" in note for note in plans[1]["notes"])


def test_replicas_are_planned_on_the_weakest_share(saved):
    """Each replica has its share; the plan is that of the share with the least memory, and auto takes the most."""
    arguments = [saved / "llama", "--seq-len", "64", "--json", "--gpus"]
    commands = [
        (*arguments, "2x512MiB+2x1GiB", "--replicas", "2"),
        (*arguments, "4x512MiB"),
        (*arguments, "4x4GiB", "--replicas", "auto"),
    ]
    (two, alone, most) = (json.loads(output) for _, output, _ in together(*commands))
    assert (two["replicas"], two["shares"]) == (2, [[0, 2], [1, 3]])
    assert [device["name"] for device in two["devices"]] == ["cuda:0", "cuda:2"] and two["workload"]["replicated"]
    assert (alone["replicas"], alone["shares"]) == (1, [[0, 1, 2, 3]]) and not alone["workload"]["replicated"]
    assert most["replicas"] == 4


def test_mode_auto_shows_what_it_chose(saved, tmp_path):
    """The time is that of all replicas; ZeRO-3 has no map, so none is written and the balanced one is a comparison."""
    arguments = ["--seq-len", "64", "--mode", "auto", "--gpus"]
    written = tmp_path / "map.json"
    commands = [
        (saved / "llama", *arguments, "4xrtx4090", "--replicas", "2"),
        (seven_billion(tmp_path), *arguments, "4xT4", "--output", str(written)),
    ]
    (_, replicas, warning), (code, zero3, line) = together(*commands)
    chosen = next(row for row in replicas.splitlines() if row.startswith("  * 4 replicas"))
    assert f"predicted step: {' '.join(chosen.split('%')[1].split()[:2])} " in replicas
    assert "number of replicas is ignored" in warning and "micro-batches in flight " in replicas
    assert code == 0 and "ZeRO-3 has no device map" in zero3 and "in host memory fits" in zero3
    assert "not to fit" not in zero3 and "not written, because ZeRO-3" in line and not written.exists()
