"""`balance-shim plan` as its users run it: in processes of its own, on configs in folders."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import transformers

from balance_shim.memory.cost import TERMS
from balance_shim.placement.plan import device_of
from balance_shim.plan_options import UsageError, read_options
from balance_shim.units import GIB, MIB
from balance_shim.versions import version_of
from tests import models, processes

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
MACHINE = "4x512MiB"  # some of it is for what the runtime takes
SHORT = ("--seq-len", "64")
SAVED = ("llama", "llama-tied", "mixtral", "qwen-vl", "t5", "bert-classifier")
SAVED = tuple(name for name in SAVED if name in models.ALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a folder for each small model, weights included, which only the real loads need."""
    folder = tmp_path_factory.mktemp("models")
    for name in SAVED:
        on_meta = models.ALL[name]()
        # Real checkpoints say these.
        on_meta.config.decoder_start_token_id = 0
        for number, part in enumerate(("image_token_id", "video_token_id", "vision_start_token_id"), start=500):
            setattr(on_meta.config, part, number)
        type(on_meta)(on_meta.config).save_pretrained(folder / name)
    return folder


def plan(*words, **variables):
    """Run the command and return what it left."""
    return processes.python("-m", "balance_shim", "plan", *map(str, words), **{**QUIET, **variables})


def planned(*words, code=0, **variables):
    """Run the command with `--json`; return the object on standard output, which holds nothing else."""
    done = plan(*words, "--json", **variables)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def together(*commands):
    """Run several commands in one process, which imports the libraries once; return (code, stdout, stderr) of each."""
    lines = [["plan", *map(str, words)] for words in commands]
    found = processes.output_of(
        f"""
        import contextlib, io, json
        from balance_shim.cli import main
        found = []
        for words in {lines!r}:
            output, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = main(words)
            found.append((code, output.getvalue(), errors.getvalue()))
        print(json.dumps(found))
        """,
        BALANCE_MODE="off",
        **QUIET,
    )
    return json.loads(found.splitlines()[-1])


@pytest.fixture(scope="module")
def plans(saved, tmp_path_factory):
    """The plan of each small model, and a folder with the map that was written for each."""
    maps = tmp_path_factory.mktemp("maps")
    words = {name: (saved / name, "--gpus", MACHINE, *SHORT, "--output", maps / f"{name}.json") for name in SAVED}
    done = together(*((*each, "--json") for each in words.values()))
    return {name: json.loads(output) for name, (_, output, _) in zip(words, done, strict=True)}, maps


@pytest.fixture(scope="module")
def loaded(saved, plans):
    """What real loads on simulated devices make of "auto" and of the written maps: name -> "auto"/"map" -> map."""
    return simulated(
        f"""
        import json, sys, transformers
        found = {{}}
        for name in {list(SAVED)!r}:
            folder = {str(saved)!r} + "/" + name
            config = transformers.AutoConfig.from_pretrained(folder)
            load = getattr(transformers, config.architectures[0]).from_pretrained
            with open({str(plans[1])!r} + f"/{{name}}.json") as file:
                written = json.load(file)
            dtype = {{{dtype_argument()!r}: "float32"}}
            auto = load(folder, device_map="auto", **dtype)
            model = load(folder, device_map=written, **dtype)
            homes = {{key: str(tensor.device) for key, tensor in model.state_dict().items()}}
            found[name] = {{"auto": auto.hf_device_map, "written": written, "homes": homes}}
        print(json.dumps(found))
        """
    )


def dtype_argument():
    return "dtype" if version_of("transformers") >= (4, 56) else "torch_dtype"


def simulated(code, machine=MACHINE, **variables):
    """Run `code` on simulated devices, with the shim off unless `variables` say otherwise; return the JSON it prints.

    The program starts as a user's would, with the shim's folders on its path.
    """
    done = processes.code(
        textwrap.dedent(code),
        paths=(processes.SHIM, processes.INJECTED),
        timeout=300,
        **{"BALANCE_SIMULATE": machine, "BALANCE_MODE": "off", **QUIET, **variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SAVED)
def test_json_holds_what_the_contract_names(plans, name):
    """Mode, model, workload, devices by term, map, lower bound and baseline are there, and add up."""
    found = plans[0][name]
    on_meta = models.ALL[name]()
    assert found["mode"] == "balanced" and found["fits"] is True and found["method"] == "traced"
    assert found["model"]["class"] == type(on_meta).__name__ and found["model"]["dtype"] == "fp32"
    assert found["model"]["parameters"] == on_meta.num_parameters()
    assert found["workload"]["seq_len"] == 64 and found["workload"]["tuning"] == "full"
    assert [device["name"] for device in found["devices"]] == [f"cuda:{number}" for number in range(4)]
    for device in (*found["devices"], *found["baseline"]["devices"]):
        assert device["capacity"] == 512 * MIB - int(0.08 * 512 * MIB)
        assert set(device["terms"]) == set(TERMS)
        assert sum(device["terms"].values()) == device["predicted_peak"]
    worst = max(device["predicted_peak"] for device in found["devices"])
    assert 0 < found["lower_bound"] <= worst
    assert found["gap"] == pytest.approx(worst / found["lower_bound"] - 1)
    assert worst <= max(device["predicted_peak"] for device in found["baseline"]["devices"])
    for key in on_meta.state_dict():
        assert device_of(key, found["device_map"]) in range(4)


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
    found = simulated(
        f"""
        import json, transformers
        config = transformers.AutoConfig.from_pretrained({str(folder)!r})
        load = getattr(transformers, config.architectures[0]).from_pretrained
        print(json.dumps(load({str(folder)!r}, device_map="auto").hf_device_map))
        """,
        BALANCE_MODE="map",
        BALANCE_DEVICE_MAP=str(written),
    )
    assert found == json.loads(written.read_text())


def test_baseline_shows_what_auto_would_offload(saved):
    """On devices too small for the weights, auto's map leaves blocks on the host, as in a real load; ours is none."""
    words = (saved / "mixtral", "--gpus", "2x1MiB", *SHORT)
    (code, text, _), found = together(words, (*words, "--json"))
    found = json.loads(found[1])
    auto = simulated(
        f"""
        import json, transformers
        load = transformers.MixtralForCausalLM.from_pretrained
        print(json.dumps(load({str(saved / "mixtral")!r}, device_map="auto").hf_device_map))
        """,
        machine="2x1MiB",
    )
    assert "cpu" in auto.values() and found["baseline"]["device_map"] == auto
    offloaded = found["baseline"]["offloaded"]["cpu"]
    assert set(offloaded["blocks"]) >= {name for name, place in auto.items() if place == "cpu"}
    assert offloaded["weights"] > 0 and not found["baseline"]["fits"]
    assert code == 1 and "cpu: auto leaves" in text


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    """Full fine-tuning of 7 B on 4 x 16 GiB is refused with exit code 1, the shortfall, and changes that fit."""
    folder = seven_billion(tmp_path)
    words = (folder, "--gpus", "4x16GiB", "--seq-len", "2048")
    (code, text, _), (_, output, _) = together(words, (*words, "--json"))
    found = json.loads(output)
    worst = max(found["devices"], key=lambda device: device["predicted_peak"])
    assert not found["fits"] and found["shortfall"] == worst["predicted_peak"] - worst["capacity"] > 0
    assert any("8-bit" in remedy for remedy in found["remedies"])
    assert code == 1 and "predicted not to fit" in text and "an 8-bit optimizer" in text


def test_weights_alone_too_large(tmp_path):
    """Where not even the weights fit, there is no map, none is written, and the answer says how much is missing."""
    folder, output = seven_billion(tmp_path), tmp_path / "map.json"
    words = (folder, "--gpus", "2x6GiB", "--output", output)
    (code, text, errors), (_, as_json, _) = together(words, (*words, "--json"))
    found = json.loads(as_json)
    assert found["device_map"] is None and found["shortfall"] > 2 * GIB and found["lower_bound"] > 6 * GIB
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
        from balance_shim.plan_command import run
        found = []
        for folder in ({str(small)!r}, {str(folder)!r}):  # the first one imports what both need
            start, text = time.process_time(), io.StringIO()
            with contextlib.redirect_stdout(text):
                assert run([folder, "--gpus", "4x80GiB", "--json"], {{}}) == 0
            found = [time.process_time() - start, json.loads(text.getvalue())]
        peaks = [device["predicted_peak"] for device in found[1]["devices"]]
        assert max(peaks) - min(peaks) < 5 * 2 * 233e6, peaks
        print(found[0])
        """,
        **QUIET,
    )
    assert float(seconds) < 5


def test_text_shows_plan_bound_and_baseline(saved):
    """Without --json, standard output has the plan, the bound, and auto beside it; standard error has nothing."""
    done = plan(saved / "qwen-vl" if "qwen-vl" in SAVED else saved / "llama", "--gpus", "2x512MiB+2x256MiB", *SHORT)
    assert done.returncode == 0 and not done.stderr
    for phrase in ("balanced map, predicted", "cuda:3", "above the best there can be", "it fits", "transformers' auto"):
        assert phrase in done.stdout


def test_a_reader_that_leaves_early_changes_nothing(saved):
    """With standard output closed by its reader, as `| head` does, there is no traceback and the exit code holds."""
    read, write = os.pipe()
    os.close(read)
    words = ("-m", "balance_shim", "plan", str(saved / "llama"), "--gpus", MACHINE, *SHORT)
    done = subprocess.run(
        [sys.executable, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=processes.environment(processes.SHIM, **QUIET),
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_variables_are_defaults_for_options(saved):
    """BALANCE_* variables say what options leave open, options go first, and caps and reserve hold."""
    found = planned(
        saved / "llama",
        "--seq-len", "32",
        "--gradient-checkpointing",
        "--accumulation", "3",
        BALANCE_SIMULATE="2x512MiB",
        BALANCE_SEQ_LEN="16",
        BALANCE_BATCH_SIZE="2",
        BALANCE_TUNING="lora",
        BALANCE_OPTIMIZER="sgd",
        BALANCE_PRECISION="fp16",
        BALANCE_MAX_MEMORY="1=256MiB",
        BALANCE_RESERVE="1MiB",
    )  # fmt: skip
    expected = {
        "batch_size": 2, "seq_len": 32, "accumulation": 3, "tuning": "lora", "optimizer": "sgd",
        "gradient_checkpointing": True,
    }  # fmt: skip
    assert {name: found["workload"][name] for name in expected} == expected
    assert found["model"]["dtype"] == "fp16"
    assert [device["capacity"] for device in found["devices"]] == [511 * MIB, 255 * MIB]


def test_what_chunks_would_save_is_said_where_they_are_off(tmp_path):
    """With full logits a note names the device and the size; the library's own map is predicted with full logits."""
    config = models.llama(vocab_size=65536, max_position_embeddings=8192).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    rest = (tmp_path, "--json", "--gpus", "2x16GiB", "--seq-len", "8192")
    full, chunked = (json.loads(output) for _, output, _ in together(("--loss", "full", *rest), rest))
    assert [found["workload"]["loss"] for found in (full, chunked)] == ["full", "chunked"]
    said = [note for note in full["notes"] if note.startswith("BALANCE_LOSS=chunked would save ")]
    assert len(said) == 1 and " GiB on cuda:" in said[0]
    assert not any("BALANCE_LOSS" in note for note in chunked["notes"])
    worst = [max(device["predicted_peak"] for device in found["devices"]) for found in (full, chunked)]
    assert worst[1] < worst[0] - GIB
    saved = float(said[0].split()[3]) * GIB
    assert saved > 0.9 * (worst[0] - worst[1])
    assert full["baseline"]["devices"] == chunked["baseline"]["devices"]
    between = f"2x{int(sum(worst) / 2 / 0.92) // 2**20}MiB"  # 8 % are kept in reserve
    ((_, output, _),) = together(("--loss", "full", *rest[:3], between, *rest[4:]))
    assert any(remedy.startswith("BALANCE_LOSS=chunked") for remedy in json.loads(output)["remedies"])


def test_bare_checkpointing_in_front_of_the_model(saved):
    """`--gradient-checkpointing MODEL` means 1, and 0 can be said; less is kept with it."""
    rest = (saved / "llama", "--json", "--gpus", MACHINE, "--batch-size", "8", *SHORT)
    done = together(("--gradient-checkpointing", *rest), ("--gradient-checkpointing", "0", *rest))
    found = [json.loads(output)["devices"] for _, output, _ in done]
    kept = [sum(device["terms"]["activations"] for device in devices) for devices in found]
    assert kept[0] < kept[1]


def test_checkpointing_auto_recomputes_no_more_than_it_takes(tmp_path):
    """`--gradient-checkpointing auto` names the layers to recompute: none with room, and some, not all, with less."""
    folder = seven_billion(tmp_path)
    words = (folder, "--json", "--tuning", "lora", "--seq-len", "2048", "--gradient-checkpointing", "auto", "--gpus")
    found = [json.loads(output) for _, output, _ in together((*words, "4x24GiB"), (*words, "4x8GiB"))]
    assert all(each["fits"] for each in found)
    assert found[0]["recomputed"] == [] and 0 < len(found[1]["recomputed"]) < 28
    assert any("layers are recomputed" in note for note in found[1]["notes"])


def test_precision_falls_back_to_the_config_and_then_to_bf16(tmp_path):
    """Weights are counted in what the config names; in bf16 where it names nothing, which is said."""
    transformers.LlamaConfig(**models.SIZES, torch_dtype="float16").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps({key: value for key, value in config.items() if "dtype" not in key}))
    done = together(*((model, "--json", "--gpus", MACHINE, *SHORT) for model in (tmp_path, silent)))
    found = [json.loads(output) for _, output, _ in done]
    assert [each["model"]["dtype"] for each in found] == ["fp16", "bf16"]
    assert [any("dtype" in note for note in each["notes"]) for each in found] == [False, True]


def test_a_config_without_a_class_gets_one_supposed(tmp_path):
    """A config that names no architecture is planned as the usual class of its type, and the plan says so."""
    config = transformers.LlamaConfig(**models.SIZES)
    config.save_pretrained(tmp_path)
    found = planned(tmp_path / "config.json", "--gpus", MACHINE, *SHORT)
    assert found["model"]["class"] == "LlamaForCausalLM"
    assert any("LlamaForCausalLM is supposed" in note for note in found["notes"])


def test_remote_code_runs_only_when_allowed_and_off_standard_output(tmp_path):
    """A model with code of its own is refused in one line; allowed, it is planned, and what it prints is kept away."""
    (tmp_path / "own_model.py").write_text(
        textwrap.dedent(
            """
            from transformers import LlamaConfig, LlamaForCausalLM
            print("hello from afar")
            class OwnConfig(LlamaConfig):
                model_type = "own"
            class OwnForCausalLM(LlamaForCausalLM):
                config_class = OwnConfig
            """
        )
    )
    config = transformers.LlamaConfig(**models.SIZES).to_dict()
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = (tmp_path, "--gpus", MACHINE, *SHORT)
    refused = plan(*words)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--trust-remote-code" in refused.stderr
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert planned(*words, "--trust-remote-code", **modules)["model"]["class"] == "OwnForCausalLM"


@pytest.mark.skipif(version_of("transformers") < (5,), reason="4.x needs triton for it")
def test_quantized_weights_are_counted_as_loaded(tmp_path):
    """An fp8 config is planned with its linear layers at about one byte each, without a device that could run it."""
    folder = seven_billion(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    found = planned(folder, "--gpus", "4x24GiB", "--seq-len", "128", "--tuning", "lora")
    weights = sum(device["terms"]["weights"] for device in found["devices"])
    assert weights == pytest.approx(2 * 2 * 152064 * 3584 + 28 * 233e6, rel=0.01)


def test_a_missing_package_of_a_quantizer_is_named_in_one_line(saved, tmp_path):
    """A config that needs a package that is not there is refused with one line that names it."""
    config = json.loads((saved / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = plan(tmp_path, "--gpus", MACHINE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "hqq" in done.stderr.lower(), done.stderr


BAD_WORDS = {
    "no model": ((), "MODEL is needed"),
    "no devices": (("x",), "--gpus is needed: write devices x size"),
    "devices": (("x", "--gpus", "4"), "--gpus '4': a device has at least 1 MiB"),
    "devices without a value": (("x", "--gpus"), "--gpus needs a value: write devices x size"),
    "number": (("x", "--gpus", "1x1GiB", "--seq-len", "0"), "--seq-len='0' is not a whole number from 1"),
    "tuning": (("x", "--gpus", "1x1GiB", "--tuning", "qlora"), "'qlora' is not one of full, lora, frozen"),
    "optimizer": (("x", "--gpus", "1x1GiB", "--optimizer", "adam"), "--optimizer='adam' is not one of adamw, "),
    "precision": (("x", "--gpus", "1x1GiB", "--precision", "int8"), "'int8' is not one of bf16, fp16, fp32"),
    "checkpointing": (("x", "--gpus", "1x1GiB", "--gradient-checkpointing=some"), "'some' is not 1, 0 or auto"),
    "checkpointing with a number": (
        ("--gradient-checkpointing", "2", "x", "--gpus", "1x1GiB"),
        "'2' is not 1, 0 or auto",
    ),
    "option": (("x", "--gpus", "1x1GiB", "--foo"), "cannot use '--foo'; there is one MODEL, and the options are"),
    "abbreviation": (("x", "--gpus", "1x1GiB", "--seq", "4"), "cannot use '--seq 4'"),
    "folder to write": (("x", "--gpus", "1x1GiB", "--output", "/"), "--output='/' is a folder"),
    "nowhere to write": (("x", "--gpus", "1x1GiB", "--output", "/no/such/map.json"), "there is no folder /no/such"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_get_one_line_with_what_is_allowed(case):
    """Bad usage is exit code 2, nothing on standard output, and one line that says what would be right."""
    words, line = BAD_WORDS[case]
    done = plan(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and line in done.stderr


def test_each_bad_value_gets_its_line():
    """Several bad values, of options and of variables, are all told at once; what an option overrides is not read."""
    words = ("x", "--gpus", "1x1GiB", "--seq-len", "x", "--batch-size", "1")
    done = plan(*words, BALANCE_TUNING="some", BALANCE_BATCH_SIZE="y", BALANCE_MAX_MEMORY="3=1GiB")
    lines = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert done.returncode == 2
    assert [line.partition("=")[0].partition(" ")[0] for line in lines] == [
        "--seq-len", "BALANCE_TUNING", "BALANCE_MAX_MEMORY",
    ]  # fmt: skip


BAD_MODELS = {
    "missing": (None, "no such file"),
    "empty": ({}, "names no model_type"),
    "unknown type": ({"model_type": "zork"}, "does not know its model type 'zork'"),
    "unknown class": ({"model_type": "clip_text_model", "architectures": ["ZorkModel"]}, "has no class ZorkModel"),
    "not JSON": ("{", "not JSON, line 1 column 2"),
    "not an object": ([], "a config is a JSON object"),
    "impossible": ({"model_type": "llama", "hidden_size": "wide", "architectures": ["LlamaForCausalLM"]}, "str"),
}


def test_bad_models_get_one_line(tmp_path):
    """A model that cannot be had is exit code 2 and one line with its name and what is wrong."""
    files = [tmp_path / f"{case}.json" for case in BAD_MODELS]
    for file, (content, _) in zip(files, BAD_MODELS.values(), strict=True):
        if content is not None:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    done = together(*((file, "--gpus", "2x1GiB") for file in files))
    for file, (_, line), (code, output, errors) in zip(files, BAD_MODELS.values(), done, strict=True):
        assert (code, output) == (2, "")
        assert errors.count("\n") == 1 and str(file) in errors and line in errors, errors


def test_a_hub_id_that_is_not_in_the_cache_gets_one_line(tmp_path):
    """Offline, a hub id that nobody has fetched is exit code 2 and one line."""
    done = plan("nobody/nothing", "--gpus", "2x1GiB", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nor in the cache of the hub; the hub cannot be reached" in done.stderr


def test_a_hub_id_in_the_cache_is_planned_offline(saved, tmp_path):
    """Offline, a hub id whose config is in the local cache is planned from it."""
    snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    (snapshot / "config.json").write_bytes((saved / "llama" / "config.json").read_bytes())
    found = planned("some/llama", "--gpus", MACHINE, *SHORT, HF_HOME=str(tmp_path))
    assert found["model"]["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("named", ["", "config.json"], ids=["folder", "file"])
def test_the_model_s_config_is_not_written_over(saved, named):
    """`--output` with the config itself would leave a folder of weights that nobody can load."""
    config = saved / "llama" / "config.json"
    before = config.read_text()
    with pytest.raises(UsageError, match="own config"):
        read_options([str(saved / "llama" / named), "--gpus", MACHINE, "--output", str(config)], {})
    assert config.read_text() == before


def test_an_unwritable_output_gets_one_line(saved):
    """A folder in which nobody may make files is exit code 2 and one line, though the plan is printed."""
    done = plan(saved / "llama", "--gpus", MACHINE, *SHORT, "--output", "/proc/map.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/proc/map.json" in done.stderr


def seven_billion(folder):
    """Write a config of the size of Qwen2.5-7B to `folder` and return it."""
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "7b")
    return folder / "7b"
