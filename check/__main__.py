"""Prove kernels without a GPU.

    python check op layer_norm          everything below for one op, on one screen
    python check fuzz --cases 2000      random cases against the definition
    python check mutants                bugs generated mechanically: each must be found
    python check aot                    every kernel compiled: resources, budgets, predicted time
    python check compiled               every kernel compiled and executed, in an emulator
    python check forward                the predicted time of a forward on a GPU, from aot
    python check overhead               how long Python takes to launch a forward

The first three run kernels in Triton's interpreter and need TRITON_INTERPRET=1, as make sets it.
"""

import argparse
import os
import sys
from pathlib import Path

# This folder replaces the first entry: under `python -m check` that is the repository, whose folder
# kernels/ would hide a distribution of the same name that transformers imports.
sys.path[0] = str(Path(__file__).resolve().parent)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from bert_fast import kernels
from bert_fast.kernels.launch import HAS_TRITON

if not HAS_TRITON:
    sys.exit("check: needs triton, which runs on Linux; pip install triton")

import aot
import compiled
import forward
import fuzz
import mutants
import one_op
import overhead

COMMANDS = {
    "op": one_op, "fuzz": fuzz, "mutants": mutants, "aot": aot, "compiled": compiled,
    "forward": forward, "overhead": overhead,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"check: {message}\n")


def main():
    as_written = argparse.RawTextHelpFormatter
    parser = Parser("check", description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, module in COMMANDS.items():
        about = module.__doc__
        command = commands.add_parser(
            name, help=about.partition("\n")[0], description=about, formatter_class=as_written
        )
        if name == "op":
            command.add_argument("op", metavar="OP", nargs="?", action="append")
        elif name not in ("forward", "overhead"):
            command.add_argument("--op", metavar="OP", action="append", help="may be repeated")
        module.add_arguments(command)
    options = parser.parse_args()
    known = {s.name: s for s in kernels.SPECS}
    if options.command == "op" and options.op == [None]:
        parser.error(f"op: give one op, of {', '.join(known)}")
    names = getattr(options, "op", None)
    for name in names or ():
        if name not in known:
            if name in aot.kernels_without_spec():
                parser.error(aot.WITHOUT_SPEC.format(name))
            parser.error(f"no op {name}; there are {', '.join(known)}")
    return COMMANDS[options.command].main(options, [known[n] for n in names or known])


if __name__ == "__main__":  # a spawned worker imports this file too
    sys.exit(main())
