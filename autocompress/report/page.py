"""One self-contained HTML page about a run: picture, table, and every fact that qualifies them."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from autocompress.core.errors import InputError
from autocompress.core.front import Front
from autocompress.core.record import to_json
from autocompress.core.trial import Trial
from autocompress.report import text
from autocompress.report.facts import Facts, facts_of, footer
from autocompress.report.plot import figure
from autocompress.report.table import HEADS, rows
from autocompress.run import Run

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top } .wide { overflow-x: auto } h2 { margin-top: 2.5rem } code { font-size: 90% }
"""


def write_report(run: Run, path: Path) -> None:
    """Write the page.

    Raises:
        InputError: nothing was scored yet, or the folder does not exist.
        TargetError: plotly is not installed.
    """
    trials = run.trials()
    front = run.front()
    if not front.points:
        raise InputError(f"{run.path} has no scored trial yet: there is nothing to report")
    if not path.parent.is_dir():
        raise InputError(f"the folder of {str(path)!r} does not exist")
    path.write_text(page(run, front, trials), encoding="utf-8")


def page(run: Run, front: Front, trials: Sequence[Trial]) -> str:
    """The page's HTML. What comes from a task or a run is escaped."""
    facts = facts_of(run, front, trials)
    title = f"{run.config.task_name} on {run.config.profile.name}"
    chart = figure(front, "Front with 95 % intervals").to_html(include_plotlyjs=True, full_html=False)
    sentences = "".join(f"<p>{escape(line)}</p>" for line in footer(facts, front, trials))
    front_table = f'<div class="wide">{_table(HEADS, rows(front))}</div>'
    sections = [
        f"<h1>{escape(title)}</h1>{sentences}{chart}{front_table}",
        f"<h2>The run</h2>{_pairs(_about(run, facts))}",
        f"<h2>The machine</h2>{_pairs(facts.fingerprint.facts if facts.fingerprint else {})}",
        f"<h2>Time by stage</h2>{_pairs({k: text.seconds(v) for k, v in facts.seconds.items()})}",
        *([f"<h2>Rungs</h2>{_table(('Rung', 'Trials', 'Time'), _rungs(facts))}"] if len(facts.rungs) > 1 else []),
        f"<h2>Failures by stage</h2>{_table(('Stage', 'Trials', 'First message'), _failures(facts))}",
        f"<h2>Left alone</h2>{_named(facts.left_alone)}",
        f"<h2>Choices that were dropped</h2>{_named(facts.dropped)}",
        f"<h2>Executed precision</h2>{_executed(facts, front)}",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _about(run: Run, facts: Facts) -> dict[str, str]:
    config = run.config
    limits = {k: v for k, v in to_json(config.limits).items() if v is not None}
    return {
        "Task": config.task_name + (f" ({config.task})" if config.task and config.task != config.task_name else ""),
        "Target": f"{config.profile.name}: {config.profile.description}",
        "Search space": f"{config.rules.name}: {config.rules.description}",
        "Objectives": ", ".join(config.objectives),
        "Limits": ", ".join(f"{k} = {v:g}" for k, v in limits.items()) or "none",
        "Fidelity": config.fidelity + (f", {config.recover_steps} steps" if config.recover_steps else ""),
        "Sampler": config.sampler,
        "Budget": _budget(config.trials, config.timeout_s),
        "Trials": str(facts.trials),
        "Seed": str(config.seed),
        "Started": config.created,
        "Versions": ", ".join(f"{k} {v}" for k, v in config.versions.items()),
    }


def _budget(trials: int | None, timeout_s: float | None) -> str:
    parts = [] if trials is None else [f"{trials} trials"]
    parts += [] if timeout_s is None else [text.seconds(timeout_s)]
    return ", ".join(parts) or "none"


def _rungs(facts: Facts) -> list[tuple[str, ...]]:
    return [(rung, str(count), text.seconds(seconds)) for rung, (count, seconds) in facts.rungs.items()]


def _failures(facts: Facts) -> list[tuple[str, ...]]:
    return [(stage, str(count), message) for stage, (count, message) in facts.failures.items()]


def _executed(facts: Facts, front: Front) -> str:
    unread = [t for t in front.points if t.score and t.score.executed is None]
    lines = []
    if unread:
        reason = unread[0].score.reasons.get("executed", "") if unread[0].score else ""
        lines.append(f"<p>Not read back for {len(unread)} points: {escape(reason)}</p>")
    if len(unread) < len(front.points) and not facts.executed:
        lines.append("<p>Every layer that was read back ran as it was chosen.</p>")
    found = [(str(n), layer, ran) for n, wrong in facts.executed.items() for layer, ran in wrong.items()]
    return "".join(lines) + (_table(("Trial", "Layer", "Ran as"), found) if found else "")


def _named(reasons: Mapping[str, str] | None) -> str:
    if reasons is None:
        return "<p>The run's log does not say.</p>"
    return _pairs(reasons) if reasons else "<p>None.</p>"


def _pairs(pairs: Mapping[str, str]) -> str:
    return _table((), list(pairs.items())) if pairs else "<p>None.</p>"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{lines}</tbody></table>"
