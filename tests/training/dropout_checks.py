"""Dropout in layers that are recomputed, on simulated devices; run by test_dropout.py."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from balance_shim import simulation

simulation.install(simulation.parse_spec("4x64MiB"))

import transformers  # noqa: E402 - as in a script, where the simulation is there before anything else

import balance_shim  # noqa: E402
from balance_shim.memory.recomputation import recomputable_layers, recompute_only  # noqa: E402
from balance_shim.training.checkpoint_inputs import SendingCheckpoint, _layer_of, send_inputs_first  # noqa: E402
from tests import models  # noqa: E402
from tests.simulation.child import main  # noqa: E402

folder = Path(tempfile.mkdtemp(prefix="dropout-"))
SIZES = {**models.SIZES, "attention_dropout": 0.5}


def saved(config):
    transformers.set_seed(1)
    path = folder / type(config).__name__
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def loaded(config):
    balance_shim.install(mode="balanced", report="off")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(config), device_map="auto", attn_implementation="eager"
    )
    assert len({parameter.device for parameter in model.parameters()}) == 4
    return model.train()


def gradients(model):
    model.zero_grad()
    ids = torch.arange(64).reshape(2, 32)
    transformers.set_seed(3)
    model(input_ids=ids.to("npu:0"), labels=ids.to("npu:0"), use_cache=False).loss.backward()
    return {name: parameter.grad.cpu().clone() for name, parameter in model.named_parameters()}


def same_when_recomputed(config, reentrant=False):
    model = loaded(config)
    plain, again = gradients(model), gradients(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    recompute_only(model, frozenset(recomputable_layers(model)), {"use_reentrant": reentrant})
    send_inputs_first(model)
    recomputed = gradients(model)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-7), name


def check_gradients_of_layers_in_a_list_by_themselves():
    """Llama: its layers take keyword arguments."""
    same_when_recomputed(transformers.LlamaConfig(**SIZES))


def check_gradients_with_re_entrance():
    same_when_recomputed(transformers.LlamaConfig(**SIZES), reentrant=True)


def check_gradients_of_layers_that_take_positions():
    """GPT-2: residual, embedding and attention dropout, arguments by position."""
    sizes = {"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 500}
    same_when_recomputed(transformers.GPT2Config(**sizes, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5))


def check_a_trainer_checkpoints_behind_the_move():
    """Under `Trainer`, as the script switches checkpointing on, hidden states are on the layer's device by then."""
    model = loaded(transformers.LlamaConfig(**SIZES))
    seen = []

    class Spying(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            for module in model.modules():
                function = vars(module).get("_gradient_checkpointing_func")
                if isinstance(function, SendingCheckpoint) and not hasattr(function, "spied"):
                    function.spied = True
                    function._function = spying(function._function)

    def spying(function):  # what is called when hidden states have been sent
        def spy(call, hidden, *args, **kwargs):
            weight = next(_layer_of(call).parameters())
            seen.append((hidden.device, weight.device))
            return function(call, hidden, *args, **kwargs)

        return spy

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[],
        disable_tqdm=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    examples = [{"input_ids": [token] * 16, "labels": [token] * 16} for token in range(5, 13)]
    transformers.Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Spying()]).train()
    assert len(seen) >= models.SIZES["num_hidden_layers"] and len({layer for _, layer in seen}) == 4, seen
    assert all(hidden == layer for hidden, layer in seen), seen


os.environ["BALANCE_SEQ_LEN"] = "32"
if __name__ == "__main__":
    main(globals())
    sys.exit()
