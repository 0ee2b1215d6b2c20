"""The bert-fast command: embed texts, answer questions, inspect the machine (doctor), show it all
at once (demo).

Results go to stdout, everything else to stderr. An error is one line, preceded by a traceback with
--debug. Exit codes: 2 for unusable input, 1 for a failed check of doctor and for a fault that is
not the input's, 130 after Ctrl-C.
"""

import copy
import enum
import io
import itertools
import json
import operator
import os
import random
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__, accelerate, doctor, report
from . import answer as find_answers
from .checkpoints import SHIPPED
from .corpus import docstrings
from .encode import POOLINGS, encode, load, positions, tokenize
from .kernels.launch import DTYPES

UsageError = typer.BadParameter.__base__  # click's, which newer typer carries inside itself
Pooling = enum.Enum("Pooling", {name: name for name in POOLINGS})
Dtype = enum.Enum("Dtype", {(name := str(t).removeprefix("torch.")): name for t in DTYPES})

ROWS = 20  # of embed's table
SENTENCE = "This is an example sentence."
PACKAGES = ("argparse", "asyncio", "builtins", "collections", "email", "logging", "unittest")


class _OneLineErrors(TyperGroup):
    def main(self, args=None, **kwargs):
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            sys.exit(super().main(args, **{**kwargs, "standalone_mode": False}))
        except Exception as error:
            if "--debug" in args:
                traceback.print_exc()
            if isinstance(error, UsageError):
                message, code = error.format_message(), 2
            elif isinstance(error, (ValueError, OSError)):
                message, code = str(error), 2
            else:
                message, code = f"{type(error).__name__}: {error}; --debug shows where", 1
            _say("error:", *message.split())
            sys.exit(code)


main = typer.Typer(cls=_OneLineErrors, add_completion=False)

# _OneLineErrors reads it from the arguments, as the command may not even have started.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of weights and arithmetic.")]
Device = Annotated[
    str | None,
    typer.Option(  # named, as typer 0.27 would take a metavar like its name for the flag
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N.",
        show_default="the GPU if there is one, else the CPU",
    ),
]


def _print_version(asked: bool):
    if asked:
        print(f"bert_fast {__version__}")
        raise typer.Exit


@main.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
    debug: Debug = False,
):
    """BERT on Triton kernels, computing no padding."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# -- embed ----------------------------------------------------------------------------------
@main.command()
def embed(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts; - stands for the lines of standard input."),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="ID_OR_DIR",
            help="BERT, RoBERTa, ELECTRA or DistilBERT, any head: a directory, or a hub id.",
            show_default="the small one that bert_fast ships",
        ),
    ] = str(SHIPPED),
    pooling: Annotated[
        Pooling, typer.Option(help="The state of [CLS], or the mean over all tokens.")
    ] = Pooling.cls,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Positions in a batch; fewer take less memory.")
    ] = 8192,
    as_json: AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npy", help="Write them there, float32, a row for each text."),
    ] = None,
    debug: Debug = False,
):
    """Embed texts, given as arguments or as lines of standard input."""
    if output is not None:
        if as_json:
            raise ValueError("--json and --output: give one of them, got both")
        _check_output(output)
    device = _device(device)
    if not text and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no text: give TEXT arguments, or lines on standard input")
    texts = _texts(text or ["-"])
    bert, tokenizer = load(model, getattr(torch, dtype.value), device)
    _say(_describe(model, bert), f"pooling {pooling.value}", sep=", ")
    limit = positions(bert, tokenizer)
    ids, truncated = tokenize(texts, tokenizer, limit)
    if truncated:
        _say(f"{truncated} of {len(texts)} texts cut to the model's {limit} tokens")
    embeddings = encode(ids, bert, pooling.value, batch_tokens, _progress("embedding"))

    if output is not None:
        array = io.BytesIO()  # np.save would append .npy to other names, and needs to seek
        np.save(array, embeddings.numpy())
        with output.open("wb") as file:
            file.write(array.getbuffer())
        _say(f"wrote float32{list(embeddings.shape)} to {output}")
    elif as_json:
        document = {
            "model": model,
            "pooling": pooling.value,
            "dtype": dtype.value,
            "device": str(device),
            "texts": texts,
            "embeddings": embeddings.tolist(),
        }
        print(json.dumps(document, allow_nan=False), flush=True)
    else:
        first = Column("text", max_width=32, no_wrap=True)
        table = Table(first, "norm", f"first of {embeddings.shape[1]} numbers", box=None)
        for text, row in zip(texts[:ROWS], embeddings, strict=False):
            numbers = " ".join(f"{x:+.4f}" for x in row[:4])
            table.add_row(_shown(text), f"{row.norm():.4f}", numbers)
        Console().print(table)
        if len(texts) > ROWS:
            _say(f"and {len(texts) - ROWS} more; --json or --output FILE.npy gives them all")


def _check_output(path):
    """Raise now what would otherwise be raised after the work."""
    if path.is_dir():
        raise IsADirectoryError(f"--output {path}: is a directory; give a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no directory {path.parent}; create it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--output {path}: may not be written; give another place")


def _device(name):
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"--device {name}: torch {torch.__version__} sees {count} GPUs; give cpu, or see what"
            " `bert-fast doctor` says"
        )
    return device


def _texts(arguments):
    """The texts: arguments, in place of each - the lines of standard input, none of them blank."""
    texts = []
    try:
        for text in arguments:
            if text == "-":
                sys.stdin.reconfigure(encoding="utf-8-sig")
                texts += [line.rstrip("\r\n") for line in sys.stdin]
            else:
                text.encode()
                texts.append(text)
    except UnicodeError as error:
        raise ValueError(f"texts must be UTF-8 ({error}); convert them first") from error
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise ValueError(
            f"no text: {len(texts)} given, of which 0 are not blank; give TEXT arguments, or lines"
            " on standard input"
        )
    if len(kept) < len(texts):
        _say(f"{len(texts) - len(kept)} blank texts skipped")
    return kept


def _describe(name, model):
    [runs] = report(model).swapped
    return ", ".join(
        (
            f"model {name}" + " (shipped with bert_fast)" * (str(name) == str(SHIPPED)),
            f"{runs.layers} layers of {model.config.hidden_size}",
            f"{runs.dtype} on {runs.device}",
            f"backend {runs.backend}" if runs.reason is None else f"runs stock: {runs.reason}",
        )
    )


# -- answer ---------------------------------------------------------------------------------
@main.command()
def answer(
    question: Annotated[str, typer.Argument(metavar="QUESTION", show_default=False)],
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Where the answer is.", show_default="standard input, all of it"
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="A file of text in the place of --context."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            help="A model trained to answer questions: a directory, or an id on the model hub."
            " Required.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="The most answers to print.")] = 1,
    null_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Allow that there is no answer: where its logits exceed those of the best answer"
            " by more than this. 0 for a model trained on SQuAD 2.",
            show_default="there is an answer",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
):
    """Find the part of a text that answers a question, its probability and its place.

    Places count characters of the text, from 0; the end is the first behind the answer.
    """
    if model is None:
        raise ValueError(
            "--model is required: give a BERT with a question-answering head; the checkpoint that"
            " bert_fast ships has none"
        )
    device = _device(device)
    _check_text("QUESTION", question)
    context = _context(context, file)
    bert, tokenizer = load(model, getattr(torch, dtype.value), device, "ForQuestionAnswering")
    _say(_describe(model, bert))
    found = find_answers(
        question, context, bert, tokenizer, top_k=top_k, null_threshold=null_threshold
    )

    if as_json:
        document = {
            "model": model,
            "dtype": dtype.value,
            "device": str(device),
            "question": question,
            "answers": [answer._asdict() for answer in found],
        }
        print(json.dumps(document, allow_nan=False), flush=True)
    else:
        table = Table("score", "start", "end", Column("answer", overflow="fold"), box=None)
        for answer in found:
            text = _shown(" ".join(answer.text.split()) or "(no answer)")
            table.add_row(f"{answer.score:.4f}", str(answer.start), str(answer.end), text)
        Console().print(table)


def _context(context, file):
    """The text to search, with its line ends unchanged, so that positions in it are valid."""
    if context is not None and file is not None:
        raise ValueError("--context and --file: give one of them, got both")
    if context is not None:
        return _check_text("--context", context)
    if file is not None:
        whence, read = f"--file {file}", lambda: file.read_bytes()
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError("no context: give --context TEXT, --file FILE, or text on standard input")
    else:
        whence, read = "standard input", lambda: sys.stdin.buffer.read()
    try:
        return _check_text(whence, read().decode("utf-8-sig"))
    except UnicodeError as error:
        raise ValueError(f"{whence} must be UTF-8 ({error}); convert it first") from error
    except OSError as error:
        raise OSError(f"{whence}: {error.strerror}; give a file of text") from error


def _check_text(whence, text):
    try:
        text.encode()
    except UnicodeError as error:
        raise ValueError(f"{whence} must be UTF-8 ({error}); convert it first") from error
    if not text.strip():
        raise ValueError(f"{whence} is blank; give some text")
    return text


# -- doctor ---------------------------------------------------------------------------------
@main.command("doctor")
def _doctor(
    as_json: AsJson = False,
    debug: Debug = False,
):
    """Say what runs here, check every op against its definition, and what to do about problems.

    Exits with 1 if a check fails.
    """
    found = doctor.examine(_progress("checking"))
    if as_json:
        print(json.dumps(found, indent=1), flush=True)
    else:
        _print_diagnosis(found)
    raise typer.Exit(0 if found["passed"] else 1)


def _print_diagnosis(found):
    facts = Table.grid(padding=(0, 2))
    for name, version in found["versions"].items():
        facts.add_row(name, version or "absent")
    facts.add_row("CPU", "{capability}, {threads} threads".format(**found["cpu"]))
    for gpu in found["gpus"]:
        facts.add_row("GPU", "{name}, sm {capability}, {memory_gib} GiB".format(**gpu))
        tuned = gpu["tuned_on"] and f"measured on {gpu['tuned_on']}"
        facts.add_row("launch configurations", tuned or "defaults, not measured on this chip")
    for device, runs in found["backends"].items():
        facts.add_row(f"backend on {device}", runs["backend"] or f"none: {runs['reason']}")

    checks = Table("check", "device", "dtype", "largest error", "of the allowed", "", box=None)
    kind = operator.itemgetter("subject", "device", "dtype")
    for key, cases in itertools.groupby(found["checks"], kind):
        worst = max(cases, key=lambda c: float("inf") if c["share"] is None else c["share"])
        if worst["share"] is None:
            numbers = ("not finite" if worst["raised"] is None else "raised", "")
        else:
            numbers = (f"{worst['error']:.1e}", f"{worst['share']:.0%}")
        checks.add_row(*key, *numbers, "ok" if worst["passed"] else "[red]FAILED")

    console = Console(highlight=False)
    console.print(facts, "", checks, "")
    for problem in found["problems"]:
        console.print("[red]problem[/]", Text(problem["problem"]))
        console.print("     do", Text(problem["remedy"]))
    if not found["problems"]:
        console.print("no problems")


# -- demo -----------------------------------------------------------------------------------
@main.command()
def demo(device: Device = None, debug: Debug = False):
    """Run the shipped checkpoint: its numbers, how far they are from stock's, and how fast."""
    device = _device(device)
    bert, tokenizer = load(SHIPPED, device=device)
    stock = doctor.stock(SHIPPED).to(device)
    print(_describe(SHIPPED, bert))

    ids, _ = tokenize([SENTENCE], tokenizer, positions(bert, tokenizer))
    [row] = encode(ids, bert)
    alone = tokenizer(SENTENCE, return_tensors="pt").to(device)
    print(f"\n[CLS] embedding of {SENTENCE!r}")
    print("  first numbers ", " ".join(f"{x:+.6f}" for x in row[:8]))
    print(f"  norm           {row.norm():.6f}")

    texts = random.Random(0).sample([doc.text for doc in docstrings(PACKAGES)], 32)
    batch = tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt")
    batch = batch.to(device)
    fill = batch["attention_mask"].float().mean()
    print("\nlargest difference from stock transformers, over all tokens")
    print(f"  {doctor.difference(bert, stock, alone):.1e}  the sentence alone")
    print(f"  {doctor.difference(bert, stock, batch):.1e}  {len(texts)} docstrings in a batch")
    print(f"\n{report(bert)}")

    for problem, remedy in doctor.busy():
        _say(f"\n{problem}; {remedy}")
    print(f"\nspeed over stock transformers with sdpa, {len(texts)} docstrings of Python's library")
    print(f"padded to {batch['input_ids'].shape[1]} tokens, of which {fill:.0%} are text")
    print(f"  this model                       {_speed(bert, stock, batch)}")
    config = transformers.BertConfig(
        vocab_size=bert.config.vocab_size, hidden_size=384, num_hidden_layers=6,
        num_attention_heads=12, intermediate_size=1536,
    )  # fmt: skip
    stock = transformers.BertModel(config, add_pooling_layer=False).to(device).eval()
    larger = accelerate(copy.deepcopy(stock))
    print(f"  random weights, 6 layers of 384  {_speed(larger, stock, batch)}")


@torch.inference_mode()
def _speed(fast, stock, batch, seconds=2):
    """Both in turn, so that they see the same noise, for `seconds` and at least two rounds."""
    times = {fast: [], stock: []}
    begin = time.perf_counter()
    with Console(stderr=True).status("measuring"):
        while len(times[stock]) < 3 or time.perf_counter() - begin < seconds:
            for model in times:
                start = time.perf_counter()
                model(**batch)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                times[model].append(time.perf_counter() - start)
    fast, stock = (t[1:] for t in times.values())  # the first round is a warm-up
    ratio = statistics.median(stock) / statistics.median(fast)
    tokens = int(batch["attention_mask"].sum())
    return (
        f"{ratio:.1f}x by medians, {min(stock) / min(fast):.1f}x by minima of {len(fast)} rounds;"
        f" {tokens / statistics.median(fast):,.0f} tokens/s"
    )


# -- the terminal ---------------------------------------------------------------------------
def _say(*words, sep=" "):
    print(*words, sep=sep, file=sys.stderr)


def _shown(text):
    """Of a user's text: a terminal would obey control characters."""
    return Text("".join(c if c.isprintable() else " " for c in text))


def _progress(what):
    """Wraps a list with a progress bar on stderr, if that is a terminal and the list is long."""
    console = Console(stderr=True)
    return lambda todo: track(
        todo, what, console=console, transient=True,
        disable=not console.is_terminal or len(todo) < 8,
    )  # fmt: skip
