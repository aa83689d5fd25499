"""A model in float32 with grouped queries, placed by the shim: its attention runs fused, with the same losses."""

import os
import sys
import tempfile

from balance_shim import simulation
from balance_shim.units import MIB

os.environ["BALANCE_SEQ_LEN"] = "256"
simulation.install(simulation.parse_spec("2x256MiB"))

import torch  # noqa: E402
import transformers  # noqa: E402

import balance_shim  # noqa: E402 - as in a script: the simulation is there first
from tests import models  # noqa: E402
from tests.simulation.child import main  # noqa: E402

FOLDER = tempfile.mkdtemp()
IDS = torch.arange(256)[None] % 100


def trained(armed):
    """Return (loss, bytes kept by forward, largest kept attention calls without a kernel) of a step on device 0."""
    machine = simulation._installation.machine
    machine.math_attention.clear()
    if armed:
        balance_shim.install(mode="balanced")
    else:
        balance_shim.uninstall()
    device_map = "auto" if armed else {"": 0}
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, device_map=device_map)
    before = sum(device.live for device in simulation.usage())
    loss = model(input_ids=IDS.to("npu:0"), labels=IDS.to("npu:0"), use_cache=False).loss
    activations = sum(device.live for device in simulation.usage()) - before
    loss.backward()
    return loss.item(), activations, len(machine.math_attention)


def check_placed_models_repeat_keys_and_values():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(FOLDER)
    plain_loss, plain_activations, plain_calls = trained(armed=False)
    loss, activations, calls = trained(armed=True)
    module = sys.modules["transformers.integrations.sdpa_attention"]
    asks = hasattr(module, "use_gqa_in_sdpa")  # from 4.54 on; before, keys and values are always repeated
    assert abs(loss - plain_loss) < 1e-5, (loss, plain_loss)
    assert calls == 0 and plain_calls == int(asks), (calls, plain_calls)
    if asks:
        saved = config.num_hidden_layers * config.num_attention_heads * 256 * 256 * 4
        assert plain_activations - activations > saved / 2 > MIB, (plain_activations, activations, saved)


main(globals())
