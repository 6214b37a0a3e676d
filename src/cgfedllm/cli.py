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
    from cgfedllm.evaluating import EvaluationResult
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

bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure codecs without training."
)
app.add_typer(bench_app, name="bench")

reproduce_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Repeat a published comparison."
)
app.add_typer(reproduce_app, name="reproduce")


def _complete_codec(incomplete: str) -> list[str]:
    from cgfedllm.codecs import codec_names

    return [name for name in codec_names() if name.startswith(incomplete)]


def _complete_peer(incomplete: str) -> list[str]:
    from cgfedllm.analysis.peers import peer_names

    return [name for name in peer_names() if name.startswith(incomplete)]


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
CodecFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--codec-file",
        metavar="FILE",
        help="Pre-trained codec (`cgfedllm pretrain` writes them); may be repeated.",
    ),
]
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
    superlink: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run behind this SuperLink of Flower's (`flwr config list`), e.g. on the "
            "SuperNodes of several organisations; `local` is Flower's simulation on this machine.",
        ),
    ] = None,
    federation_config: Annotated[
        str,
        typer.Option(
            metavar="KEY=VALUE...",
            help="For a simulation, as `flwr run` takes it, e.g. "
            '"num-supernodes=100 client-resources-num-gpus=0.25".',
        ),
    ] = "",
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
    if superlink is not None:
        from cgfedllm.federation.submit import submit

        submit(config, superlink, overwrite=overwrite, federation_config=federation_config)
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


@app.command("record")
def _record(
    config_file: ConfigFile = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder of the recording; by default OUTPUT/NAME/recording."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="federated, centralised or local-only.", metavar="KIND")
    ] = "federated",
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; its folder is OUTPUT/NAME.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run and recording first.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the recording's path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run, and keep every client's update to fit codecs on.

    CONFIG is a TOML file with a lossless uplink (without one, the embedded default). The
    same command goes on with a recording that was stopped.
    """
    from cgfedllm.tgap.index import KINDS

    if kind not in KINDS:
        raise ConfigError(f"--kind is one of {', '.join(KINDS)}; got {kind!r}")
    mode = _mode(quiet, as_json)
    config = _load(config_file, settings, name=name, output=output)

    from cgfedllm import api, events
    from cgfedllm.report.console import watcher

    # the run is told about on stderr: stdout is for what was recorded
    told = watcher("quiet" if mode == "quiet" else "auto", stdout=sys.stderr)
    with told as watch, events.listening(watch):
        result = api.record(config, to, kind, overwrite)
    if quiet:
        typer.echo(result.path)
    else:
        _show(result, as_json)
    if result.run.interrupted:
        click.echo("interrupted; the same command goes on after the last round", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command("pretrain")
def _pretrain(
    codec: Annotated[
        str, typer.Argument(metavar="CODEC[:KEY=VALUE,...]", autocompletion=_complete_codec)
    ],
    config_file: ConfigFile = None,
    recordings: Annotated[
        list[Path] | None,
        typer.Option(
            "--recording", "-r", help="Fit on this recording; collect none. May be repeated."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Codec file to write; by default OUTPUT/NAME-tgap/codec.safetensors."
        ),
    ] = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the experiment; NAME-tgap is the folder's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start again: collect anew (if it collects), fit anew."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the codec file's path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fit a learned codec on recorded updates (TGAP); writes a codec file.

    CODEC is one that learns. CONFIG is a TOML file (without one, the embedded default); its
    table [tgap] says how. Without --recording, updates are collected first, on each client's
    share D1. The same command goes on with what was stopped.
    """
    mode = _mode(quiet, as_json)
    config = _load(config_file, settings, name=name, output=output)
    if recordings and config_file is None and name is None:
        from cgfedllm.tgap.recording import Recording

        config = _changed(config, {"name": Recording.open(recordings[0]).config.name})

    from cgfedllm.pretraining import learned_codec

    # before torch is loaded, so that a misspelt one is reported at once
    learned_codec(config, codec)

    from cgfedllm import api, events
    from cgfedllm.report.pretrain_progress import PretrainProgress

    with (
        PretrainProgress("quiet" if mode == "quiet" else "auto") as progress,
        events.listening(progress),
    ):
        result = api.pretrain(
            config, codec, recordings=recordings or (), to=to, overwrite=overwrite
        )
    if quiet:
        typer.echo(result.path)
    else:
        _show(result, as_json)


@app.command("compare")
def _compare(
    config_file: ConfigFile = None,
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="NAME[:KEY=VALUE,...]",
            help="Uplink codec and its options, e.g. int8; repeat it. The first is the reference.",
            autocompletion=_complete_codec,
        ),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="LABEL:KEY=VALUE,...",
            help="Other settings under a label, e.g. rank2:lora.rank=2,uplink.name=int8.",
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
    tune: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            metavar="KEY=VALUE,...",
            help="Try these values first, the same for every codec, e.g. server_lr=0.7,1,1.4 or "
            "decay=1,0.9; repeat it for a grid. Judged on the clients' validation rows.",
        ),
    ] = None,
    tune_rounds: Annotated[
        int | None, typer.Option(help="Rounds of a trial; by default those of the run.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Results file; by default OUTPUT/NAME-compare.json.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only draw the figure of this results file again."),
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the runs, a prefix.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    as_json: Json = False,
) -> None:
    """Run an experiment with several codecs: NLL against bytes.

    CONFIG is a TOML file (without one, the embedded default); everything but what is
    compared and the seed stays the same. Ends with a table, a results file and a figure;
    the same command goes on with a comparison that was stopped.
    """
    if plot is not None:
        if codecs or variants:
            raise ConfigError("--plot draws what a results file holds; leave --codec out")
        from cgfedllm.api import plot_comparison

        for path in plot_comparison(plot):
            typer.echo(path)
        return
    candidates = list(dict.fromkeys(codecs or ()))
    if len(candidates) + len(variants or ()) < 2:
        raise ConfigError("compare needs at least two codecs: --codec raw --codec int8")
    config = _load(config_file, settings, name=name, output=output)
    numbers = _parse_seeds(seeds)

    from cgfedllm.analysis.candidates import candidates_of
    from cgfedllm.analysis.tuning import parse_tuning

    # before torch is loaded, so that a misspelt one is reported at once
    candidates_of(config, candidates, variants or (), references or ())
    parse_tuning(tune or (), tune_rounds, config, numbers)

    from cgfedllm import api, events
    from cgfedllm.report.comparison import comparison_table, entries_to_dicts
    from cgfedllm.report.console import watcher

    # the runs are told about on stderr: stdout is for the table (or the JSON)
    with watcher("auto", stdout=sys.stderr) as watch, events.listening(watch):
        result = api.compare(
            config,
            candidates,
            numbers,
            variants=variants or (),
            references=references or (),
            tune=tune or (),
            tune_rounds=tune_rounds,
            results=results,
        )
    figures = api.plot_comparison(result.results)
    if as_json:
        typer.echo(json.dumps(entries_to_dicts(result.entries), ensure_ascii=False))
    else:
        _console().print(comparison_table(result.entries))
        typer.echo(f"\nResults  {result.results}\nFigure   {figures[0]}")
    if result.failures:
        for cell, reason in result.failures.items():
            click.echo(f"{click.style('failed:', fg='red')} {cell}: {reason}", err=True)
        raise typer.Exit(1)


@reproduce_app.command("paper")
def _reproduce_paper(
    scale: Annotated[
        str, typer.Option(help="small (two cores, the embedded model) or paper (7B, a GPU).")
    ] = "small",
    experiment: Annotated[
        str | None,
        typer.Option(help="Of the paper's scale: llama-dolly, llama-ceval or qwen-mmlu."),
    ] = None,
    hub: Annotated[
        Path | None,
        typer.Option(help="Folder with the benchmarks' data sets under their hub ids."),
    ] = None,
    benchmarks: Annotated[
        bool, typer.Option(help="Ask the questions of C-Eval and MMLU too.")
    ] = True,
    shots: Annotated[int, typer.Option(help="Worked examples in each prompt, 0 to 5.")] = 0,
    per_subject: Annotated[
        int | None,
        typer.Option(help="Questions asked of a subject; by default what fits the scale."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder for the table; OUTPUT/NAME-paper if not set."),
    ] = None,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option(help="Name of the runs, a prefix.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder that holds the run folders.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print config and plan of a CG-FedLLM row; train nothing."),
    ] = False,
    as_json: Json = False,
) -> None:
    """CG-FedLLM's comparison: base, centralised, FedAvg, auto-encoders.

    Collects updates on D1, pre-trains six codecs, trains every row on D2 and asks all
    adapters the same questions. The same command goes on with what was stopped.
    """
    from cgfedllm.reproduce.scales import experiment_config, find_scale

    config = _changed(
        experiment_config(find_scale(scale), experiment, settings or ()),
        {"name": name, "output": str(output) if output else None},
    )
    if dry_run:
        _print_dry_run(config.with_overrides({"data.part": "d2", "uplink.name": "cg_resnet"}))
        return

    from cgfedllm import api, events
    from cgfedllm.report.console import watcher

    with watcher("auto", stdout=sys.stderr) as watch, events.listening(watch):
        result = api.reproduce_paper(
            scale,
            experiment,
            config=config,
            to=to,
            benchmarks=("ceval", "mmlu") if benchmarks else (),
            hub=hub,
            shots=shots,
            per_subject=per_subject,
        )
    _show(result, as_json)


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
    base: Annotated[
        bool, typer.Option(help="Also evaluate the base model without the adapter.")
    ] = True,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("--benchmark", metavar="NAME", help="ceval, mmlu or gsm8k; may be repeated."),
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, help="Worked examples in each prompt of a benchmark.")
    ] = 0,
    per_subject: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ask a fixed random sample of so many questions a subject, not all."
        ),
    ] = None,
    hub: Annotated[
        Path | None,
        typer.Option(
            help="Folder that holds the benchmarks' data sets under their hub ids, e.g. "
            "HUB/cais/mmlu; by default they come from the hub."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--sample", min=0, help="Prompts of the split to answer in words.")
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of an answer in words.")
    ] = 256,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Folder for results; by default RUN/evaluation for more than losses."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure an adapter: NLL on held-out rows, benchmarks, answers.

    RUN_OR_ADAPTER is a run folder, or a PEFT adapter folder together with --config. The same
    command goes on with benchmarks that were stopped.
    """
    splits = ("heldout", "validation", "test")
    if split not in splits:
        raise ConfigError(f"--split is one of {', '.join(splits)}; got {split!r}")
    for name in benchmarks or ():
        from cgfedllm.evaluation.catalogue import find_benchmark

        find_benchmark(name)
    config = _load(config_file, settings) if config_file or settings else None

    from cgfedllm import api, events
    from cgfedllm.report.bench_progress import BenchProgress

    with BenchProgress() as bar, events.listening(bar.hear):
        result = api.evaluate(
            path,
            config=config,
            split=split,
            base=base,
            benchmarks=benchmarks or (),
            shots=shots,
            per_subject=per_subject,
            hub=hub,
            samples=samples,
            max_new_tokens=max_new_tokens,
            to=to,
        )
    _show(result, as_json)
    if not as_json:
        _print_benchmarks(result)


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


@app.command("report")
def _report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="HTML file; by default RUN/report.html, for several comparison.html."
        ),
    ] = None,
) -> None:
    """Write the HTML report of a run, or one that compares several.

    RUN is the folder of a run, finished or not. Every run writes its own report at its end;
    this writes it anew. The file needs nothing else and no network.
    """
    from cgfedllm import api

    typer.echo(api.report(runs, to))


@app.command("inspect")
def _inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Tell what a file or folder is and holds.

    PATH is a run folder, a recording, a PEFT adapter folder, a packet, a codec file or a
    checkpoint.
    """
    from cgfedllm.report.inspection import inspect

    _show(inspect(path), as_json)


@app.command("analyze")
def _analyze(
    recordings: Annotated[
        list[Path] | None,
        typer.Option("--recording", "-r", help="Folder of a recording; may be repeated."),
    ] = None,
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="NAME[:key=value,...]",
            help="Codec, with options; may be repeated. Without one, and without a codec file, "
            "all that lose something and need no training.",
            autocompletion=_complete_codec,
        ),
    ] = None,
    codec_files: CodecFiles = None,
    to: Annotated[Path, typer.Option("--to", help="Folder for tables and figures.")] = Path(
        "analysis"
    ),
    updates: Annotated[int, typer.Option(min=1, help="Most updates taken of each recording.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed that both ends share, and of the noise.")
    ] = 0,
    parts: Annotated[
        str,
        typer.Option(
            metavar="PART,...",
            help="fidelity, rate, swap, noise, distributions; all by default.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Analyse what codecs keep of recorded updates.

    SNR and cosine over rounds and modules, rate, swap test, robustness to noise, and how updates
    are distributed: tables (CSV) and figures.
    """
    if not recordings:
        raise ConfigError(
            "analyze needs a recording: --recording FOLDER (`cgfedllm record` makes one)"
        )

    from cgfedllm import api
    from cgfedllm.report.analysis import studies_to_dict, study_tables
    from cgfedllm.report.bench_progress import BenchProgress

    with BenchProgress() as bar:
        found = api.analyze(
            list(recordings),
            to,
            codecs=codecs or (),
            codec_files=codec_files or (),
            parts=[part.strip() for part in parts.split(",") if part.strip()],
            updates=updates,
            seed=seed,
            progress=bar.update,
        )
    if as_json:
        typer.echo(json.dumps(studies_to_dict(found.studies)))
        return
    console = _console()
    for study in found.studies:
        console.print(study_tables(study), "")
    typer.echo(f"Tables and figures  {to}")


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
    server: Annotated[
        float | None,
        typer.Option(
            metavar="MBIT",
            help="The server's line, Mbit/s each way: also rehearse a round of it here, and tell "
            "what of it ends first.",
        ),
    ] = None,
    training: Annotated[
        float, typer.Option(help="With --server: what a client trains in a round, seconds.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Tell what a run will take, by arithmetic alone (but for --server).

    Bytes, transfer time and memory, from the model's config; no weights are loaded.
    CONFIG is a TOML file (without one, the embedded default); options override it.
    """
    config = _load(config_file, settings)
    changes: dict[str, Any] = {"model.id": model, "lora.rank": rank, "federation.rounds": rounds}
    if codec is not None and codec != config.uplink.name:
        from cgfedllm.config import other_uplink

        changes |= other_uplink(codec)
    config = _changed(config, changes)

    from cgfedllm.plan import Link, make_plan

    plan = make_plan(
        config,
        link=Link(up, down),
        clients=clients,
        server_mbit=server,
        training_seconds=training,
    )
    _show(plan, as_json)


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


@bench_app.command("codecs")
def _bench_codecs(
    recordings: Annotated[
        list[Path] | None,
        typer.Option("--recording", "-r", help="Folder of a recording; may be repeated."),
    ] = None,
    codecs: Annotated[
        list[str] | None,
        typer.Option(
            "--codec",
            metavar="NAME[:key=value,...]",
            help="Codec, with options; may be repeated. All that need no training by default.",
            autocompletion=_complete_codec,
        ),
    ] = None,
    codec_files: CodecFiles = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="NAME",
            help="Also another project's compressor, where installed: nncodec, zfp, sz3; may be "
            "repeated.",
            autocompletion=_complete_peer,
        ),
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            metavar="BITS",
            help="Bits per parameter for codecs that have a rate (option bpp); may be repeated. "
            "0.02, 0.05, 0.1, 0.2, 0.5, 1, 2 and 4 by default.",
        ),
    ] = None,
    updates: Annotated[
        int, typer.Option(min=1, help="Most updates measured of each recording.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed that both ends share.")] = 0,
    structure: Annotated[
        bool, typer.Option("--structure", help="Also tell what the updates look like.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also measure the memory one update takes.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="Folder for tables and figures; by default benchmarks/results/open_loop in a "
            "checkout, open_loop elsewhere.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Only draw the figures again, from the tables in this folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Code recorded updates with every codec at every rate: one table.

    Open loop: each update on its own, against its own values, from real packets. Figures and
    tables go to files as well.
    """
    if plot is not None:
        from cgfedllm import api

        for path in api.plot_bench(plot):
            typer.echo(path)
        return
    if not recordings:
        raise ConfigError(
            "bench codecs needs a recording: --recording FOLDER (`cgfedllm record` makes one)"
        )
    in_checkout = Path("benchmarks/results").is_dir()
    target = to or Path("benchmarks/results/open_loop" if in_checkout else "open_loop")

    from cgfedllm import api
    from cgfedllm.report.bench_progress import BenchProgress
    from cgfedllm.report.open_loop import open_loop_table, results_to_dict, structure_table

    with BenchProgress() as bar:
        found = api.bench_codecs(
            list(recordings),
            target,
            codecs=codecs or (),
            codec_files=codec_files or (),
            peers=peers or (),
            rates=rates or (),
            updates=updates,
            seed=seed,
            structure=structure,
            memory=memory,
            progress=bar.update,
        )
    if as_json:
        typer.echo(json.dumps(results_to_dict(found.results, found.structures)))
        return
    console = _console()
    for result in found.results:
        console.print(open_loop_table(result), "")
    if found.structures:
        console.print(structure_table(found.structures), "")
    typer.echo(f"Tables and figures  {target}")


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
    from cgfedllm.report.console import watch_run

    result = watch_run(call, config, mode)
    if result.interrupted:
        click.echo(
            "interrupted; everything finished is saved. Go on with:\n"
            f"  cgfedllm resume {result.run_dir}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)


def _print_benchmarks(result: EvaluationResult) -> None:
    """Print a table a benchmark, and where the files are."""
    from cgfedllm.report.evaluation import benchmark_table

    for name in dict.fromkeys(each.benchmark.name for each in result.benchmarks):
        own = [each for each in result.benchmarks if each.benchmark.name == name]
        _console().print("", benchmark_table(own))
    if result.files:
        typer.echo("\nResults  " + "\n         ".join(map(str, result.files)))


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
