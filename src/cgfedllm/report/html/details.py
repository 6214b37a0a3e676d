"""How a run was set up: its settings, and where and with what it ran."""

from __future__ import annotations

from cgfedllm.analysis.portable import portable_command, portable_tree
from cgfedllm.config import Config
from cgfedllm.report.html import tables
from cgfedllm.report.html.reading import Machine, RunFacts
from cgfedllm.report.html.tables import Table
from cgfedllm.report.model_card import options_text
from cgfedllm.report.rows import flatten
from cgfedllm.report.units import human_bytes


def setup(config: Config) -> list[tuple[str, str]]:
    """What was run, in words."""
    tree, federation, training = portable_tree(config), config.federation, config.training
    steps = (
        f"{training.local_steps} steps"
        if training.local_steps is not None
        else f"{training.local_epochs or 0:g} epochs"
    )
    uplink = f"{config.uplink.name} ({options_text(config.uplink.options)})"
    uplink = uplink.replace(" (none)", "")
    if config.keeps_residual:
        uplink += ", error feedback"
    return [
        ("Model", tree["model"]["id"]),
        ("Adapter", f"LoRA rank {config.lora.rank} on {', '.join(config.lora.target_modules)}"),
        ("Data", f"{tree['data']['source']}, {config.data.partition.kind} partition"),
        (
            "Local training",
            f"{steps} of {training.optimizer}, rate {training.lr:g}, batch {training.batch_size}",
        ),
        (
            "Aggregation",
            f"{federation.strategy.name}, {100 * federation.fraction_train:g} % of clients a round",
        ),
        ("Uplink codec", uplink),
        ("Downlink codec", config.downlink.name),
        ("Seed", str(config.seed)),
    ]


def changed(run: RunFacts) -> Table | None:
    """Settings that are not what they are by default."""
    if run.config is None:
        return None
    defaults, own = flatten(portable_tree(Config())), flatten(portable_tree(run.config))
    rows = [
        (key, tables.value_text(own.get(key)))
        for key in {**own, **defaults}
        if own.get(key) != defaults.get(key) and key not in ("name", "output")
    ]
    return tables.facts_table("Settings that differ from the defaults", rows) if rows else None


def environment(run: RunFacts) -> Table | None:
    """Versions, hardware, seed, commands."""
    found = run.environment
    facts = _machine(found)
    if found.seed is not None:
        facts.insert(0, ("seed", str(found.seed)))
    for again in found.resumed:
        known = {text for _, text in facts}
        label = f"resumed after round {again.after_round}"
        differs = [f"{key} {text}" for key, text in _machine(again) if text not in known]
        facts.append((label, "; ".join(differs) or "with the same versions and hardware"))
    return tables.facts_table("Where and with what it ran", facts) if facts else None


def _machine(machine: Machine) -> list[tuple[str, str]]:
    cpus = [f"{machine.cpus}"] if machine.cpus else []
    if machine.usable_cpus and machine.usable_cpus != machine.cpus:
        cpus.append(f"{machine.usable_cpus} usable")
    facts = [
        ("started", machine.started_at),
        ("command", portable_command(machine.command) if machine.command else None),
        *((f"{package} version", version) for package, version in machine.versions.items()),
        ("platform", machine.platform),
        ("processor", machine.processor),
        ("CPUs", ", ".join(cpus)),
        ("memory", human_bytes(machine.memory_bytes) if machine.memory_bytes else None),
        ("torch threads", str(machine.threads) if machine.threads else None),
        ("GPU", machine.gpu),
    ]
    return [(label, text) for label, text in facts if text]
