"""Draft tokens of a draft head that runs on the last stage of a pipeline."""

from __future__ import annotations

from llmkit.runtime.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmkit.runtime.engine.sequence import Sequence


class PipelineDrafts:
    """Proposes the draft tokens that came with the results of a sequence's last step.

    The last stage computes them at the end of a step, and all stages get them with its results:
    the first stage needs them when it begins the next step.
    """

    def __init__(self) -> None:
        # By sequence: how many tokens it had, and the drafts after them.
        self._drafts: dict[Sequence, tuple[int, list[int]]] = {}

    def record(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Keep the draft tokens of a step. Call it when the scheduler has recorded the step."""
        for request, drafts in zip(step.requests, output.next_draft_token_ids or (), strict=True):
            sequence = request.sequence
            if not sequence.is_finished:
                self._drafts[sequence] = len(sequence.token_ids), drafts

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """See `DraftProposer.propose`."""
        num_tokens, drafts = self._drafts.get(sequence, (0, []))
        return drafts[:max_tokens] if num_tokens == len(sequence.token_ids) else []

    def forget(self, sequence: Sequence) -> None:
        """See `DraftProposer.forget`."""
        self._drafts.pop(sequence, None)
