"""The command line: typer commands over the recipes of redi/config/.

    redi run recipes/demo.yaml              everything: data, SFT, arms, evaluation, table, curves
    redi study recipes/study.yaml           arms x learning rates x seeds, compared
    redi data build --path raw.jsonl --output_dir data
    redi plan recipe.yaml --gpus 8 --gpu-memory 80
    redi train --config recipe.yaml --learning_rate 2e-6
    redi eval --model runs/sft --dataset_name test.jsonl --output_dir runs/sft/eval
    redi compare runs/sft/eval runs/redi/eval

Any field of a recipe can be given as `--field value`; inside a section, as `--section.field value`.
"""

import errno
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from redi import preflight
from redi.config import DataConfig, EvalConfig, RunConfig, StudyConfig, TrainConfig
from redi.errors import RediError
from redi.recipe import load_config, make_config, read_value, set_field

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement distillation: learn from a teacher's right and wrong traces.",
)
data_app = typer.Typer(help="Raw traces to training files.")
app.add_typer(data_app, name="data")
FIELDS = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[Path | None, typer.Option("--config", help="recipe (YAML)")]


def _folder(text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise RediError("--output_dir: needs a folder")
    return Path(text)


OutputDir = Annotated[Path, typer.Option("--output_dir", "--output-dir", parser=_folder)]


@app.command(context_settings=FIELDS)
def run(context: typer.Context, recipe: Path) -> None:
    """The whole job of a recipe; what is done already is skipped."""
    config = load_config(RunConfig, recipe, _overrides(RunConfig, context.args))
    from redi.run import run as run_job

    run_job(config)


@app.command(context_settings=FIELDS)
def study(
    context: typer.Context,
    recipe: Path,
    report: Annotated[bool, typer.Option("--report", help="of the results so far only")] = False,
) -> None:
    """Tasks x arms x learning rates x seeds, to one JSON; what is in it is not done again."""
    config = load_config(StudyConfig, recipe, _overrides(StudyConfig, context.args))
    from redi.study.sweep import study as run_study

    run_study(config, report_only=report)


@app.command(context_settings=FIELDS)
def train(
    context: typer.Context,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and show the plan (redi plan) only")
    ] = False,
) -> None:
    """One training stage, SFT or REDI; continues where it was interrupted."""
    settings = _config(TrainConfig, config, context.args)
    if dry_run:
        preflight.check_plan(settings)
        from redi.training.plan import describe

        print(describe(settings))
        return
    preflight.check_training(settings)
    from redi.training import distributed
    from redi.training.loop import train as train_stage

    result = train_stage(settings, name=settings.objective)
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {result.output_dir} ({result.steps} steps)")
    distributed.teardown()  # not after an error: it would wait for ranks that have ended


@app.command(context_settings=FIELDS)
def plan(
    context: typer.Context,
    recipe: Path,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="0: a CPU")] = 8,
    gpu_memory: Annotated[
        float, typer.Option("--gpu-memory", "--gpu_memory", min=1, max=100_000, help="GB of each")
    ] = 80,
    gpu: Annotated[str, typer.Option("--gpu", help="which, for the time")] = "A100",
    mean_length: Annotated[
        int | None,
        typer.Option("--mean-length", "--mean_length", min=1, help="tokens of a mean trace"),
    ] = None,
) -> None:
    """What a training recipe needs and takes: memory per GPU, steps, hours; trains nothing."""
    settings = load_config(TrainConfig, recipe, _overrides(TrainConfig, context.args))
    preflight.check_plan(settings)
    from redi.training.plan import describe

    print(describe(settings, gpus=gpus, gpu_memory=gpu_memory, gpu=gpu, mean_length=mean_length))


@app.command("eval", context_settings=FIELDS)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="model folder or hub name")],
    output_dir: OutputDir,
    config: ConfigFile = None,
) -> None:
    """Samples and grades answers: pass@1 with its error, pass@k, every sample kept."""
    settings = _config(EvalConfig, config, context.args)
    preflight.check_evaluation(model, settings)
    from redi.evaluation.compare import benchmark_table
    from redi.evaluation.evaluate import evaluate as evaluate_model
    from redi.evaluation.evaluate import evaluate_benchmarks
    from redi.evaluation.tables import model_table, print_table

    if settings.benchmarks:
        print_table(benchmark_table(evaluate_benchmarks(model, settings, output_dir)))
    else:
        result = evaluate_model(model, settings, output_dir)
        print_table(model_table({Path(model).name: result}))


@app.command()
def compare(
    evaluations: Annotated[list[Path], typer.Argument(help="output folders of redi eval")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="default: the first")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="the paper's rows too, marked as such")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", help="an HTML page as well")] = None,
) -> None:
    """Evaluated models side by side: scores, intervals, paired tests."""
    from redi.evaluation.compare import load_models, paired_table, score_table
    from redi.evaluation.tables import print_table

    models = load_models(evaluations)
    print_table(score_table(models, published))
    baseline = baseline or next(iter(models))
    tests = paired_table(models, baseline)
    if tests is not None:
        print_table(tests)
    if output is not None:
        from redi.pages.compare import write_compare_page

        page = write_compare_page(
            output, evaluations, models, baseline=baseline, published=published
        )
        print(f"page: {page}")


@app.command()
def report(
    run_dir: Path,
    output: Annotated[
        Path | None, typer.Option("--output", help="default: results.html in it")
    ] = None,
) -> None:
    """A run, finished or not, as one self-contained page."""
    from redi.pages.run import write_run_page

    print(f"page: {write_run_page(run_dir, output)}")


@app.command()
def traces(
    before: Annotated[str, typer.Argument(help="model folder or hub name, as SFT's")],
    after: Annotated[str, typer.Argument(help="another, as REDI's")],
    dataset_name: Annotated[str, typer.Option("--dataset_name", "--dataset-name")],
    output: Annotated[Path, typer.Option("--output")] = Path("traces.html"),
    num_problems: Annotated[int, typer.Option("--num_problems", "--num-problems", min=1)] = 50,
    sort: Annotated[
        Literal["change", "id"], typer.Option("--sort", help="id: as in the file")
    ] = "change",
) -> None:
    """Right and wrong traces under two models, coloured by each token's change of log-prob."""
    preflight.check_data("--dataset_name", dataset_name)
    for model in (before, after):
        preflight.check_model("traces", model)
    from redi.pages.traces import write_trace_page

    file = write_trace_page(
        before, after, dataset_name, output, num_problems=num_problems, sort=sort
    )
    print(f"page: {file}")


@data_app.command("report")
def data_report(
    data_dir: Path,
    output: Annotated[
        Path | None, typer.Option("--output", help="default: report.html in it")
    ] = None,
) -> None:
    """What `redi data build` did, as a page: counts, lengths, drops, sources, overlap."""
    from redi.pages.data import write_data_page

    print(f"page: {write_data_page(data_dir, output)}")


@data_app.command("show")
def data_show(
    path: Annotated[str, typer.Argument(help="positives.parquet, pairs.parquet or ready rows")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="model folder or hub name")],
    row: Annotated[
        int | None, typer.Option("--row", min=1, help="from 1; default: the first")
    ] = None,
    id: Annotated[str | None, typer.Option("--id")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="an HTML page")] = None,
) -> None:
    """One row as training sees it: which tokens are masked, trained, the stop token."""
    if row is not None and id is not None:
        raise RediError("--row and --id: give one of them")
    preflight.check_data("data show", path)
    preflight.check_folder("--tokenizer", tokenizer, "tokenizer")
    from redi.pages.data import find_example, print_traces, shown_traces, write_show_page

    example = find_example(path, row=row, id=id)
    shown = shown_traces(example, _tokenizer(tokenizer))
    if output is None:
        print_traces(example, shown)
    else:
        print(f"page: {write_show_page(example, shown, path, output)}")


@data_app.command("build", context_settings=FIELDS)
def data_build(
    context: typer.Context,
    output_dir: OutputDir,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="counts lengths in tokens")
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Raw generations (or ready rows) to positives.parquet, pairs.parquet and a report."""
    settings = _config(DataConfig, config, context.args)
    preflight.check_build(settings, tokenizer)
    from redi.data.build import build
    from redi.training.logging import ticker

    rows = ticker("rows read")
    report = build(settings, output_dir, tokenizer=_tokenizer(tokenizer), progress=rows)
    print(report.text())


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from redi.training.model import load_tokenizer_from

    return load_tokenizer_from(name)


def _config(kind: type, file: Path | None, args: list[str]) -> Any:
    overrides = _overrides(kind, args)
    if file is not None:
        return load_config(kind, file, overrides)
    content: dict[str, Any] = {}
    for key, value in overrides.items():
        set_field(content, key, value)
    return make_config(kind, content, "command line")


def _overrides(kind: type, args: list[str]) -> dict[str, Any]:
    """["--learning_rate", "1e-6", "--bf16=false"] to a dictionary of `kind`'s fields."""
    overrides: dict[str, Any] = {}
    rest = list(args)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise RediError(f"{flag}: fields are given as --field value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RediError(f"--{key}: needs a value")
            value = rest.pop(0)
        if "." not in key:  # names inside a section are the user's own
            key = key.replace("-", "_")
        overrides[key] = read_value(kind, key, value)
    return overrides


def main() -> None:
    """Entry point: user errors end with exit code 2 and one line, not a traceback."""
    import warnings

    from redi.errors import Interrupted

    # Our own warnings are sentences for people; where in our code they stand is of no use to them.
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, kind, *where, **more: (
        f"warning: {message}\n" if kind is UserWarning else usual(message, kind, *where, **more)
    )
    try:
        # Not app(), which swallows Ctrl-C and draws a box of many lines around what it has to say.
        dashed = next((word for word in sys.argv[1:] if re.match(r"-[A-Za-z]{2}", word)), None)
        if dashed:  # -alpha would be read as -a -l -p -h ..., which is help
            raise RediError(f"{dashed}: fields are given as -{dashed} value")
        command = typer.main.get_command(app)
        with command.make_context("redi", sys.argv[1:] or ["--help"]) as context:
            command.invoke(context)
        if sys.stdout is not None:  # it is None where it was closed from the start
            sys.stdout.flush()
    except typer.Exit as end:  # of --help
        sys.exit(end.exit_code)
    except RediError as error:
        _fail(str(error))
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print(
            "interrupted; what was finished is kept: run the same command to continue",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # who reads along has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise  # not about a file that the user has named
        _fail(f"{error.filename or 'the disk'}: {error.strerror or error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's, whose class moves between versions
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "redi")
        _fail(f"{error.format_message().rstrip('.')} ({where} --help shows how)")


def _fail(message: str) -> None:
    """One line, whatever the libraries wrote that it quotes."""
    lines = (line.strip() for line in message.splitlines())
    line = " ".join(line for line in lines if line)
    # Nothing in a name or a quotation takes hold of the terminal.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)
