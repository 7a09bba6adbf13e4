"""The alert rules of a benchmark as a file for Prometheus and as a table."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from llmkit.bench.alert_rules import AlertRules


def rules_text(rules: AlertRules, job: str, source: str) -> bytes:
    """The file of rules, with a comment that says where they come from."""
    text = yaml.safe_dump(rules.document(job), sort_keys=False, width=1000, allow_unicode=True)
    return (
        f"# Alert rules for Prometheus (rule_files), made by llmkit bench alerts from"
        f" {Path(source).name}.\n{text}"
    ).encode()


def render_rules(rules: AlertRules) -> Group:
    """A row for each rule, with the repetitions that its bound was made from."""
    table = Table(
        title=f"alert rules of the load {escape(rules.load)}, over {rules.window_minutes} minutes",
        title_justify="left",
    )
    for column in ("alert", "metric", "bound", "repetitions"):
        table.add_column(column, justify="right" if column == "bound" else "left")
    for rule in rules.rules:
        values = ", ".join(f"{value:.4g}" for value in rule.rounds)
        table.add_row(rule.name, rule.metric, f"{rule.bound:g}", values)
    notes = [escape(f"No {name}: {reason}.") for name, reason in rules.missing.items()]
    return Group(table, *notes)
