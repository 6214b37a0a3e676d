"""What the report of one run says, section by section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import tomli_w

from cgfedllm.report.html import details, figures, kept, tables
from cgfedllm.report.html.charts import Chart, stacked
from cgfedllm.report.html.heat import heat_map
from cgfedllm.report.html.reading import RunFacts
from cgfedllm.report.html.tables import Table
from cgfedllm.report.summary import Traffic
from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds

_WORTH_SAYING = 1.05


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    label: str
    value: str
    note: str


def run_page(run: RunFacts) -> dict[str, Any]:
    """Values for the template ``run.html``."""
    return {
        "title": run.name,
        "state": run.state,
        "lede": lede(run),
        "tiles": tiles(run),
        "problems": run.problems,
        "setup": details.setup(run.config) if run.config else [],
        "learning": _present(figures.nll_chart(run), figures.loss_chart(run)),
        "traffic": tables.traffic_table(run) if run.records and not run.is_reference else None,
        "traffic_charts": figures.traffic_charts(run),
        "traffic_notes": _traffic_notes(run),
        "kept": kept.kept_table(run),
        "kept_heat": kept.kept_heat(run),
        "kept_charts": _present(figures.kept_chart({"SNR": run})),
        "clients": tables.client_table(run) if run.clients else None,
        "client_notes": _client_notes(run),
        "weights": tables.module_table(run.weights) if run.weights else None,
        "heat": heat_map(run.weights),
        "norms": _present(figures.norm_chart(run)),
        "card": tables.card_table(run.card) if run.card else None,
        "time": _time(run),
        "seconds": _present(figures.seconds_chart(run)),
        "faults": _faults(run),
        "fault_notes": _fault_notes(run),
        "privacy": _privacy(run),
        "epsilon": _present(figures.epsilon_chart(run)),
        "rounds": tables.rounds_table(run) if run.records else None,
        "changed": details.changed(run),
        "config": tomli_w.dumps(run.tree),
        "environment": details.environment(run),
    }


def lede(run: RunFacts) -> str:
    """Say what happened, in two or three sentences."""
    done, summary = _trained(run), run.summary
    if run.state == "running":
        parts = [f"Still running: {_of(run)} done."]
    elif run.state == "unfinished":
        parts = [f"Stopped before its end: {_of(run)} done."]
    elif run.state == "unclear":
        parts = [f"{_of(run)} done; how many there were to be, only its configuration tells."]
    elif run.is_reference:
        parts = [f"{count_of(done, 'round')} of training without a federation: nothing travelled."]
    else:
        who = count_of(_senders(run), "client")
        parts = [f"{who} trained one adapter in {count_of(done, 'round')}."]
    if summary.heldout and _evaluations(run) > 1:
        parts.append(f"Held-out NLL {_moved(summary.heldout.difference)}.")
    if _saves(summary.uplink):
        ratio = human_ratio(summary.uplink.times_fewer).removesuffix("x")
        parts.append(f"The uplink carried {ratio} times fewer bytes than bare float32.")
    return " ".join(parts)


def tiles(run: RunFacts) -> list[Tile]:
    """The headline's numbers; what is not known is left out."""
    summary, shown = run.summary, []
    if summary.heldout:
        change = summary.heldout
        note = f"{tables.signed(change.difference)} from {change.before:.4f}, {figures.NLL}"
        if _evaluations(run) < 2:
            note = f"evaluated once, {figures.NLL}"
        shown.append(Tile("Held-out NLL", tables.fixed(change.after), note))
    if summary.uplink.sent:
        sent, fp32 = human_bytes(summary.uplink.sent), human_bytes(summary.uplink.fp32)
        if _saves(summary.uplink):
            fewer = human_ratio(summary.uplink.times_fewer).removesuffix("x")
            value, note = f"{fewer}× fewer", f"{sent} instead of {fp32}"
        else:
            value, note = sent, f"bare float32 weighs {fp32}"
        if summary.tgap_uplink_bytes:
            note += f"; pre-training apart, {human_bytes(summary.tgap_uplink_bytes)}"
        shown.append(Tile("Uplink", value, note))
        shown.append(
            Tile("Bits per parameter", tables.bits(summary.uplink), "uplink, headers included")
        )
    if summary.seconds["total"]:
        note = f"{_of(run)}, {count_of(_senders(run), 'client')}"
        note = _of(run) if run.is_reference else note
        shown.append(Tile("Time", human_seconds(summary.seconds["total"]), note))
    return shown


def _moved(change: float) -> str:
    if not math.isfinite(change):
        return "is no finite number any more"
    if not change:
        return "did not change"
    return f"{'fell' if change < 0 else 'rose'} by {abs(change):.4f} {figures.NLL}"


def _trained(run: RunFacts) -> int:
    """Rounds done, the flush left out."""
    return max((r.round for r in run.records if not r.flush), default=0)


def _senders(run: RunFacts) -> int:
    """Clients that sent anything usable."""
    return len({client.client for r in run.records for client in r.clients})


def _evaluations(run: RunFacts) -> int:
    return sum(r.heldout_nll is not None for r in run.records)


def _saves(traffic: Traffic) -> bool:
    """Whether it is worth saying how many times fewer bytes there were."""
    return traffic.times_fewer is not None and traffic.times_fewer >= _WORTH_SAYING


def _of(run: RunFacts) -> str:
    done = run.summary.rounds
    if run.rounds is None or done == run.rounds:
        return count_of(done, "round")
    return f"{done:,} of {count_of(run.rounds, 'round')}"


def _traffic_notes(run: RunFacts) -> list[str]:
    summary, notes = run.summary, []
    if summary.codec_bytes or summary.tgap_uplink_bytes or summary.tgap_downlink_bytes:
        notes.append(
            "What a learned codec costs beside its packets (its state, its pre-training) stands "
            "on lines of its own and is in neither uplink nor downlink."
        )
    flushed = [r for r in run.records if r.flush]
    if flushed:
        sent = human_bytes(flushed[-1].uplink_bytes)
        notes.append(
            f"Round {flushed[-1].round} is the flush: nobody trained, clients sent what error "
            f"feedback still held ({sent}; it is in the uplink above)."
        )
    return notes


def _client_notes(run: RunFacts) -> list[str]:
    notes = []
    if not run.is_reference:
        notes.append("Weight: share in the average when everybody takes part.")
    if run.summary.clients:
        notes.append("NLL: on the client’s own validation rows.")
    return notes


def _time(run: RunFacts) -> dict[str, Any] | None:
    parts = tables.time_parts(run.summary.seconds)
    whole = sum(spent for _, spent in parts)
    if not whole or not math.isfinite(whole):
        return None
    return {
        "bar": stacked(parts, whole, human_seconds),
        "legend": [name for name, _ in parts],
        "table": tables.time_table(run.summary.seconds),
        "total": human_seconds(run.summary.seconds["total"]),
    }


def _faults(run: RunFacts) -> Table | None:
    table = tables.fault_table(run.records)
    return table if table.rows else None


def _fault_notes(run: RunFacts) -> list[str]:
    notes = [
        f"Round {r.round} was tried {count_of(r.attempts, 'time')}: too few replies were usable."
        for r in run.records
        if r.attempts > 1
    ]
    return notes + [
        f"The run was stopped and went on after round {again.after_round}"
        + (f" ({again.started_at})." if again.started_at else ".")
        for again in run.environment.resumed
    ]


def _privacy(run: RunFacts) -> Table | None:
    config = run.config
    if config is None or config.privacy.mechanism == "none":
        return None
    privacy = config.privacy
    spent = [r.epsilon for r in run.records if r.epsilon is not None]
    facts = [
        ("mechanism", f"{privacy.mechanism} differential privacy"),
        ("epsilon spent", tables.fixed(spent[-1], ".3f") if spent else tables.NOTHING),
        ("epsilon, budget of the run", f"{privacy.epsilon:g}"),
        ("delta", f"{privacy.delta:g}" if privacy.delta is not None else "1 / clients^1.1"),
        ("clipping norm", f"{privacy.clip:g}"),
        ("accountant", privacy.accountant),
    ]
    if privacy.repeatable:
        facts.append(("noise", "drawn from the run’s seed: it hides nothing from who knows that"))
    return tables.facts_table("Privacy of a client’s part in the run", facts)


def _present(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
