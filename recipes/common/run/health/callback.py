"""Judge the health of a run while it trains."""

from collections.abc import Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from common.data.examples import Example
from common.errors import ON_FAULT
from common.run.folder import Run
from common.run.health.data import measure
from common.run.health.ending import show_findings
from common.run.health.files import NewLines, recall, write_findings
from common.run.health.general import general_loss
from common.run.health.seen import Finding
from common.run.screen import console
from common.run.stopping import Stop

GENERAL = ("sft", "dpo", "kto", "grpo", "ppo")  # a reward model writes no text


class HealthCallback(TrainerCallback):
    """Prints each finding about a run once, with its evidence and what to change, and writes it to health.jsonl.

    It reads what is logged and what is in samples.jsonl; only at the end it has the model score a few facts.
    CheckpointCallback comes after it and ends the run that --stop-on-fault stops.

    Args:
        run: its record gets `data`, the measures of the rows, and `steps`, how many it is to take.
        stop: stops the run at a finding, with `stop_on_fault`.
        rows: the examples of the data.
    """

    def __init__(self, run: Run, stop: Stop, stop_on_fault: bool, rows: Sequence[Example]) -> None:
        self.run = run
        self.stop = stop
        self.stop_on_fault = stop_on_fault
        self.rows = rows
        self.completions = NewLines(run.folder / "samples.jsonl")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        facts = {**self.run.record.get("data", {}), **measure(self.rows)}  # beside what the recipe recorded of its data
        self.run.update(data=facts, steps=state.max_steps)
        self.health = recall(self.run.folder, self.run.record, state.global_step)
        self.begin = self.health.seen.step
        self._report(self.health.judge(), self.health.findings)

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        for entry in self.completions.read():
            if entry["step"] >= self.begin:  # else it was recalled
                self.health.seen.add_completion(entry)
        self.health.seen.add({"step": state.global_step, **logs})
        if new := self.health.judge():
            self._report(new, new)

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs) -> None:
        """Measure what was forgotten, where there is an adapter to switch off, and one rank has all of the model."""
        ended = state.is_world_process_zero and state.global_step >= state.max_steps
        if (
            not ended
            or isinstance(model, FSDPModule)
            or self.run.record["recipe"] not in GENERAL
            or not hasattr(model, "disable_adapter")
        ):
            return
        try:
            self.run.update(general=general_loss(model, processing_class))
        except RuntimeError as error:  # such as a full memory: the weights are not saved yet
            console().print(f"Health: what was forgotten is not measured ({error})", markup=False, soft_wrap=True)

    def _report(self, new: list[Finding], faults: list[Finding]) -> None:
        """Print and write new findings; `faults` stop the run."""
        write_findings(self.run.folder, self.health.findings)
        show_findings(new)
        if faults and self.stop_on_fault:
            self.stop.request(f"{ON_FAULT} ({', '.join(finding.name for finding in faults)})")
