"""The `wf` command line: each command builds a `Job` and hands it to `wf_deployer.run`."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Literal

import typer

from wf_deployer.commands import convert_argv, eval_argv, inference_argv
from wf_deployer.doctor import diagnose, is_healthy
from wf_deployer.errors import UserError
from wf_deployer.render import RESUMABLE
from wf_deployer.report import print_json, print_table
from wf_deployer.run import execute, module_command
from wf_deployer.spec import Job
from wf_deployer.train import CloudOptions, train_job

app = typer.Typer(
    name="wf",
    help="WrinkleFree: train, convert, export, serve and evaluate 1.58-bit language models, here or in a cloud.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Typer's error for a wrong command line lies under a private name; it is what its public BadParameter derives from.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the command to stderr before running it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Argument(metavar="DIR|FILE", help="A model directory or a GGUF file.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 failed, 2 the user's mistake, 75 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = app(arguments or ["--help"], prog_name="wf", standalone_mode=False)
    except _UsageError as error:
        command = next((word for word in arguments if word in _command_names()), None)
        print(f"error: {_sentence(error)}: see `wf {command + ' ' if command else ''}--help`", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: run the command again", file=sys.stderr)
        return RESUMABLE
    return result if isinstance(result, int) else 0


def _command_names() -> set[str]:
    return {str(info.name or getattr(info.callback, "__name__", "")) for info in app.registered_commands}


def _sentence(error: Exception) -> str:
    text: str = getattr(error, "format_message", lambda: str(error))()
    return " ".join(text.replace("Value error, ", "").split()).rstrip(".")


def _examples(*lines: str) -> str:
    """Lay examples out for typer, which joins lines unless they are paragraphs and reads square brackets as markup."""
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in lines)])


def _start(module: str, words: tuple[str, ...], dry_run: bool, verbose: bool) -> None:
    raise typer.Exit(execute(Job(command=module_command(module, *words)), dry_run=dry_run, verbose=verbose))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"wf-deployer {version('wf-deployer')}")
        raise typer.Exit(0)


@app.callback(epilog=_examples("wf doctor", "wf train training=smoke", "wf COMMAND --help"))
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "wf convert HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-ternary",
        "wf convert ./my-llama --out my-ternary --calibration sample.txt",
        "wf convert ./my-llama --out my-packed --packed",
    )
)
def convert(
    source: Annotated[str, typer.Argument(metavar="DIR|ID", help="A model directory or a hub id.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="The directory to write.")],
    norm: Annotated[Literal["subln", "none", "allnorm", "bitlinear"] | None, typer.Option(help="Where norms are inserted.")] = None,
    gain: Annotated[Literal["calibrated", "one"] | None, typer.Option(help="Initial norm gain.")] = None,
    softness: Annotated[float | None, typer.Option(min=0, help="0 inserts plain norms; larger is nearer to none.")] = None,
    granularity: Annotated[
        Literal["tensor", "row", "group128"] | None, typer.Option(help="How many weights share a scale.")
    ] = None,
    rotation: Annotated[bool, typer.Option("--rotation", help="Rotate the inputs of o_proj and down_proj.")] = False,
    calibration: Annotated[str | None, typer.Option(metavar="FILE", help="A text file to calibrate on.")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Write 2-bit weights instead of float masters.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that --out holds.")] = False,
    json: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Turn a Hugging Face model into a 1.58-bit model directory."""
    options = {
        "--out": out,
        "--norm": norm,
        "--gain": gain,
        "--softness": softness,
        "--granularity": granularity,
        "--rotation": rotation,
        "--calibration": calibration,
        "--packed": packed,
        "--force": force,
        "--json": json,
    }
    _start("bitnet_arch", convert_argv(source, options), dry_run, verbose)


@app.command(
    epilog=_examples(
        "wf export my-ternary --out my-ternary.gguf",
        "wf export my-ternary --out my-ternary.gguf --type tq2_0 --positions 1000",
        "wf export my-qwen3 --out my-qwen3.gguf --architecture qwen3 --embedding q8_0",
    )
)
def export(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The GGUF file to write; its parity report lies beside it.")],
    gguf_type: Annotated[
        Literal["auto", "f16", "bf16", "tq1_0", "tq2_0", "q2_0", "i2_s"] | None,
        typer.Option("--type", help="How weights are stored; auto takes the exact type for each width."),
    ] = None,
    architecture: Annotated[
        Literal["auto", "bitnet", "gemma3", "llama", "qwen2", "qwen3", "wrinklefree"] | None,
        typer.Option(help="What the file is; auto takes what llama.cpp runs, if that holds the model."),
    ] = None,
    embedding: Annotated[
        Literal["f16", "bf16", "q8_0", "q6_k", "q4_1"] | None,
        typer.Option(help="How embeddings and head are stored; the last three change the model a little."),
    ] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="How many positions an engine's logits are compared on.")] = None,
    engine: Annotated[
        Literal["auto", "llama.cpp", "native"] | None,
        typer.Option(help="What runs the file; auto takes the native engine, and llama.cpp if it can."),
    ] = None,
    unproven: Annotated[bool, typer.Option("--unproven", help="Write the file without comparing an engine's logits.")] = False,
    json: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Write a model directory as a GGUF file, proven in engines before it gets its name."""
    options = {
        "--out": out,
        "--type": gguf_type,
        "--architecture": architecture,
        "--embedding": embedding,
        "--positions": positions,
        "--engine": engine,
        "--unproven": unproven,
        "--json": json,
    }
    _start("wrinklefree_inference", inference_argv("export", [directory], options), dry_run, verbose)


@app.command(
    epilog=_examples(
        'wf generate my-ternary.gguf "Once upon a time"',
        'wf generate my-ternary "Once upon a time" --max-tokens 64 --temperature 0.7 --seed 1',
        'wf generate my-ternary.gguf -- "-1 and 1 are"',
    )
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue; put -- before one that begins with a dash.")],
    max_tokens: Annotated[int | None, typer.Option(min=1, help="How many tokens to write at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token; larger varies more.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sample repeatable.")] = None,
    engine: Annotated[Literal["llama.cpp", "native"] | None, typer.Option(help="What runs a GGUF file (native).")] = None,
    json: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt with a model."""
    options = {"--max-tokens": max_tokens, "--temperature": temperature, "--seed": seed, "--engine": engine, "--json": json}
    _start("wrinklefree_inference", inference_argv("generate", [model, prompt], options), dry_run, verbose)


@app.command(epilog=_examples("wf serve my-ternary.gguf --port 8080", "wf serve my-ternary --host 0.0.0.0 --alias my-model"))
def serve(
    model: Model,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port to listen on.")] = None,
    alias: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    context: Annotated[int | None, typer.Option(min=8, help="Tokens that one request may use.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Requests decoded at once; more of them wait.")] = None,
    api_key_file: Annotated[str | None, typer.Option(metavar="FILE", help="One API key a line (or set WF_API_KEY).")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model over an OpenAI-compatible API, until Ctrl-C."""
    options = {
        "--host": host,
        "--port": port,
        "--alias": alias,
        "--context": context,
        "--parallel": parallel,
        "--api-key-file": api_key_file,
    }
    _start("wrinklefree_inference", inference_argv("serve", [model], options), dry_run, verbose)


@app.command(
    "eval",
    epilog=_examples(
        "wf eval my-ternary --tasks perplexity,sst2_local",
        "wf eval my-ternary.gguf --tasks perplexity --limit 50 --out results",
    ),
)
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Tasks, separated by commas.")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Where results.json and the Markdown card go.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many examples of each task.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a window.")] = None,
    json: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a model; writes JSON and a Markdown card."""
    options = {"--tasks": tasks, "--out": out, "--limit": limit, "--context": context, "--json": json}
    _start("wrinklefree_eval", eval_argv(model, options), dry_run, verbose)


@app.command(
    epilog=_examples(
        "wf train training=smoke",
        "wf train model=smollm2_135m training.max_steps=500 output_dir=runs/a",
        "wf train -- --help",
        "wf train model=tiny --cloud aws --accelerators L4:1 --dry-run > task.yaml",
        "wf train output_dir=/out/a --cloud gcp --spot --mount /out=gs://my-bucket --dry-run > task.yaml",
    )
)
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Hydra overrides; the trainer's own options go after --.")
    ] = None,
    cloud: Annotated[
        Literal["local", "aws", "gcp", "nebius", "runpod", "kubernetes"], typer.Option(help="Where to train.")
    ] = "local",
    accelerators: Annotated[str | None, typer.Option(metavar="NAME[:N]", help="Cloud: accelerators, for example L4:1.")] = None,
    instance_type: Annotated[str | None, typer.Option(metavar="NAME", help="Cloud: a machine by its own name.")] = None,
    cpus: Annotated[str | None, typer.Option(metavar="N[+]", help="Cloud: cores.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="GIB[+]", help="Cloud: memory.")] = None,
    disk_size: Annotated[int | None, typer.Option(metavar="GIB", min=1, help="Cloud: disk.")] = None,
    region: Annotated[str | None, typer.Option(help="Cloud: a region, or a Kubernetes context.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Cloud: take a machine that can be taken away.")] = False,
    name: Annotated[str | None, typer.Option(help="Cloud: the job's name (wf-train if not given).")] = None,
    mount: Annotated[
        list[str] | None, typer.Option(metavar="/PATH=SOURCE", help="Cloud: a bucket, or a local path to copy; repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Cloud: a variable of your environment to pass on at launch; repeatable."),
    ] = None,
    no_wandb: Annotated[bool, typer.Option("--no-wandb", help="Cloud: do not ask for WANDB_API_KEY at launch.")] = False,
    workdir: Annotated[str | None, typer.Option(metavar="DIR", help="Cloud: the repository to send.")] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Train a model here, or print the SkyPilot task that trains it in a cloud."""
    options = CloudOptions(
        accelerators=accelerators,
        instance_type=instance_type,
        cpus=cpus,
        memory=memory,
        disk_size=disk_size,
        region=region,
        spot=spot,
        name=name,
        mount=tuple(mount or ()),
        secret=tuple(secret or ()),
        no_wandb=no_wandb,
        workdir=workdir,
    )
    raise typer.Exit(execute(train_job(overrides or [], cloud, options), dry_run=dry_run, verbose=verbose))


@app.command(epilog=_examples("wf doctor", "wf doctor --network", "wf doctor --json"))
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the model hub can be reached.")] = False,
    json: Json = False,
) -> None:
    """Say what is installed, what is missing, and how to get it; exit 1 if something required is missing."""
    try:
        checks = diagnose(network=network)
    except KeyboardInterrupt:  # caught here because typer would turn it into 130
        print("interrupted: run the command again", file=sys.stderr)
        raise typer.Exit(RESUMABLE) from None
    (print_json if json else print_table)(checks)
    raise typer.Exit(0 if is_healthy(checks) else 1)
