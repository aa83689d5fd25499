"""What ranks note of their passes, and the line that tells where two of them part."""

import pytest
import torch

from balance_shim.zero.divergence import differences, flight_record, passes

NAMES = ["a", "a.b", "a.c", "head", "tower.layers.0", "tower.layers.1"]
PARAMETERS = ["head.weight", "a.weight", "tower.0.weight", "tower.1.weight"]
FULL = [0, 1, 2, 4, 5, 3]


def records_of(*ranks, before=None, inputs=()):
    """FlightRecord by rank of `ranks`: (modules, gradients, whether the pass has ended), after one step of `before`."""
    records = {}
    for rank, (modules, gradients, ended) in enumerate(ranks):
        written = flight_record.FlightRecord(NAMES, PARAMETERS, rank)
        for pass_modules, pass_gradients in ([before] if before else []) + [(modules, gradients)]:
            written.begin(list(inputs[rank]) if inputs else [])
            for index in pass_modules:
                written.add(index)
            for index in pass_gradients:
                written.add_gradient(index)
        if ended:
            written.end()
        records[rank] = written.as_dict()
    return records


def line(records):
    return differences.difference(records, NAMES, PARAMETERS)


ORDERS = {
    "skips one": ([0, 1, 2, 3], [0, 2, 3], ([], []), "rank 1 skips a.b, which rank 0 runs"),
    "skips a tower": (
        [0, 4, 5, 3], [0, 3], (["pixels"], []),
        "rank 1 skips tower.layers, which rank 0 runs; only the batch of rank 0 has pixels",
    ),
    "first rank skips": ([0, 2], [0, 1, 2], ([], []), "rank 0 skips a.b, which rank 1 runs"),
    "others": ([0, 1], [0, 2], ([], []), "rank 0 runs a.b where rank 1 runs a.c"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_what_distinguishes_two_ranks(name):
    """The first module that not both run, by its name, and what only one batch holds."""
    first, second, inputs, expected = ORDERS[name]
    records = records_of((first, [], False), (second, [], False), inputs=inputs)
    assert f"ranks run different modules in step 1: {expected}" in line(records)


AFTER_ONE = {
    "skips one": ([0, 1], [0, 2], "rank 1 skips a.b, which rank 0 runs"),
    "skips a tower": ([0, 1, 2, 4], [0, 1, 2, 3], "rank 1 skips tower.layers, which rank 0 runs"),
    "first rank skips": ([0, 1, 2, 3], [0, 1, 2, 4], "rank 0 skips tower.layers, which rank 1 runs"),
    "neither as before": ([0, 5], [0, 3], "rank 0 runs tower.layers.1 where rank 1 runs head"),
}


@pytest.mark.parametrize("name", AFTER_ONE)
def test_who_skips_is_told_by_the_step_before(name):
    """Although the rank that runs all has come no further than the first module that the other one leaves out."""
    first, second, expected = AFTER_ONE[name]
    records = records_of((first, [], False), (second, [], False), before=(FULL, []))
    assert f"in step 2: {expected}" in line(records)


def test_ranks_that_agree_as_far_as_they_go():
    """One may be ahead of the other; but what a rank has not run in a pass that it has ended is left out."""
    assert line(records_of((FULL, [0], False), (FULL[:2], [], False))) is None
    assert "rank 1 skips head" in line(records_of((FULL, [], False), (FULL[:-1], [], True)))


def test_a_rank_that_has_gone_on_is_compared_by_its_last_pass():
    """It skipped the last module and began the next step, while the other one still waits in this one."""
    records = records_of((FULL, [], False), (FULL[:-1], [], False))
    ahead = flight_record.FlightRecord(NAMES, PARAMETERS, 1)
    ahead.begin([])
    for index in FULL[:-1]:
        ahead.add(index)
    ahead.begin([])
    records[1] = ahead.as_dict()
    assert "in step 1: rank 1 skips head, which rank 0 runs" in line(records)


BACKWARD = {
    "ended": ([0, 3, 2, 1], [0, 1], True, "only on rank 0, not on rank 1, gradients reach tower"),
    "reversed": ([0, 1], [0, 3, 2, 1], True, "only on rank 1, not on rank 0, gradients reach tower"),
    "under way": ([0, 3], [0, 1], False, "only on rank 0, not on rank 1, gradients reach tower"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_ranks_that_differ_in_the_backward_pass_only(name):
    """All have run the same modules; the parameters that get a gradient on some ranks only are named."""
    first, second, ended, expected = BACKWARD[name]
    records = records_of((FULL, first, ended), (FULL, second, ended), before=(FULL, [0, 3, 2, 1]))
    assert f"ranks have different backward passes in step 2: {expected}" in line(records)


def test_an_evaluation_is_told_from_a_step():
    """A forward pass outside of a training step is a pass of its own, and does not count as a step."""
    records = {}
    for rank, order in enumerate(([0, 1], [0, 2])):
        written = flight_record.FlightRecord(NAMES, PARAMETERS, rank)
        written.begin([])
        written.begin([], is_step=False)
        for index in order:
            written.add(index)
        records[rank] = written.as_dict()
    assert "in an evaluation after step 1: rank 0 runs a.b" in line(records)


def test_the_pass_before_may_be_the_reason():
    """An evaluation in which all weights were there ended well on both ranks; they lose each other in the next one."""
    records = {}
    for rank, order in enumerate(([0, 1, 3], [0, 1, 4, 5, 3])):
        written = flight_record.FlightRecord(NAMES, PARAMETERS, rank)
        for modules in (order, []):
            written.begin([], is_step=False)
            for index in modules:
                written.add(index)
        records[rank] = written.as_dict()
    assert "rank 0 skips tower.layers, which rank 1 runs" in line(records)
    assert differences.difference(records, NAMES, PARAMETERS, is_lost=False) is None


def test_notes_outlive_their_rank(tmp_path):
    """What one process has noted is read from files by another, at any moment."""
    for rank, order in ((0, [0, 1, 0]), (1, [0, 0])):
        written = flight_record.FlightRecord(["x", "y"], ["p"], rank, str(tmp_path))
        written.begin(["labels"])
        written.add(1)
        written.add_gradient(0)
        written.begin(["labels"])
        for index in order:
            written.add(index)
    records, names, parameters = flight_record.read(str(tmp_path))
    assert names == ["x", "y"] and parameters == ["p"]
    assert records[1] == {
        "number": 2, "step": 2, "ended": False, "order": [0, 0], "last": [1], "gradients": [], "last_gradients": [0],
        "inputs": ["labels"], "failed": "",
    }  # fmt: skip
    assert "rank 1 skips y" in differences.difference(records, names, parameters)


def test_notes_on_a_full_disk(tmp_path):
    """All of a rank's file is there from the start, or writing to it would end the rank; the rest may be missing."""
    folder = tmp_path / "notes"
    folder.mkdir()
    written = flight_record.FlightRecord(["x"], [], 0, str(folder))
    assert (folder / "0.notes").stat().st_blocks * 512 >= flight_record._BYTES
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()  # so that no file can be written
    written.begin(["labels"])
    assert written.as_dict()["inputs"] == ["labels"]


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [([0, 1, 2], [(0, 1), (2,)]), ([1, 0, 2], [(0, 1), (2,)]), ([0, 2, 1], [(0, 2), (1,)]), ([3], [(3,)]), ([], [])],
)
def test_gradients_that_are_reduced_together(gradients, expected):
    """As many as fit, at least one; their order within a bucket is no difference between ranks."""
    assert passes.buckets(gradients, sizes=[4, 4, 4, 100], limit=8) == expected


def test_only_what_ranks_must_agree_on_is_in_the_checksum():
    """Gathered modules and gradients are; a module whose small parameters every rank keeps is noted, and is not."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.LayerNorm(2), torch.nn.ReLU())
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_numel = 0, parameter.numel()  # as DeepSpeed marks them
        parameter.ds_persist = parameter.dim() == 1
    subject = passes.noted(model, 100)
    assert list(subject.modules) == ["0", "1"] and subject.gathered == {0}
    totals = []
    for leaves_out in (None, 1, 0):
        written = flight_record.FlightRecord(list(subject.modules), list(subject.parameters), 0)
        hooks = passes.note(written, subject)
        written.begin([])
        parts = [module for index, module in enumerate(model) if index != leaves_out]
        with torch.no_grad():
            torch.nn.Sequential(*parts)(torch.ones(1, 2))
        totals.append(passes.Checksum(subject).of(written))
        for hook in hooks:
            hook.remove()
    assert totals[0] == totals[1] != totals[2]
    written = flight_record.FlightRecord(list(subject.modules), list(subject.parameters), 0)
    passes.note(written, subject)
    written.begin([])
    model(torch.ones(1, 2)).sum().backward()
    assert written.order == [0, 1] and sorted(written.gradients) == [0, 1, 2]
