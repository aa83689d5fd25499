"""One training of the sweep, in a process forked for it: the reference that also makes the model, or a trial."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch

from .batches import Proposal, collate, proposals
from .classes import Candidate
from .configs import tiny

SEQUENCES = 2  # a step
STEPS = 2
MOST_PROPOSALS = 24


class NotTrainable(Exception):
    """Why a class trains on no device with any batch that was tried."""


def make(candidate: Candidate, folder: Path) -> dict[str, Any]:
    """Make a tiny model of the class, find a batch that trains, train on the CPU; leave model and examples in `folder`.

    Returns:
        "losses", "norms", "inputs" and "supports": whether the class declares what may not be split.

    Raises:
        NotTrainable: the configuration cannot be made tiny, or no batch trains.
    """
    torch.manual_seed(0)
    try:
        model_class = candidate.model_class
        model = model_class(tiny(model_class.config_class)).train()
    except Exception as error:
        raise NotTrainable(f"no tiny model: {_short(error)}") from error
    failures: list[str] = []
    for number, proposal in enumerate(proposals(model, candidate.task, SEQUENCES * STEPS)):
        if number >= MOST_PROPOSALS:
            break
        try:
            _runs(model, proposal)
        except Exception as error:
            failures.append(_short(error))
            continue
        model.save_pretrained(folder)
        torch.save(proposal, folder / "examples.pt")
        declared = getattr(model_class, "_no_split_modules", None) is not None
        del model
        result = train(candidate, folder, device_map=None)
        return {**result, "inputs": proposal.inputs, "own_loss": proposal.own_loss, "declared": declared}
    raise NotTrainable("no batch trains: " + " | ".join(dict.fromkeys(failures)) if failures else "no batch proposed")


def _runs(model: Any, proposal: Proposal) -> None:
    """Raise what the model raises at this batch, or if it gives no loss to train."""
    batch = collate(proposal.examples[:SEQUENCES], proposal.joined)
    if proposal.own_loss:
        loss = loss_of(model(**batch))
    else:
        outputs = model(**batch)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if loss is None:
            raise ValueError("no loss")
    if not torch.isfinite(loss.detach()).all() or not loss.requires_grad:
        raise ValueError(f"the loss is {loss.detach().mean().item()}, gradients {loss.requires_grad}")
    loss.mean().backward()
    model.zero_grad(set_to_none=True)


def loss_of(outputs: Any) -> torch.Tensor:
    """Return a loss as a user's own Trainer might compute it: the mean square of the first floating output."""
    for value in outputs.values() if isinstance(outputs, dict) else outputs:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad and value.dim():
            return value.float().pow(2).mean()
    raise ValueError("the model returns nothing to compute a loss of")


def train(candidate: Candidate, folder: Path, device_map: str | None) -> dict[str, Any]:
    """Train the model in `folder` as a user's script does; with a device map, on the devices of this process.

    Returns:
        "losses" and "norms" of the steps, "devices": how many the model is on.
    """
    import transformers

    losses: list[float] = []

    class Trainer(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())  # what the Trainer logs is rounded in some versions
            return loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if not proposal.own_loss:
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            outputs = model(**inputs)
            loss = loss_of(outputs)
            return (loss, outputs) if return_outputs else loss

    proposal = torch.load(folder / "examples.pt", weights_only=False)
    keywords = {} if device_map is None else {"device_map": device_map}
    torch.manual_seed(0)
    model = candidate.model_class.from_pretrained(folder, **keywords)
    places = set(map(str, (getattr(model, "hf_device_map", None) or {"": "cpu"}).values()))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=SEQUENCES, max_steps=STEPS, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, optim="adamw_torch", learning_rate=1e-4,
        remove_unused_columns=False, use_cpu=device_map is None, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=proposal.examples,
        data_collator=lambda examples: collate(examples, proposal.joined),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": losses,
        "norms": [log.get("grad_norm") for log in logs],
        "devices": len(places),
        "final_devices": len(set(map(str, (getattr(model, "hf_device_map", None) or {"": 0}).values()))),
    }


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def short(error: BaseException) -> str:
    """Return `error` in a line, with where it was raised."""
    return _short(error)
