"""python -m bert_fast: the bert-fast command, also where its folder is not on the PATH."""

from .cli import main

main(prog_name="bert-fast")
