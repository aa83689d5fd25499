"""Unmodified training on four simulated devices beside the same training on the plain CPU: `... RESULT MODEL`."""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from balance_shim import simulation

simulation.install(simulation.parse_spec("4x64MiB"))

import transformers  # noqa: E402 - as in a script, where the simulation is there before anything else
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

from balance_shim.units import MIB  # noqa: E402
from tests.simulation.child import main  # noqa: E402

transformers.logging.set_verbosity_error()
MODEL = sys.argv[2]
OUT = Path(tempfile.mkdtemp())
LOGGED = 2e-5 if transformers.__version__ >= "5" else 2e-4  # 4.x rounds the losses that it logs
DTYPE = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"

# transformers' own map; the head goes to the first device, because 4.51 fails with any other.
MAP = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 3, "model.rotary_emb": 0}
MAP |= {f"model.layers.{number}": number // 2 + 1 for number in range(6)}


def load(simulated, **options):
    return AutoModelForCausalLM.from_pretrained(MODEL, **({"device_map": MAP} if simulated else {}), **options)


def examples(count=8):
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 500, (count, 24))]


def train(simulated, model=None, resume=None, load_options=None, **arguments):
    """Return the Trainer and the losses of its steps."""
    if not simulated:
        arguments["use_cpu"] = True
    arguments = {"max_steps": 3, "save_strategy": "no", "output_dir": str(OUT / "out"), **arguments}
    settings = TrainingArguments(
        per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True, seed=3, **arguments
    )
    model = model or load(simulated, **(load_options or {}))
    trainer = Trainer(model=model, args=settings, train_dataset=examples(), eval_dataset=examples(4))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


def compare(tolerance=LOGGED, **arguments):
    simulation.reset_peaks()
    simulated, plain = train(True, **arguments)[1], train(False, **arguments)[1]
    assert all(device.peak > MIB // 8 for device in simulation.usage()), "every device takes part"
    assert len(simulated) == 3 and plain[0] != plain[-1]
    difference = max(abs(one - other) for one, other in zip(simulated, plain, strict=True))
    assert difference < tolerance, (simulated, plain)


def check_full_fine_tuning():
    compare()


def check_gradient_checkpointing_both_ways():
    for reentrant in (True, False):
        compare(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def check_half_precision():
    compare(2e-2, bf16=True)
    compare(2e-2, load_options={DTYPE: torch.bfloat16})


def check_accumulation_and_another_optimizer():
    compare(optim="adamw_torch", gradient_accumulation_steps=2)


def check_fp16_with_a_gradient_scaler():
    losses = train(True, fp16=True)[1]
    assert all(abs(loss - other) < 2e-2 for loss, other in zip(losses, train(False)[1], strict=True))


def check_evaluation_and_workers():
    trainer, _ = train(True, dataloader_num_workers=2)
    plain, _ = train(False)
    assert abs(trainer.evaluate()["eval_loss"] - plain.evaluate()["eval_loss"]) < LOGGED


def check_saving_and_going_on():
    uninterrupted = train(True, max_steps=4)[1]
    options = {"output_dir": str(OUT / "saved"), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    train(True, **options)
    shutil.rmtree(OUT / "saved" / "checkpoint-4")
    trainer, losses = train(True, resume=str(OUT / "saved" / "checkpoint-2"), **options)
    assert max(abs(one - other) for one, other in zip(losses[-2:], uninterrupted[-2:], strict=True)) < LOGGED, (
        losses,
        uninterrupted,
    )
    trainer.model.save_pretrained(OUT / "model")
    read = dict(AutoModelForCausalLM.from_pretrained(OUT / "model").named_parameters())
    for name, weight in trainer.model.named_parameters():
        assert weight.device.type == "npu" and torch.equal(read[name], weight.cpu()), name


class _Script(Trainer):
    """A user's Trainer whose own tensors are on "cuda"."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu").to(device)
        with torch.autocast("cuda", enabled=False):
            inputs = {name: value.to(device) for name, value in inputs.items()}
            out = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = out.loss * weights.mean().to(out.loss.device)
        return (loss, out) if return_outputs else loss


def check_a_script_that_writes_cuda():
    """Model by device map, or whole on "cuda:1"; its own tensors by that name; losses of the plain CPU."""
    plain = train(False)[1]
    for device_map in (MAP, "cuda:1", {"": "cuda:2"}, {**MAP, "lm_head": "cuda:0"}):
        model = AutoModelForCausalLM.from_pretrained(MODEL, device_map=device_map)
        settings = TrainingArguments(
            per_device_train_batch_size=2, logging_steps=1, report_to=[], disable_tqdm=True, seed=3, max_steps=3,
            save_strategy="no", output_dir=str(OUT / "cuda"), bf16=not torch.cuda.is_bf16_supported(),
        )  # fmt: skip
        trainer = _Script(model=model, args=settings, train_dataset=examples())
        assert settings.device.type == trainer.accelerator.device.type == "npu"
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        assert max(abs(one - other) for one, other in zip(losses, plain, strict=True)) < LOGGED, (losses, plain)
        assert {weight.device.type for weight in model.parameters()} == {"npu"}

    def by_hand(device):
        model = load(False).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch = {name: value[None].to(device) for name, value in examples(1)[0].items()}
        losses = []
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = by_hand("cpu")
    assert max(abs(one - other) for one, other in zip(by_hand("cuda:3"), expected, strict=True)) < LOGGED


def check_devices_are_counted_as_on_cuda():
    """A script sees n_gpu and the batch that CUDA devices would give it; a Trainer then trains one copy."""
    arguments = TrainingArguments(output_dir=str(OUT / "out"), per_device_train_batch_size=2, report_to=[])
    assert arguments.n_gpu == torch.cuda.device_count() == 4 and arguments.train_batch_size == 8
    assert TrainingArguments(output_dir=str(OUT / "out"), use_cpu=True, report_to=[]).n_gpu == 0
    plain = train(False)[1]
    for model in (load(True), load(False), AutoModelForCausalLM.from_pretrained(MODEL, device_map={"": 0})):
        trainer, losses = train(True, model)
        assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 2
        assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
        assert max(abs(one - other) for one, other in zip(losses, plain, strict=True)) < LOGGED, (losses, plain)
    assert Trainer(model=load(False)).args.n_gpu == 1


def check_generation():
    torch.manual_seed(2)
    ids = torch.randint(1, 500, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = load(True).generate(ids.to("npu:0"), attention_mask=mask.to("npu:0"), **options)
    assert generated.device.type == "npu"
    assert torch.equal(generated.cpu(), load(False).generate(ids, attention_mask=mask, **options))


def check_adapters():
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted(simulated):
        torch.manual_seed(5)
        config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        return get_peft_model(load(simulated), config)

    trainer, losses = train(True, adapted(True), learning_rate=1e-2)
    plain = train(False, adapted(False), learning_rate=1e-2)[1]
    assert max(abs(one - other) for one, other in zip(losses, plain, strict=True)) < LOGGED, (losses, plain)
    trainer.save_model(str(OUT / "adapter"))
    merged = PeftModel.from_pretrained(load(True), OUT / "adapter").merge_and_unload()
    ids = examples(1)[0]["input_ids"][None].to("npu:0")
    with torch.no_grad():
        assert (merged(ids).logits - trainer.model.base_model.model.eval()(ids).logits).abs().max() < 1e-2


def check_memory_that_runs_out_can_be_caught_and_training_goes_on():
    held = torch.empty(torch.npu.mem_get_info(2)[0] // 4 - MIB // 8, device="npu:2")
    try:
        train(True)
        raise AssertionError("it fits")
    except torch.OutOfMemoryError as error:
        assert "npu:2" in str(error)
    del held
    train(True)


main(globals())
