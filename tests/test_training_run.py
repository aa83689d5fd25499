"""What is kept about a trainer: ended once, in order, and gone with it."""

import gc
from dataclasses import dataclass

import pytest

from balance_shim import training_run
from balance_shim.training_run import Part


@dataclass
class Trainer:
    """Compares by value, so that it cannot be hashed, as a script's own class may."""

    name: str = "one"


def test_parts_end_with_the_training_the_last_first():
    """Those that outlive it stay, and a second end does nothing."""
    ended = []
    first = Part("first", lambda trainer, value: ended.append((trainer.name, value)))
    last = Part("last", lambda trainer, value: ended.append((trainer.name, value)))
    lasting = Part("lasting", outlives=True)
    trainer, other = Trainer(), Trainer()
    for part, value in ((first, 1), (last, 2), (lasting, 3)):
        assert part.keep(trainer, value) == value
    assert first.of(trainer) == 1 and first.of(other) is None
    training_run.end(trainer)
    training_run.end(trainer)
    assert ended == [("one", 2), ("one", 1)]
    assert first.of(trainer) is None and lasting.of(trainer) == 3


def test_one_that_fails_keeps_no_other_from_ending(capsys):
    """It is one warning."""
    ended = []
    part = Part("well", lambda *_: ended.append(True))
    failing = Part("watching memory", lambda *_: 1 / 0, instead="its last lines are missing")
    trainer = Trainer()
    part.keep(trainer, 1)
    failing.keep(trainer, 2)
    training_run.end(trainer)
    assert ended == [True]
    assert "watching memory failed (ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("part", [Part("of a training"), Part("lasting", outlives=True)])
def test_nothing_is_left_of_a_trainer_that_is_gone(part):
    """Also where its number is given to another object."""
    trainer = Trainer()
    number = id(trainer)
    part.keep(trainer, object())
    del trainer
    gc.collect()
    assert number not in training_run._runs
