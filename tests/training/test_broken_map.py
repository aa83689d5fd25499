"""A second pass that finds the map in force unable to run gives it up, whatever another one gains."""

from dataclasses import replace

from balance_shim import state
from balance_shim.memory.colocation import NO_CONSTRAINTS
from balance_shim.placement import planner
from balance_shim.placement.move import Moved
from balance_shim.placement.plan import evaluate
from balance_shim.settings import Settings
from balance_shim.training import outside, replan
from tests.placement.test_verification import LossWhereLabelsAre, request_for


def plan_of(request, head):
    """Return a plan with the head on this device: at first_device or where this model's loss cannot be computed."""
    costed = replace(planner.cost(request), constraints=NO_CONSTRAINTS)
    places = {block.name: int(".layers." in block.name and int(block.name[-1]) > 2) for block in costed.blocks}
    return evaluate("balanced", costed, {**places, "lm_head": head}, request.devices)


def test_a_map_whose_trial_meets_two_devices_is_given_up_for_any_other(monkeypatch):
    """It moves to a map that runs, where the margin alone would have it stay; a map that runs stays."""
    moves = []
    monkeypatch.setattr(state, "settings", lambda: Settings(report="off"))
    # There are no real devices.
    monkeypatch.setattr(outside, "move_along", lambda _, __, device_map: moves.append(device_map) or Moved())
    monkeypatch.setattr(replan, "WORTH_MOVING", 0)  # no margin is enough
    request = request_for(LossWhereLabelsAre)
    runs = replan.plan_in_force(request, plan_of(request, head=0))
    assert not runs.broken and not replan.moved_if_better(None, runs).moved and not moves
    broken = replan.plan_in_force(request, plan_of(request, head=1))
    assert broken.broken
    outcome = replan.moved_if_better(None, broken)
    assert outcome.moved and not outcome.broken and len(moves) == 1
    assert outcome.plan.device_map["lm_head"] == 0 and outcome.plan.device_map == moves[0]


def test_a_map_that_parts_the_embedding_from_what_feeds_it_is_given_up():
    """Constraints of the request, such as that of a prompt encoder on the first device, count like a dry run."""
    request = request_for(LossWhereLabelsAre)
    plan = plan_of(request, head=0)
    away = replace(plan, device_map={**plan.device_map, "model.embed_tokens": 1, "model.rotary_emb": 1})
    fed = replace(request, constraints=NO_CONSTRAINTS.with_met(frozenset({"model.embed_tokens", None})))
    assert not replan.plan_in_force(request, away).broken
    assert replan.plan_in_force(fed, away).broken
    assert not replan.plan_in_force(fed, plan).broken
