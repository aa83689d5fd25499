"""`balance-shim plan` as its users run it: in processes of its own, on configs in folders."""

import json
import textwrap

import transformers

from balance_shim.versions import version_of
from tests import models, processes

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
MACHINE = "4x512MiB"  # some of it is for what the runtime takes
SHORT = ("--seq-len", "64")
SAVED = ("llama", "llama-tied", "mixtral", "qwen-vl", "t5", "bert-classifier")
SAVED = tuple(name for name in SAVED if name in models.ALL)


def plan(*arguments, **variables):
    """Run the command and return what it left."""
    return processes.python("-m", "balance_shim", "plan", *map(str, arguments), **{**QUIET, **variables})


def plan_json(*arguments, code=0, **variables):
    """Run the command with `--json`; return the object on standard output, which holds nothing else."""
    done = plan(*arguments, "--json", **variables)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def together(*commands, timeout=120):
    """Run several commands in one process, which imports the libraries once; return (code, stdout, stderr) of each."""
    lines = [["plan", *map(str, arguments)] for arguments in commands]
    printed = processes.output_of(
        f"""
        import contextlib, io, json
        from balance_shim.cli.main import main
        results = []
        for arguments in {lines!r}:
            output, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = main(arguments)
            results.append((code, output.getvalue(), errors.getvalue()))
        print(json.dumps(results))
        """,
        timeout=timeout,
        BALANCE_MODE="off",
        **QUIET,
    )
    return json.loads(printed.splitlines()[-1])


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


def seven_billion(folder):
    """Write a config of the size of Qwen2.5-7B to `folder` and return it."""
    config = transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "7b")
    return folder / "7b"
