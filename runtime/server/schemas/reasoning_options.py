"""What a request wants of the model's thinking, and how its chat template and the engine do it.

The APIs have many fields for it. Requests bring them into one form, `ThinkingWishes`;
`plan_thinking` turns that into variables that the chat template has, and a budget of tokens that
the engine keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit.common.chat_template import template_facts
from llmkit.runtime.server.schemas.base_request import NO_LIMIT, Effort, ThinkingWishes, Wish

EFFORTS: tuple[Effort, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Variables with which chat templates switch thinking on and off.
SWITCHES = frozenset({"enable_thinking", "thinking"})
EFFORT_VARIABLE = "reasoning_effort"
BUDGET_VARIABLE = "thinking_budget"
# The budgets of efforts, in tokens, where the template has no variable for efforts. Other efforts
# have none.
EFFORT_BUDGETS: dict[Effort, int] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 8192,
    "high": 24576,
}
# What a template with a variable for efforts knows if it names fewer than two of them.
_USUAL_EFFORTS = frozenset({"low", "medium", "high"})


@dataclass
class ThinkingPlan:
    """How the wishes are met."""

    variables: dict[str, bool | int | str] = field(default_factory=dict)  # of the chat template
    max_tokens: int | None = None  # of thoughts; None: no limit
    met: set[Wish] = field(default_factory=set)  # the wishes that have an effect
    unlimitable: bool = False  # the model thinks, but a budget cannot be kept


def contradiction(wishes: ThinkingWishes) -> str | None:
    """Say why the wishes contradict each other; None: they do not."""
    enabled, effort, _ = wishes
    if enabled is None or effort is None or enabled == (effort != "none"):
        return None
    state = "on" if enabled else "off"
    return f"Thinking is switched {state}, and the effort is {effort}: leave one of them out."


def plan_thinking(wishes: ThinkingWishes, template: str, can_close: bool) -> ThinkingPlan:
    """Return how a chat template and the engine meet `wishes`, which do not contradict each other.

    can_close: whether the engine can end a thought.
    """
    names, texts = template_facts(template)
    switches = SWITCHES & names
    plan = ThinkingPlan()
    enabled = wishes.enabled
    if wishes.effort is not None:
        enabled = wishes.effort != "none"
    closes_at_once = enabled is False and not switches
    if enabled is not None and (switches or can_close):
        plan.met |= {"enabled", "effort"}
        plan.variables |= dict.fromkeys(switches, enabled)
    if EFFORT_VARIABLE in names and (wishes.effort is not None or closes_at_once):
        effort = wishes.effort or "none"
        known = texts & frozenset(EFFORTS)
        if effort != "none" or "none" in known:
            plan.variables[EFFORT_VARIABLE] = _nearest(effort, known)
            plan.met |= {"enabled", "effort"}
            closes_at_once = False
    elif wishes.effort is not None and can_close and enabled:
        plan.max_tokens = EFFORT_BUDGETS.get(wishes.effort)
    if closes_at_once and can_close:
        plan.max_tokens = 0
    elif wishes.budget is not None:
        _plan_budget(plan, wishes.budget, BUDGET_VARIABLE in names, can_close)
    plan.unlimitable = wishes.budget not in (None, NO_LIMIT) and "budget" not in plan.met
    if enabled is False:
        plan.unlimitable = False
    return plan


def _plan_budget(plan: ThinkingPlan, budget: int, has_variable: bool, can_close: bool) -> None:
    """Add a budget that the request gives; it replaces the one of the effort."""
    if has_variable:
        plan.variables[BUDGET_VARIABLE] = budget
        plan.met.add("budget")
    if can_close:
        plan.max_tokens = None if budget == NO_LIMIT else budget
        plan.met.add("budget")


def _nearest(effort: Effort, known: frozenset[str]) -> str:
    """The known effort that is nearest to `effort`; the higher one of two."""
    choices = known if len(known) > 1 else known | _USUAL_EFFORTS
    if effort != "none":
        choices -= {"none"}  # thinking is wanted
    wanted = EFFORTS.index(effort)
    places = [EFFORTS.index(name) for name in EFFORTS if name in choices]
    return EFFORTS[min(places, key=lambda place: (abs(place - wanted), -place))]
