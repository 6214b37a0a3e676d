"""The command line: thin commands over the public API.

Everything heavy is imported inside the commands, so that help and completion answer at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import click
import typer
import typer.core
from typer.core import TyperGroup

from cgfedllm.errors import CgFedLlmError, ConfigError, RunInterrupted

if TYPE_CHECKING:
    from rich.console import Console

    from cgfedllm.api import RunResult
    from cgfedllm.config import Config
    from cgfedllm.report.console import Mode

USAGE_ERROR = 2
INTERRUPTED = 130


class _Showable(Protocol):
    """What the commands that only look return."""

    def rows(self) -> list[tuple[str, str]]: ...
    def to_dict(self) -> dict[str, Any]: ...


# help is plain text; Typer would still load rich (0.3 s) to escape brackets that it then prints
typer.core.HAS_RICH = False


class _Commands(TyperGroup):
    """Prints the errors this package raises on purpose as messages; the others are bugs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # --debug belongs to the program, but people type it behind the command
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:
            args = ["--debug", *(a for a in args if a != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CgFedLlmError as error:
            if ctx.params.get("debug"):
                raise
            if isinstance(error, RunInterrupted):
                click.echo(str(error), err=True)
                ctx.exit(INTERRUPTED)
            click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)
            ctx.exit(USAGE_ERROR if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


app = typer.Typer(
    name="cgfedllm",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_codec(incomplete: str) -> list[str]:
    from cgfedllm.codecs import codec_names

    return [name for name in codec_names() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    from cgfedllm.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


# arguments are described in the commands' docstrings: click 8.5 loses Typer's help for them
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. federation.rounds=20; may be repeated. "
        "`cgfedllm config` lists all keys.",
        autocompletion=_complete_key,
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but the adapter's path at the end.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from cgfedllm import __version__

        typer.echo(f"cgfedllm {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="CGFEDLLM_DEBUG",
            help="Show the traceback of errors.",
        ),
    ] = False,
) -> None:
    """Fine-tune a causal language model across clients that keep their data.

    Only LoRA updates travel, coded into very few bytes; every byte is counted.
    Start with `cgfedllm run`: it needs no config, no network and no GPU.
    """
    if not debug and not sys.warnoptions:
        # libraries announcing their own future is nothing a user can act on
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)


@app.command("run")
def _run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; its folder is OUTPUT/NAME.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved config and the plan; load no weights, train not."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run of that name first.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run federated fine-tuning; the run folder ends with a PEFT adapter.

    CONFIG is a TOML file. Without one the embedded default runs: a small model and
    demo data that come with the installed packages.
    """
    config = _load(config_file, settings, name=name, output=output)
    if dry_run:
        _print_dry_run(config)
        return
    mode = _mode(quiet, as_json)

    from cgfedllm import api  # loads torch, which takes seconds

    _watch(lambda: api.run(config, overwrite=overwrite), config, mode)


@app.command("resume")
def _resume(run_dir: RunDir, quiet: Quiet = False, as_json: Json = False) -> None:
    """Go on with a run that was stopped or killed.

    RUN_DIR is its folder, OUTPUT/NAME. It ends with the same numbers as an unbroken run.
    """
    from cgfedllm.runs import RunFolder

    # before torch is loaded, so that a wrong folder is reported at once
    config = RunFolder(run_dir).config()
    mode = _mode(quiet, as_json)

    from cgfedllm import api

    _watch(lambda: api.resume(run_dir), config, mode)


@app.command("compare")
def _compare(
    config_file: ConfigFile = None,
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            help="Uplink codec to compare; repeat it. The first is the reference.",
            autocompletion=_complete_codec,
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(help="Seeds, e.g. 0,1,2; each codec runs once a seed."),
    ] = "0",
    references: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            help="Also train without a federation: centralised (pooled rows) or local-only.",
        ),
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the runs, a prefix.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    as_json: Json = False,
) -> None:
    """Run an experiment with several codecs: one table.

    CONFIG is a TOML file (without one, the embedded default); everything but the uplink
    codec and the seed stays the same.
    """
    if not codecs or len(set(codecs)) < 2:
        raise ConfigError("compare needs at least two codecs: --codec raw --codec int8")
    config = _load(config_file, settings, name=name, output=output)
    for codec in codecs:  # a misspelt one is found now, not after hours
        config.with_overrides({"uplink.name": codec, "uplink.options": {}})
    numbers = _parse_seeds(seeds)

    from cgfedllm import api, events
    from cgfedllm.report.comparison import comparison_table, entries_to_dicts
    from cgfedllm.report.console import watcher

    # the runs are told about on stderr: stdout is for the table (or the JSON)
    with watcher("auto", stdout=sys.stderr) as watch, events.listening(watch):
        result = api.compare(
            config, list(dict.fromkeys(codecs)), numbers, references=references or ()
        )
    if as_json:
        typer.echo(json.dumps(entries_to_dicts(result.entries), ensure_ascii=False))
    else:
        _console().print(comparison_table(result.entries))


@app.command("evaluate")
def _evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER")],
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", help="TOML file with model and data; needed for an adapter on its own."
        ),
    ] = None,
    settings: Settings = None,
    split: Annotated[
        str,
        typer.Option(help="heldout, validation or test.", metavar="SPLIT"),
    ] = "heldout",
    as_json: Json = False,
) -> None:
    """Measure an adapter's NLL on held-out rows.

    RUN_OR_ADAPTER is a run folder, or a PEFT adapter folder together with --config.
    """
    splits = ("heldout", "validation", "test")
    if split not in splits:
        raise ConfigError(f"--split is one of {', '.join(splits)}; got {split!r}")
    config = _load(config_file, settings) if config_file or settings else None

    from cgfedllm import api

    _show(api.evaluate(path, config=config, split=split), as_json)


@app.command("export")
def _export(
    run_dir: RunDir,
    to: Annotated[Path, typer.Option("--to", help="Folder to write; made if missing.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged in.")
    ] = False,
) -> None:
    """Write a run's adapter in PEFT format, or merged.

    RUN_DIR is the folder of a run.
    """
    from cgfedllm import api

    typer.echo(api.export(run_dir, to, merge=merge))


@app.command("inspect")
def _inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Tell what a file or folder is and holds.

    PATH is a run folder, a PEFT adapter folder, a packet or a checkpoint.
    """
    from cgfedllm.report.inspection import inspect

    _show(inspect(path), as_json)


@app.command("doctor")
def _doctor(as_json: Json = False) -> None:
    """Check this machine and what is installed on it."""
    from cgfedllm.doctor import examine

    findings = examine()
    _show(findings, as_json)
    # extras may be missing; what every run needs may not
    if any(f.status == "missing" and not f.name.startswith("extra") for f in findings):
        raise typer.Exit(1)


@app.command("plan")
def _plan(
    config_file: ConfigFile = None,
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or local folder; config.json is enough.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="Uplink codec.", autocompletion=_complete_codec)
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.", min=1)] = None,
    rounds: Annotated[int | None, typer.Option(help="Federated rounds.")] = None,
    up: Annotated[float, typer.Option(help="A client's uplink, Mbit/s.")] = 10.0,
    down: Annotated[float, typer.Option(help="A client's downlink, Mbit/s.")] = 50.0,
    as_json: Json = False,
) -> None:
    """Tell what a run will take, by arithmetic alone.

    Bytes, transfer time and memory, from the model's config; no weights are loaded.
    CONFIG is a TOML file (without one, the embedded default); options override it.
    """
    config = _load(config_file, settings)
    changes: dict[str, Any] = {"model.id": model, "lora.rank": rank, "federation.rounds": rounds}
    if codec is not None and codec != config.uplink.name:
        changes |= {"uplink.name": codec, "uplink.options": {}}
    config = _changed(config, changes)

    from cgfedllm.plan import Link, make_plan

    _show(make_plan(config, link=Link(up, down), clients=clients), as_json)


@app.command("codecs")
def _codecs(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=_complete_codec),
    ] = None,
) -> None:
    """List the codecs, or one's options.

    NAME is a codec.
    """
    from cgfedllm.report.listings import codec_details, codec_list

    _console().print(codec_details(name) if name else codec_list())


@app.command("config")
def _config(
    part: Annotated[
        str,
        typer.Argument(metavar="[PART]", show_default=False),
    ] = "",
) -> None:
    """List every key, its default and meaning.

    PART limits the list to keys that contain it, e.g. federation.
    """
    from cgfedllm.report.listings import key_list

    _console().print(key_list(part))


def _load(
    config_file: Path | None,
    settings: Iterable[str] | None,
    *,
    name: str | None = None,
    output: Path | None = None,
) -> Config:
    from cgfedllm.config import load_config

    config = load_config(config_file, settings or ())
    return _changed(config, {"name": name, "output": str(output) if output else None})


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """Apply the changes that are not None."""
    given = {key: value for key, value in changes.items() if value is not None}
    return config.with_overrides(given) if given else config


def _mode(quiet: bool, as_json: bool) -> Mode:
    if quiet and as_json:
        raise ConfigError("--quiet and --json exclude each other")
    return "quiet" if quiet else "json" if as_json else "auto"


def _watch(call: Callable[[], RunResult], config: Config, mode: Mode) -> None:
    from cgfedllm import events
    from cgfedllm.report.console import Outcome, watcher

    with watcher(mode) as watch, events.listening(watch):
        result = call()
    watch.finish(
        Outcome(
            records=result.records,
            adapter_dir=result.adapter_dir,
            run_dir=result.run_dir,
            interrupted=result.interrupted,
            uplink_codec=config.uplink.name,
            downlink_codec=config.downlink.name,
        )
    )
    if result.interrupted:
        click.echo(
            "interrupted; everything finished is saved. Go on with:\n"
            f"  cgfedllm resume {result.run_dir}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)


def _print_dry_run(config: Config) -> None:
    """Print TOML that can be saved and run; the plan is in its comments."""
    typer.echo(config.to_toml())
    from cgfedllm.plan import make_plan

    typer.echo("# Plan")
    for label, text in make_plan(config).rows():
        typer.echo(f"#   {label}: {text}")


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds wants whole numbers like 0,1,2; got {text!r}") from None
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds wants distinct numbers, none below 0; got {text!r}")
    return seeds


def _show(result: _Showable, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_dict(), ensure_ascii=False, default=str))
        return
    from cgfedllm.report.listings import two_columns, two_columns_plain

    console = _console()
    if console.is_terminal:
        console.print(two_columns(result.rows()))
    else:
        typer.echo(two_columns_plain(result.rows()))


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # a file or a pipe has no width; rich would take 80 and fold what a program wants to read
    return console if console.is_terminal else Console(highlight=False, width=120)


def main() -> None:
    """Entry point of the `cgfedllm` command."""
    app()


if __name__ == "__main__":
    main()
