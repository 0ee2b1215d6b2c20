"""Do the checks notice a wrong kernel? Each mutant is a shipped one with one thing changed.

Mutants are made from the syntax trees of every jit function that an op reaches, one for each place
where an operator of OPERATORS applies. `examine` then looks for faults in the op. If it finds none,
the mutant has survived: either a check is missing, or the mutant is equivalent, and PROOFS says
why. A mutant runs in the interpreter alone, in place of the original function and with its line
numbers.
"""

import ast
import copy
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from examine import examine
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

from bert_fast.kernels import SPECS
from bert_fast.kernels.launch import INTERPRET

# -- operators ------------------------------------------------------------------------------
# An operator takes a node of a kernel's tree and its Names, and yields replacements for the node.
OPERATORS = {}
UNSEEN = "wait_for_inputs"  # does nothing in the interpreter; the emulator faults who leaves it out


def operator(fn):
    OPERATORS[fn.__name__.replace("_", " ")] = fn
    return fn


class Names:
    """Similar names in a kernel, which may be mistaken for one another."""

    def __init__(self, tree):
        self._bound = {a.arg: 0 for a in tree.args.args}  # name -> line from which it has a value
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._bound.setdefault(node.id, node.lineno)

    def like(self, node):
        """Other names of the same kind that have a value at this node."""
        return [
            name for name, line in self._bound.items()
            if name != node.id and _kind(name) == _kind(node.id) and line < node.lineno
        ]  # fmt: skip

    def rebound(self, target):
        """Whether a target of an assignment already has a value."""
        names = [n for n in ast.walk(target) if isinstance(n, ast.Name)]
        return all(self._bound[n.id] < n.lineno for n in names)


def _kind(name):
    """The suffix of pointers, else the first word: stride_xm and stride_rm are of one kind."""
    if len(name) == 1:
        return "size" if name.isupper() else name
    return "pointer" if name.endswith("_ptr") else name.split("_")[0]


NEIGHBOUR = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv,
}  # fmt: skip
NARROWER = {"float32": "float16", "int64": "int32"}
RELATIVE = {
    "exp2": "exp", "rsqrt": "sqrt", "erf": "sigmoid", "sum": "max", "max": "sum", "cumsum": "sum",
    "maximum": "minimum", "minimum": "maximum",
}  # fmt: skip
REDUCTIONS = ("sum", "max", "cumsum")


@operator
def comparison(node, names):
    match node:
        case ast.Compare(left, [op], right) if type(op) in NEIGHBOUR:
            yield ast.Compare(left, [NEIGHBOUR[type(op)]()], right)


@operator
def conjunct_dropped(node, names):
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            yield from (left, right)


@operator
def mask_dropped(node, names):
    yield from _without(node, "mask", "other")


@operator
def other_dropped(node, names):
    yield from _without(node, "other")


@operator
def precision_dropped(node, names):
    yield from _without(node, "input_precision")


def _without(node, *keywords):
    """A call without the first of these keywords, and without the others if present."""
    match node:
        case ast.Call(func, args, given) if any(k.arg == keywords[0] for k in given):
            yield ast.Call(func, args, [k for k in given if k.arg not in keywords])


@operator
def arithmetic(node, names):
    match node:
        case ast.BinOp(left, op, right) if type(op) in OTHER:
            yield ast.BinOp(left, OTHER[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in OTHER:
            yield ast.AugAssign(target, OTHER[type(op)](), value)


@operator
def operand_dropped(node, names):
    match node:
        case ast.BinOp(left, ast.Add() | ast.Mult(), right):
            yield from (left, right)
        case ast.BinOp(left, ast.Sub() | ast.Div() | ast.FloorDiv() | ast.Mod(), _):
            yield left


@operator
def axis(node, names):
    match node:
        case ast.Call(ast.Attribute(ast.Name("tl"), name), [x, *rest], given):
            if name in REDUCTIONS:
                (now,) = [k.value for k in given if k.arg == "axis"] or rest
                yield ast.Call(node.func, [x, ast.Constant(1 - now.value)], [])


@operator
def integer(node, names):
    match node:
        case ast.Constant(int(value)) if not isinstance(value, bool):
            yield from (ast.Constant(value - 1), ast.Constant(value + 1))


@operator
def number(node, names):
    match node:
        case ast.Constant(float(value)):
            yield from (ast.Constant(1.0 - (value == 1.0)), ast.Constant(value * 1.001))
        case ast.Call(ast.Name("float")):  # an infinity
            yield ast.Constant(0.0)


@operator
def flag(node, names):
    match node:
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)


@operator
def name(node, names):
    match node:
        case ast.Name(_, ast.Load()):
            yield from (ast.Name(other, ast.Load()) for other in names.like(node))


@operator
def cast_dropped(node, names):
    match node:
        case ast.Call(ast.Attribute(value, "to")):
            yield value


@operator
def narrower_type(node, names):
    match node:
        case ast.Attribute(ast.Name("tl"), dtype, ctx) if dtype in NARROWER:
            yield ast.Attribute(node.value, NARROWER[dtype], ctx)


@operator
def function(node, names):
    match node:
        case ast.Attribute(ast.Name("tl"), fn, ctx) if fn in RELATIVE:
            yield ast.Attribute(node.value, RELATIVE[fn], ctx)


@operator
def choice(node, names):
    """Replaces a choice of the kernel by one of its alternatives."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("tl"), "maximum" | "minimum"), [a, b]):
            yield from (a, b)
        case ast.Call(ast.Attribute(ast.Name("tl"), "where"), [condition, a, b]):
            yield from (a, b, ast.Call(node.func, [condition, b, a], []))


@operator
def transpose_dropped(node, names):
    match node:
        case ast.Call(ast.Attribute(ast.Name("tl"), "trans"), [x]):
            yield x


@operator
def accumulator_dropped(node, names):
    match node:
        case ast.Call(ast.Attribute(ast.Name("tl"), "dot") as func, [a, b, _], given):
            yield ast.Call(func, [a, b], given)


@operator
def initial_value(node, names):
    match node:
        case ast.Call(ast.Attribute(ast.Name("tl") as tl, "zeros"), [shape, dtype]):
            full = ast.Attribute(tl, "full", ast.Load())
            yield ast.Call(full, [shape, ast.Constant(1), dtype], [])


@operator
def broadcast(node, names):
    """[:, None] instead of [None, :]."""
    match node:
        case ast.Subscript(value, ast.Tuple([a, b], ctx), _):
            yield ast.Subscript(value, ast.Tuple([b, a], ctx), node.ctx)


@operator
def arguments_swapped(node, names):
    """Swaps neighbouring arguments, in calls of other kernels and of range."""
    match node:
        case ast.Call(ast.Name(), args, given):
            for i in range(len(args) - 1):
                yield ast.Call(node.func, [*args[:i], args[i + 1], args[i], *args[i + 2 :]], given)


@operator
def turn_dropped(node, names):
    """Drops a loop's first iteration, or its last."""
    match node:
        case ast.Call(ast.Name("range") as func, [start, end, step]):
            yield ast.Call(func, [ast.BinOp(start, ast.Add(), step), end, step], [])
            yield ast.Call(func, [start, ast.BinOp(end, ast.Sub(), step), step], [])


@operator
def condition(node, names):
    match node:
        case ast.If(test, body, orelse):
            for new in (ast.UnaryOp(ast.Not(), test), ast.Constant(True), ast.Constant(False)):
                yield ast.If(new, body, orelse)


@operator
def statement_dropped(node, names):
    match node:
        case ast.Expr(ast.Call(ast.Name(name))) if name == UNSEEN:
            return
        case ast.AugAssign() | ast.Expr() | ast.Return(None):
            yield ast.Pass()
        case ast.Assign([target]) if names.rebound(target):
            yield ast.Pass()


# -- mutants --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mutant:
    op: str
    module: str
    kernel: str
    operator: str
    line: int
    before: str
    after: str
    original: ast.FunctionDef = field(repr=False, compare=False)
    node: ast.AST = field(repr=False, compare=False)  # in original
    new: ast.AST = field(repr=False, compare=False)  # in place of node

    @property
    def change(self):
        """The key under which PROOFS has it."""
        kernel = f"{self.module.rpartition('.')[2]}.{self.kernel}"
        return f"{kernel} {self.operator}: {self.before}  ->  {self.after}"

    @property
    def proof(self):
        """Why it computes the same as the kernel; None if that has not been proved."""
        return next((why for what, why in PROOFS.items() if re.fullmatch(what, self.change)), None)

    @property
    def place(self):
        return f"kernels/{self.module.rpartition('.')[2]}.py:{self.line}"

    @property
    def tree(self):
        return copy.deepcopy(self.original, {id(self.node): self.new})

    @contextmanager
    def in_place(self):
        """Calls and launches of the kernel run the mutant, wherever it was imported."""
        kernel = getattr(sys.modules[self.module], self.kernel)
        kernel.rewrite()  # also adds to the module what a rewritten function refers to
        tree = FunctionRewriter.ast_transformer.visit(copy.deepcopy(self.tree))
        tree = ast.fix_missing_locations(ast.Module([tree], []))
        namespace = {}
        code = compile(tree, kernel.fn.__code__.co_filename, "exec")
        exec(code, kernel.fn.__globals__, namespace)
        with mock.patch.dict(InterpretedFunction.rewritten_fn, {kernel.fn: namespace[self.kernel]}):
            yield


def mutants_of(spec):
    """Every mutant of every jit function that spec.fn reaches, in the order of the source."""
    return [m for kernel in kernels_of(spec) for m in _mutants_of_kernel(spec.name, kernel)]


def kernels_of(spec):
    """The jit functions that the op's definition refers to, directly or through others."""
    todo, seen, kernels = [(spec.fn.__module__, spec.fn.__name__)], set(), []
    while todo:
        seen.add(at := todo.pop(0))
        module = vars(sys.modules[at[0]])
        definitions = _definitions(module["__file__"])
        if isinstance(module[at[1]], InterpretedFunction):
            kernels.append(module[at[1]])
        for node in _forward(definitions[at[1]]):
            if not isinstance(node, ast.Name):
                continue
            if node.id == UNSEEN:
                continue
            if isinstance(kernel := module.get(node.id), InterpretedFunction):
                todo.append((kernel.fn.__module__, kernel.fn.__name__))
            elif node.id in definitions:
                todo.append((at[0], node.id))
        todo = [name for name in dict.fromkeys(todo) if name not in seen]
    return sorted(kernels, key=lambda k: (k.fn.__module__, k.fn.__code__.co_firstlineno))


def _forward(definition):
    """Its nodes, except those of a method named backward: a gradient has a Spec of its own."""
    todo = [definition]
    while todo:
        yield (node := todo.pop())
        for child in ast.iter_child_nodes(node):
            if not (isinstance(node, ast.ClassDef) and getattr(child, "name", "") == "backward"):
                todo.append(child)


def _definitions(file):
    """The nodes of a file by the name that they define."""
    nodes = {}
    for node in ast.parse(Path(file).read_text()).body:
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Assign([ast.Name(name)]):
                nodes[name] = node
    return nodes


def _mutants_of_kernel(op, kernel):
    module, name = kernel.fn.__module__, kernel.fn.__name__
    tree = _definitions(kernel.fn.__code__.co_filename)[name]
    tree.decorator_list = []
    names = Names(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    seen = {ast.unparse(tree)}
    for node in _body(tree):
        for operator, replacements in OPERATORS.items():
            for new in replacements(node, names):
                new = ast.copy_location(copy.copy(new), node)
                shown = _shown(node, parents)
                before = _line(shown)
                with _replaced(parents[node], node, new):  # copying the tree takes 20 ms
                    text, after = ast.unparse(tree), _line(new if shown is node else shown)
                if text not in seen:
                    seen.add(text)
                    change = operator, node.lineno, before, after
                    yield Mutant(op, module, name, *change, tree, node, new)


@contextmanager
def _replaced(parent, node, new):
    """A child of parent is temporarily replaced."""
    for name, value in ast.iter_fields(parent):
        if value is node:
            setattr(parent, name, new)
            yield
            setattr(parent, name, node)
        elif isinstance(value, list) and any(child is node for child in value):
            setattr(parent, name, [new if child is node else child for child in value])
            yield
            setattr(parent, name, value)


def _body(tree):
    """The nodes of a kernel's statements in source order, except those of its docstring and of the
    axes of reductions, which have an operator of their own."""
    axes = set()
    for statement in tree.body:
        for node in ast.walk(statement):
            match node:
                case ast.Call(ast.Attribute(ast.Name("tl"), fn), [_, *rest], given):
                    if fn in REDUCTIONS:
                        axes.update(rest, (k.value for k in given))
    documented = ast.get_docstring(tree) is not None
    nodes = [n for s in tree.body[documented:] for n in ast.walk(s)]
    nodes = [n for n in nodes if hasattr(n, "lineno") and n not in axes]
    return sorted(nodes, key=lambda n: (n.lineno, n.col_offset))


def _shown(node, parents):
    """The smallest piece of code around node that is meaningful to a reader."""
    while not isinstance(node, (ast.stmt, ast.BinOp, ast.Compare, ast.Call)):
        node = parents[node]
    return node


def _line(node):
    """Its source in one line; for a block, its header."""
    return ast.unparse(node).partition("\n")[0]


def sample(mutants, count, seed):
    """count of the mutants, spread as evenly as possible over ops and operators, in their order."""
    turns, ranked = Counter(), []
    for m in random.Random(seed).sample(mutants, len(mutants)):
        turns[m.op, m.operator] += 1
        ranked.append((turns[m.op, m.operator], len(ranked), m))
    chosen = {id(m) for _, _, m in sorted(ranked, key=lambda r: r[:2])[:count]}
    return [m for m in mutants if id(m) in chosen]


# -- verdicts -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    killed: bool
    by: str = ""  # in a word: a kind of sanitizer.Finding, wrong result, raises, does not end
    what: str = ""
    seconds: float = 0.0


class OutOfTime(BaseException):  # not an Exception, which the interpreter would wrap
    pass


@contextmanager
def limit(seconds):
    """OutOfTime after so many seconds of this process's own CPU time, whatever else runs."""

    def end(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def verdict(mutant, examine=examine, seconds=60.0):
    """What examine(spec) finds in the mutant's op with the mutant in place."""
    started = time.process_time()
    by, what = _fault(mutant, examine, seconds)
    return Verdict(bool(by), by, what, time.process_time() - started)


def _fault(mutant, examine, seconds):
    (spec,) = (s for s in SPECS if s.name == mutant.op)
    try:
        with mutant.in_place(), limit(seconds):
            fault = examine(spec)
    except OutOfTime:
        return "does not end", f"within {seconds:.0f} s"
    except Exception as error:
        return "raises", f"{type(error).__name__}: {error}"
    if fault is None:
        return "", ""
    finding = re.match(r"\w+\.py:\d+: \w+: ([a-z ]+), ", fault)
    return finding[1] if finding else "wrong result", fault


# -- proofs ---------------------------------------------------------------------------------
_SUM = "a pointer and an offset add up in either order"
_SLOWER = "more tiles go through the masked loop, which computes the same, only slower"
_TYPE = "the interpreter promotes, to the same number; Triton refuses a loop that changes a type"
_UNUSED = "a tile without a mask reads neither"
_ALL_TRUE = "the mask of a step that does not go past K is true everywhere"
_DIGITS = "moves a result by less than rounding to 16 bits does, which is the form's precision"
_ANY = r".* arguments swapped: "
PROOFS = {  # a regular expression of a whole Mutant.change -> why no input tells the two apart
    _ANY + r"load_row\((.+), offs_n, mask_n\)  ->  load_row\(offs_n, \1, mask_n\)": _SUM,
    _ANY + r"_lookup\((\w+), (\w+), r, (.+)\)  ->  _lookup\(\1, r, \2, \3\)": _SUM,
    r".* comparison: draw\(.+\) <= most  ->  draw\(.+\) < most": (
        "but for one draw of 2^32, which no case has"
    ),
    r"pointwise\.slope_exp2 comparison: z > 0\.0  ->  z >= 0\.0": (
        "at 0 both sides are 1/2, but for 3e-7"
    ),
    r"pointwise\.slope_exp2 number: p \* a - 1\.00000084  ->  p \* a - 1\.0": (
        "the error of the polynomial stays below 6e-7"
    ),
    r"pointwise\.slope_exp2 number: -0\.000518868305 \* a( \+ 0\.00738724705)?  ->  "
    r"-0\.00051\d+ \* a( \+ 0\.0073\d+)?": (
        "moves Phi by at most 2e-6, which rounding to 16 bits hides"
    ),
    # attention
    r"attention\._attend condition: if MASKED:  ->  if True:": (
        "a tile that goes without a mask has no key that some query must not see"
    ),
    r"attention\._attend number: tl\.load\([kv]_ptr .*other=1\.0\)": (
        "of k, columns past D meet zeros of q; of v, those are not stored, and rows past the last "
        "key have p = 0"
    ),
    r"attention\._attend number: .*tl\.where\(m_new == float\('-inf'\), 1\.0, m_new\)": (
        "all scores are -inf there, and -inf less any number is -inf"
    ),
    r"attention\._attend name: return \(acc, m_new, l\)  ->  return \(acc, m_finite, l\)": (
        "they differ for a query that has seen no key; keys ascend, so it will see none"
    ),
    r"attention\._forward_kernel cast dropped: .*start_[qk]\)\.to\(tl\.int32\)  ->  .*": (
        "the same length in int64"
    ),
    r"attention\._forward_kernel number: tl\.load\(q_ptr .*other=1\.0\)": (
        "columns past D meet zeros of k, and rows past the last query are not stored"
    ),
    r"attention\._forward_kernel .*: tl\.maximum\(start_m \+ shift \+ 1, 0\)  ->  0": _SLOWER,
    r"attention\._forward_kernel .*: start_m \+ shift \+ 1  ->  "
    r"(start_m \+ shift( - 1| \+ 0)?|1)": _SLOWER,
    r"attention\._forward_kernel .*: start_m \+ shift  ->  shift": _SLOWER,
    r"attention\._forward_kernel name: full // BLOCK_N  ->  full // BLOCK_M": _SLOWER,
    r"attention\._forward_kernel integer: tl\.maximum\(.*, 0\)  ->  tl\.maximum\(.*, -?1\)": (
        "1 and -1 over BLOCK_N are 0, as division truncates"
    ),
    r"attention\._forward_kernel (choice|function): "
    r"tl\.minimum\(start_m \+ BLOCK_M \+ shift, length_k\)  ->  .*": (
        "further tiles have only keys that are masked"
    ),
    r"attention\._forward_kernel narrower type: tl\.(zeros|full)\(.*tl\.float32\)  ->  .*": _TYPE,
    r"attention\._forward_kernel initial value: tl\.zeros\(\[BLOCK_M\], tl\.float32\)  ->  .*": (
        "the first tile takes l times exp2(-inf) = 0; where there is no tile, acc is 0"
    ),
    r"attention\._forward_kernel number: tl\.where\(l == 0\.0, 1\.0, l\)  ->  .*1\.001, l\)": (
        "acc is 0 where l is 0"
    ),
    r"attention\._forward_kernel arguments swapped: .*, length_k, last, .*"
    r"  ->  .*, last, length_k, .* False, .*": _UNUSED,
    r"attention\._forward_kernel name: .*, length_k, last, .*"
    r"  ->  .*, length_q, last, .* False, .*": _UNUSED,
    r"attention\._forward_kernel flag: .*, False, .*  ->  .*, True, .*": _SLOWER,
    r"attention\._attend condition: if FP32:  ->  if False:": (
        "the order of a sum, which is allowed either way; test_aot.py looks at the compiled kernel"
    ),
    # attention_backward
    r"attention_backward\._d\w+_kernel cast dropped: .*start_[qk]\)\.to\(tl\.int32\)  ->  .*": (
        "the same length in int64"
    ),
    r"attention_backward\._\w+ narrower type: tl\.(zeros|full)\(.*tl\.float32\)  ->  .*": _TYPE,
    r"attention_backward\._dq_kernel (choice|function|statement dropped): .*"
    r"tl\.minimum\(start_m \+ BLOCK_M \+ shift, length_k\)  ->  .*": (
        "further tiles have only keys that are masked"
    ),
    r"attention_backward\._dq_kernel initial value: tl\.zeros\(\[BLOCK_M\], tl\.float32.*": (
        "the first tile takes it times exp2(-inf) = 0; where there is no tile, nobody reads it"
    ),
    r"attention_backward\._dq_kernel number: .*tl\.where\(m_new == float\('-inf'\), 1\.0, .*": (
        "all scores are -inf there, and -inf less any number is -inf"
    ),
    r"attention_backward\._dq_kernel number: .*  ->  tl\.where\(l == 0\.0, 1\.001, l\)": (
        "delta is 0 where l is 0"
    ),
    r"attention_backward\._dkdv_kernel (condition: if start_n >= length_k:  ->  if False:"
    r"|comparison: start_n >= length_k .*)": "keys past the end take time, and are not stored",
    r"attention_backward\._dkdv_kernel choice: tl\.maximum\(start_n - shift, 0\)  ->  0": (
        "earlier queries have p = 0: the same, only slower"
    ),
    # layer_norm
    r"layer_norm\.normalize (arithmetic|operand dropped): .*(centred - rest|- rest \* rest)"
    r"  ->  .*": (
        "what is taken off is the rounding error of a mean, which is seen in rows of equal numbers"
        " alone: test_layer_norm.py has them"
    ),
    r"layer_norm\.normalize choice: tl\.maximum\(var, 0\.0\)  ->  var": (
        "the interpreter divides by N exactly, and then it is not negative; a GPU's / errs by 2 ulp"
    ),
    # layer_norm_backward
    r"layer_norm_backward\._backward_kernel "
    r"(condition: if BLOCK_N == 1:  ->  if False:"
    r"|integer: BLOCK_N == 1  ->  BLOCK_N == [02]"
    r"|statement dropped: dx = tl\.zeros\(\[1\], tl\.float32\)  ->  pass)": (
        "the interpreter makes no product and sum one instruction, so that dx is 0 anyway, as it is"
        " over two columns"
    ),
    r"layer_norm_backward\._\w+ narrower type: tl\.zeros\(.*tl\.float32\)  ->  .*": _TYPE,
    r"layer_norm_backward\._sum_kernel integer: tl\.range\(.*num_stages=.*": (
        "how many loads are on their way changes no number"
    ),
    # linear
    r"linear\._accumulate condition: if MASKED:  ->  if True:": _ALL_TRUE,
    r"linear\._accumulate comparison: x\.dtype == tl\.float32  ->  .*": (
        "the order of a sum, which is allowed either way; test_aot.py looks at the compiled kernel"
    ),
    r"(linear|weight_gradient)\.\w+ precision dropped: "
    r"tl\.dot\(.*, acc, input_precision=PRECISION\)  ->  .*": (
        "exact fp32 does not come here, and Triton's default for the rest is tf32"
    ),
    r"(linear|qkv)\._persistent_kernel cast dropped: .*\.to\(tl\.int32\)  ->  .*": (
        "the interpreter's descriptors take any integer; those of Triton 3.6 are of 32 bits"
    ),
    r"linear\.product flag: _accumulate\(.*, False, .*  ->  .*, True, .*": _ALL_TRUE,
    r"linear\._accumulate number: tl\.load\(.*other=1\.0\)": "past K the other factor is 0",
    r"linear\.product name: .*, start_k, K, False, .*  ->  .*, start_k, (rows|N), .*": _UNUSED,
    r"linear\.product name: _accumulate\(.*, full, K, True, .*  ->  .*BLOCK_[MN]\)": (
        "a longer step is masked past K; the interpreter takes the largest tiles, none shorter"
    ),
    r"linear\.product condition: if REST:  ->  if True:": (
        "a step that is past K altogether adds products of zeros"
    ),
    r"linear\.take_tiles name: tl\.cdiv\(N, BLOCK_N\)  ->  .*BLOCK_[MK]\)": (
        "in the interpreter's tile these are less: tiles past N too, where nothing is stored"
    ),
    r"linear\.take_tiles name: (tl\.cdiv\(rows, BLOCK_M\)  ->  .*BLOCK_K\)"
    r"|range\(0, K, BLOCK_K\)  ->  .*BLOCK_M\))": "in the interpreter's tile they are equal",
    r"linear\.take_tiles flag: tl\.range\(.*flatten=True\)  ->  .*": (
        "how loops are scheduled changes no number"
    ),
    r"linear\._finish_half \w[\w ]*: y \* residual  ->  .*": (
        "linear adds; gelu_gradient multiplies, and its checks know the product"
    ),
    # weight_gradient
    r"weight_gradient\._product_kernel name: .*, parts\) \* BLOCK_T  ->  .*BLOCK_[NK]": (
        "parts of more rows, and some without any: other programs add up the same"
    ),
    r"weight_gradient\._product_kernel (condition: if x\.dtype == tl\.float32 .*  ->  if False:"
    r"|(comparison|narrower type): x\.dtype == tl\.float32  ->  .*)": (
        "the order of a sum, which is allowed either way; test_aot.py looks at the compiled kernel"
    ),
    r"weight_gradient\._\w+ narrower type: tl\.zeros\(\[BLOCK(_N)?\], .*  ->  .*": _TYPE,
    # pointwise
    r"pointwise\.factor_of (conjunct dropped|integer): .* & -8192  ->  .* \+ 4096( & -8191)?": (
        "the tensor core reads no more of a number"
    ),
    r"pointwise\.factor_of integer: .* \+ 4096  ->  .* \+ 409[57]": (
        "but for numbers halfway between two, which test_linear.py has"
    ),
    r"pointwise\.gelu_exp2 number: -0\.00040682035 \* a  ->  -0\.000407.*": _DIGITS,
    r"pointwise\.gelu_exp2 number: .* \* a \+ 0\.0066143439  ->  .* 0\.00662.*": _DIGITS,
    r"pointwise\.gelu_exp2 number: p \* a - 0\.050666305  ->  p \* a - 0\.0507.*": _DIGITS,
    r"pointwise\.gelu_exp2 number: p \* a - 1\.0001055  ->  p \* a - 1\.0": _DIGITS,
    # packing
    r"packing\._count_kernel cast dropped: \(mask != 0\)\.to\(tl\.int32\)  ->  mask != 0": (
        "added to int32, a truth value is 0 or 1"
    ),
    r"packing\._unpack_kernel name: tl\.zeros\(.*\)  ->  .*": (
        "zeros of another type, which the store casts; Triton refuses a branch that changes a type"
    ),
}


# -- all of them ----------------------------------------------------------------------------
def _baseline(name):
    """(what is wrong with the unchanged op, CPU seconds that this took)."""
    (spec,) = (s for s in SPECS if s.name == name)
    started = time.process_time()
    return examine(spec), time.process_time() - started


def _begin():
    """In a worker: one thread, and no numpy warnings about the NaN of wrong kernels."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")


def campaign(mutants, jobs):
    """The verdict on each mutant, in order; raises if an op fails without a mutant."""
    names = list(dict.fromkeys(m.op for m in mutants))
    # Spawned, as a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin) as pool:
        baselines = dict(zip(names, pool.map(_baseline, names)))
        for op, (fault, _) in baselines.items():
            if fault:
                raise RuntimeError(f"check mutants: {op} fails as it is: {fault}")
        futures = [
            pool.submit(verdict, m, seconds=10 + 5 * baselines[m.op][1]) for m in mutants
        ]  # fmt: skip
        futures = track(futures, "mutants", console=Console(stderr=True), transient=True)
        return [future.result() for future in futures]


def problems(mutants, verdicts, every):
    """Problems, in words: survivors without a proof, and proofs that do not hold."""
    for m, v in zip(mutants, verdicts):
        if not v.killed and not m.proof:
            yield f"survives without proof: {describe(m)}"
        if v.killed and m.proof:
            yield f"proved equivalent, yet killed: {describe(m)}: {v.what}"
    for what in PROOFS:
        if not any(re.fullmatch(what, m.change) for m in every):
            yield f"proof of what is no mutant: {what}"


def describe(m):
    return f"{m.place} {m.operator}: {m.before}  ->  {m.after}"


def table(mutants, verdicts, seconds):
    grid = Table(title=f"{len(mutants):,} mutants, {seconds:.0f} s", box=None)
    grid.add_column("op")
    for heading in ("mutants", "killed", "survive"):
        grid.add_column(heading, justify="right")
    grid.add_column("killed by")
    for op in dict.fromkeys(m.op for m in mutants):
        of = [v for m, v in zip(mutants, verdicts) if m.op == op]
        killed = Counter(v.by for v in of if v.killed)
        by = ", ".join(f"{kind} {count}" for kind, count in killed.most_common())
        grid.add_row(op, f"{len(of)}", f"{killed.total()}", f"{len(of) - killed.total()}", by)
    return grid


def add_arguments(parser):
    parser.add_argument("--sample", type=int, metavar="N", help="a sample of N, of every kind")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every verdict there")


def main(options, specs):
    if not INTERPRET:
        sys.exit("check mutants: runs kernels in the interpreter; set TRITON_INTERPRET=1")
    started = time.monotonic()
    console = Console()
    every = [m for s in SPECS for m in mutants_of(s)]
    mutants = [m for m in every if m.op in {s.name for s in specs}]
    if options.sample is not None:
        mutants = sample(mutants, options.sample, options.seed)
    verdicts = campaign(mutants, options.jobs)
    console.print(table(mutants, verdicts, time.monotonic() - started))
    for m, v in zip(mutants, verdicts):
        if not v.killed and m.proof:
            console.print(escape(f"equivalent: {describe(m)}\n  {m.proof}"), soft_wrap=True)
    amiss = list(problems(mutants, verdicts, every))
    for problem in amiss:
        console.print(f"[red]{escape(problem)}[/]", soft_wrap=True)
    if options.json:
        rows = [
            {
                "op": m.op, "kernel": m.kernel, "place": m.place, "operator": m.operator,
                "before": m.before, "after": m.after, "killed": v.killed, "by": v.by,
                "what": v.what, "seconds": round(v.seconds, 3), "proof": m.proof,
            }
            for m, v in zip(mutants, verdicts)
        ]  # fmt: skip
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(bool(amiss))
