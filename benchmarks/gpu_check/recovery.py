"""Out-of-memory on the card in each phase of a step, and what `BALANCE_MICRO_BATCH` makes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from . import configs
from .card import Card

SEQUENCES, TOKENS = 8, 1024
MODEL = "Llama-3.2-1B, 8 layers"


def recovered(card: Card) -> Iterator[dict[str, Any]]:
    model, tokens = ("tiny", 128) if card.is_simulated else (MODEL, TOKENS)
    for checkpointing in (False, True):
        plain = _train(card, model, tokens, checkpointing, None)
        forward, total = plain["forward"], plain["whole"]
        rooms = {"recomputation" if checkpointing else "backward pass": (forward + total) // 2}
        if not checkpointing:
            rooms["forward pass"] = int(0.8 * forward)
        for phase, room in rooms.items():
            outcome = _train(card, model, tokens, checkpointing, room)
            losses = {"losses": outcome["losses"], "losses_with_room": plain["losses"]}
            yield {"aimed_at": phase, "room": room, "needs": total, **losses, **outcome["failure"]}
            card.empty()


def _train(card: Card, name: str, tokens: int, checkpointing: bool, room: int | None) -> dict[str, Any]:
    """Train for two steps of `ROWS` sequences; with `room`, only so many bytes are free besides the weights."""
    import transformers

    import balance_shim
    from balance_shim.monitoring.out_of_memory import is_out_of_memory, place_of

    balance_shim.install(mode="balanced", micro_batch=SEQUENCES, report="off")
    torch.manual_seed(0)
    model = configs.build(name, torch.bfloat16, card.device)
    ids = torch.randint(10, configs.MODELS[name][1]["vocab_size"], (SEQUENCES, tokens))
    observed: dict[str, Any] = {"forward": 0, "whole": 0, "failure": {}}

    class Observed(transformers.Trainer):
        """FlightRecord the peaks of the first forward pass and step, and the errors before the shim handles them."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            before = card.module.memory_allocated(0)
            card.module.reset_peak_memory_stats(0)
            try:
                result = super().compute_loss(model, inputs, return_outputs, **kwargs)
            except Exception as failure:
                _note(failure, model)
                raise
            observed["forward"] = observed["forward"] or card.module.max_memory_allocated(0) - before
            observed.setdefault("before", before)
            return result

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().training_step(*args, **kwargs)
            observed["whole"] = observed["whole"] or card.module.max_memory_allocated(0) - observed["before"]
            return result

    def _note(failure: BaseException, model: Any) -> None:
        if is_out_of_memory(failure) and not observed["failure"]:
            place = place_of(failure, model)
            observed["failure"] = {
                "phase": place.phase, "module": place.module, "device": place.device, "wanted": place.wanted,
                "words": str(failure).splitlines()[0][:200],
            }  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=2, per_device_train_batch_size=SEQUENCES, report_to=[], save_strategy="no",
            optim="sgd", learning_rate=1e-3, logging_steps=1, disable_tqdm=True, max_grad_norm=0,
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        examples = [{"input_ids": sequence, "labels": sequence} for sequence in ids] * 2
        trainer = Observed(model=model, args=arguments, train_dataset=examples)
        engine = trainer.accelerator.backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            try:
                return engine(*args, **kwargs)
            except Exception as failure:
                _note(failure, trainer.model)
                raise

        trainer.accelerator.backward = backward  # type: ignore[method-assign]
        error = ""
        try:
            if room is None:
                trainer.train()
            else:
                with card.filled(room):
                    trainer.train()
        except Exception as failure:
            error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
    observed["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    observed["failure"] = {**observed["failure"], "recovered": not error and bool(observed["failure"]), "error": error}
    return observed
