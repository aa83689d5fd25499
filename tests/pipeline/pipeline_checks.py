"""Micro-batches in flight on four simulated devices, beside the same trainings without: `... RESULT FOLDER`."""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

from balance_shim import simulation

simulation.install(simulation.parse_spec("4x64MiB"))

# As in a script, where the simulation is there before anything else.
from accelerate.hooks import AlignDevicesHook  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)
from trl import SFTConfig, SFTTrainer  # noqa: E402

from balance_shim.errors import BalanceError  # noqa: E402
from balance_shim.pipeline import copies  # noqa: E402
from balance_shim.pipeline.shared_copies import SharedCopies  # noqa: E402
from balance_shim.placement.align_hooks import hooks_of  # noqa: E402
from tests import models  # noqa: E402
from tests.pipeline.trainings import assert_in_flight, assert_same, tokens, train  # noqa: E402
from tests.simulation.child import main  # noqa: E402

FOLDER = Path(sys.argv[2])
LLAMA = models.saved_llama(FOLDER / "llama")


def llama(**options):
    return AutoModelForCausalLM.from_pretrained(LLAMA, device_map="auto", **options)


@contextlib.contextmanager
def raises(kind, words):
    """As pytest's, which scripts of checks do without."""
    try:
        yield
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def compare(count, load, rows, calls=8, in_flight=None, tolerance=1e-6, **options):
    plain, piped = (train(setting, load, rows, **options) for setting in ("off", count))
    assert len({each.device for each in piped.trainer.model.parameters()}) == 4
    assert "balance_shim: warning" not in piped.said, piped.said
    assert_same(plain, piped, tolerance)
    assert_in_flight(plain, 1, calls)
    assert_in_flight(piped, in_flight or count, calls)
    return piped


def check_an_accumulation_in_flight():
    """All four micro-batches of a step at once, gradients clipped: the same to the bit, and hooks as before."""
    piped = compare(4, llama, tokens(), tolerance=0)
    kinds = {type(hook) for module in piped.trainer.model.modules() for hook in hooks_of(module)}
    assert kinds == {AlignDevicesHook} and "backward" in vars(piped.trainer.accelerator)


def check_chunks_and_dropout():
    """Chunks of two; dropout draws the same numbers, since forward passes keep their order."""
    compare(3, lambda: llama(attention_dropout=0.3), tokens(), in_flight=2, tolerance=0)


def check_lora_with_checkpointing():
    """Adapters in a model that recomputes its layers without re-entering autograd."""
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    compare(4, llama, tokens(), wrap=lambda model: get_peft_model(model, config), **options)


def check_mixed_precision():
    """autocast to bfloat16, a gradient scaler for float16."""
    compare(4, llama, tokens(), bf16=True)
    compare(4, llama, tokens(), fp16=True)


def check_the_loss_in_chunks():
    """Logits that are large enough to be deferred, with the head's own device."""
    rows = tokens(length=200)
    with mock.patch("balance_shim.logits.chunks.rows_in_chunk", lambda rows, *_: 64):
        piped = compare(4, llama, rows)
    assert "stays full" not in piped.said


def check_sft():
    """TRL's trainer reads metrics from the device in each forward pass, which is named; losses are the same."""
    models.save_tokenizer(LLAMA)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in tokens()])
    options = {"trainer_options": {"processing_class": AutoTokenizer.from_pretrained(LLAMA)}}
    piped = compare(4, llama, data, kind=SFTTrainer, arguments=SFTConfig, **options)
    assert "sft_trainer.py:" in piped.said and "only backward passes overlap" in piped.said, piped.said


def check_pictures():
    """A vision-language model whose tower is in front."""
    text = LlamaConfig(**models.SIZES)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=500)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(FOLDER / "llava")
    rows = tokens()
    for row in rows:
        row["input_ids"][3:7] = 500
        row["pixel_values"] = torch.randn(3, 28, 28)

    def load():
        return LlavaForConditionalGeneration.from_pretrained(FOLDER / "llava", device_map="auto")

    compare(4, load, rows)


def check_t5():
    """An encoder whose output all layers of the decoder take: it crosses once for each device."""
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=512, decoder_start_token_id=0)).save_pretrained(
        FOLDER / "t5"
    )
    compare(4, lambda: T5ForConditionalGeneration.from_pretrained(FOLDER / "t5", device_map="auto"), tokens())


def check_a_batch_is_split():
    """Without accumulation the sequences of a batch are in flight; their losses add up to that of the batch."""
    # Gradients are added in another order; Adam would make large differences of small ones.
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2, "optim": "sgd"}
    plain, piped = (train(setting, llama, tokens(), **options) for setting in ("off", 2))
    assert_same(plain, piped)
    assert_in_flight(piped, 2, 4)


def check_a_batch_that_may_not_be_split():
    """The script's own loss may couple sequences: one line, and the batch runs whole."""

    class Coupled(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.float().std()

    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2, "kind": Coupled}
    plain, piped = (train(setting, llama, tokens(), **options) for setting in ("off", 2))
    assert_same(plain, piped, 0)
    assert_in_flight(piped, 1, 2)
    assert piped.said.count("a batch is not split") == 1


def check_a_step_of_the_scripts_own():
    """A training_step that may look at gradients in between: one line, and nothing is in flight."""

    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    os.environ["BALANCE_STRICT"] = "0"
    piped = train(4, llama, tokens(), kind=Own)
    assert_in_flight(piped, 1, 8)
    assert piped.said.count("Own.training_step may depend on one micro-batch after the other") == 1
    os.environ["BALANCE_STRICT"] = "1"
    with raises(BalanceError, "one after the other"):
        train(4, llama, tokens(), kind=Own)


def _failing(at, failure, backward=False):
    """Return a function that makes the call number `at` of a model's head stop."""

    def prepare(model):
        calls = []

        def stop(*_):
            calls.append(None)
            if len(calls) == at:
                raise failure
            return None

        head = model.get_output_embeddings()
        head.register_full_backward_pre_hook(stop) if backward else head.register_forward_pre_hook(stop)

    return prepare


def check_a_chunk_that_stops():
    """Out-of-memory halves the chunks, another error ends them; the step is repeated with the same result."""
    plain = train("off", llama, tokens())
    for at, backward in ((3, False), (2, True), (6, True)):
        stopped = train(4, llama, tokens(), prepare=_failing(at, torch.OutOfMemoryError("out of memory"), backward))
        assert_same(plain, stopped, 1e-6)
        assert "out of memory with 4 micro-batches in flight: 2 in flight from now on" in stopped.said, stopped.said
    stopped = train(2, llama, tokens(), prepare=_failing(4, RuntimeError("stop"), backward=True))
    assert_same(plain, stopped, 1e-6)
    assert "2 micro-batches in flight failed (RuntimeError: stop): one micro-batch at a time" in stopped.said


def check_copies_that_are_shared():
    """A copy is made once, made anew after a change in place, carries gradients back, and goes with its source."""
    shared, there = SharedCopies(), torch.device("npu", 1)
    source = torch.arange(4.0, device="npu:0")
    copy = shared.on(source, there)
    assert copy.device == there and shared.on(source, there) is copy and shared.made == 1
    copy.add_(1)
    assert shared.on(source, there).tolist() == [0, 1, 2, 3]
    source.mul_(2)
    again = shared.on(source, there)
    assert again.tolist() == [0, 2, 4, 6] and shared.made == 3
    del source
    assert not shared._sources
    leaf = torch.ones(2, device="npu:0", requires_grad=True)
    with torch.no_grad():
        assert not shared.on(leaf, there).requires_grad
    (shared.on(leaf, there) * 2 + shared.on(leaf, there)).sum().backward()
    assert leaf.grad.tolist() == [3, 3] and leaf.grad.device.index == 0


def check_transfers_of_one_micro_batch():
    """With 1 only the transfers change: what several layers take crosses once for each device and micro-batch."""
    assert_same(train("off", llama, tokens()), train(1, llama, tokens()), 0)
    with mock.patch("balance_shim.pipeline.shared_copies.cross", side_effect=copies.cross) as crossed:
        outcome = train(1, llama, tokens(), max_steps=1)
    assert_in_flight(outcome, 1, 4)
    tensors = [call.args for call in crossed.call_args_list if call.args[0].dim()]  # not the count of a step's labels
    pairs = Counter((id(tensor), device) for tensor, device in tensors)  # the mock keeps the tensors
    assert set(pairs.values()) == {1}
    # Four micro-batches, three boundaries: hidden states, and at most a mask, positions, cosine and sine.
    assert 4 * 3 * 3 <= len(pairs) <= 4 * 3 * 5, len(pairs)


if __name__ == "__main__":
    main(globals())
