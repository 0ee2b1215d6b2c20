"""CUDA graphs: one launch in place of ninety, where those take longer than the GPU's work.

A graph is an encoder's forward recorded once, on tensors that stay where they are: a call copies
its inputs in, replays, and copies last_hidden_state out. Their shape is that of a bucket: a batch
and a length, rounded up. The kernels skip what is not a token, so a larger bucket costs little, and
raggedness nothing.

Which calls     on a GPU, without gradients or autocast, of an encoder that does not decode, with a
                mask [B, S] or none, for the usual outputs, in a bucket of MAX_TOKENS positions at
                most. Others run as without graphs.
When recorded   at a bucket's second call; the first compiles what runs
When dropped    LIMIT are kept, of KEPT positions in all; the least recently used goes. All go where
                weights are elsewhere than they were or a number in the recording (eps, scaling) has
                changed, which is seen at the next call; where memory runs out; by `.to()` and
                restore().
Memory          one pool for the graphs of a model: what the largest bucket needs for a forward, and
                for each graph its output, of KEPT rows in all at most
"""

import collections
import contextlib
import logging
import threading
import weakref
from typing import NamedTuple

import torch

from .coverage import asked, decodes
from .inputs import Inputs, room

MAX_TOKENS = 2**15  # positions; with more, the GPU works longer than the CPU launches
LIMIT = 16  # graphs of a model
KEPT = 2**17  # positions of all graphs of a model
NAME = "_bert_fast_no_cuda_graphs"  # of the mark on an encoder for which they are turned off

logger = logging.getLogger("bert_fast")


# -- which graph ----------------------------------------------------------------------------
class Bucket(NamedTuple):
    """The calls that one graph serves."""

    B: int
    S: int
    inputs: tuple  # (name, dtype, width or nothing) of each that is given; the mask always is
    allow_tf32: bool


def bucket_of(model, inputs, kwargs):
    """The Bucket of a call, or None where a graph cannot serve it."""
    x = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
    if torch.is_grad_enabled() or x is None or x.ndim < 2:
        return None
    if not there_are(x.device) or torch.is_autocast_enabled(x.device.type):
        return None
    if decodes(model) or asked(model, kwargs, "output_hidden_states"):
        return None
    B, S = x.shape[:2]
    mask = inputs.attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (B, S)):
        return None
    tensors = inputs._replace(attention_mask=None)._asdict().items()
    given = [(name, t) for name, t in tensors if t is not None and name != "use_cache"]
    for name, t in given:
        if name not in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
            return None
        if t.device != x.device or t.shape[:2] not in ((B, S), (1, S)):
            return None
    rows, columns = _size(B), max(S, min(-(-S // 64) * 64, room(model)))
    if not 0 < rows * columns <= MAX_TOKENS:
        return None
    kinds = tuple((name, t.dtype, t.shape[2:]) for name, t in given)
    return Bucket(rows, columns, kinds, torch.backends.cuda.matmul.allow_tf32)


def _size(B):
    """The next power of two up to 8, then the next multiple of 8."""
    return -(-B // 8) * 8 if B > 8 else 1 << (B - 1).bit_length() if B else 0


# -- one graph ------------------------------------------------------------------------------
class _Graph:
    """A forward of model, recorded for a bucket; `inputs` are like those of its calls."""

    def __init__(self, model, bucket, inputs, pool):
        device = model.device
        B, S = bucket.B, bucket.S
        with torch.inference_mode(False), torch.no_grad():  # else only inference could write them
            self.mask = torch.zeros(B, S, dtype=torch.bool, device=device)
            self.inputs = {
                name: torch.zeros(B, S, *width, dtype=dtype, device=device)
                for name, dtype, width in bucket.inputs
            }
            static = Inputs(attention_mask=self.mask, **self.inputs)
            self._write(inputs)
            self.replay, self.last = _record(lambda: model._encode(static)[0], pool, device)

    def run(self, inputs):
        """last_hidden_state of a call [B, S, H]: a tensor of the caller's own."""
        B, S = self._write(inputs)
        self.replay()
        return self.last[:B, :S].clone(memory_format=torch.contiguous_format)

    def _write(self, inputs):
        B, S = inputs.shape()
        if (B, S) != self.mask.shape:
            self.mask.zero_()
        if inputs.attention_mask is None:
            self.mask[:B, :S] = True
        else:
            self.mask[:B, :S] = inputs.attention_mask
        for name, t in self.inputs.items():
            t[:B, :S] = getattr(inputs, name)
        return B, S


# The next four are all that is CUDA's own.
def there_are(device):
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _new_pool():
    return torch.cuda.graph_pool_handle()


def _record(forward, pool, device):
    """forward() -> tensor as a graph: (function that replays it, the tensor that it fills)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # a stream's first product of matrices allocates
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what a recording forbids.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = forward()
    return graph.replay, output


@contextlib.contextmanager
def _in_turn(done, device):
    """The GPU takes what is launched here after what was launched here before, in any stream."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        if done:
            stream.wait_event(done[0])
        else:
            done.append(torch.cuda.Event())
        yield
        done[0].record(stream)


# -- the graphs of a model ------------------------------------------------------------------
class Graphs:
    """The graphs of one encoder. Threads take turns."""

    def __init__(self):
        self.off = None  # why no more are recorded
        self._lock = threading.RLock()
        self._done = []  # the event of the last replay
        self._forget()

    def _forget(self):
        for event in self._done:
            event.synchronize()  # what a replay in another stream uses must not be freed under it
        self._graphs = collections.OrderedDict()  # Bucket -> _Graph, in the order of use
        self._seen = set()  # buckets that have run without a graph
        self._recorded = None  # what is the same in all graphs, as _burnt_in has it
        self._weights = ()  # keeps the memory that they read
        self._pool = None

    @property
    def count(self):
        return len(self._graphs)

    def drop(self, why=None):
        """Free all graphs, and record no more if there is a reason why; whether there were any."""
        with self._lock:
            there = self.count > 0
            self._forget()
            if why and not self.off:
                self.off = why
                logger.warning("bert_fast: CUDA graphs are off: %s", why)
            return there

    def replay(self, bucket, inputs):
        """last_hidden_state, if the call's bucket has a graph; right if then `hold` says so.
        Nothing is checked before: the GPU's work hides the checks."""
        with self._lock:
            graph = self._graphs.get(bucket)
            if graph is None:
                return None
            self._graphs.move_to_end(bucket)
            try:
                with _in_turn(self._done, graph.mask.device):
                    return graph.run(inputs)
            except torch.OutOfMemoryError as error:
                self.drop(f"out of memory, {error}")
                return None

    def hold(self, model):
        """Whether the graphs are still those of model as it is. Those that are not are dropped."""
        with self._lock:
            if self._graphs and self._recorded != _burnt_in(model):
                self.drop()
            return self.count > 0

    def record(self, model, bucket, inputs):
        """last_hidden_state from a new graph, of a call that the kernels cover; None where there is
        to be none: at a bucket's first call, or as recording failed."""
        with self._lock:
            if self.off:
                return None
            if not self.hold(model):
                self._recorded = _burnt_in(model)
                self._weights = [p.detach() for p in model.parameters()]
            if bucket not in self._seen:
                self._seen.add(bucket)
                return None
            try:
                self._pool = self._pool or _new_pool()
                graph = _Graph(model, bucket, inputs, self._pool)
                with _in_turn(self._done, graph.mask.device):
                    last = graph.run(inputs)
            except RuntimeError as error:  # out of memory too
                self.drop(f"{type(error).__name__} while recording, {error}")
                return None
            self._graphs[bucket] = graph
            while self.count > LIMIT or sum(b.B * b.S for b in self._graphs) > KEPT:
                self._graphs.popitem(last=False)
            return last


def _burnt_in(model):
    """What a graph has in it as a number: where each weight is, and settings of modules."""
    modules, found = [model], []
    for module in modules:
        state = module.__dict__
        found.append((state.get("eps"), state.get("scaling")))
        for p in state["_parameters"].values():
            if p is not None:
                found.append((p.data_ptr(), p.dtype))
        modules += [m for m in state["_modules"].values() if m is not None]
    return found


# Beside the models, as a graph is of one object: not of its copies, nor of DataParallel's replicas.
_of_models = weakref.WeakKeyDictionary()


def turn(model, on):
    """Turn graphs on or off for an encoder; whether that changes anything."""
    if on == (NAME not in model.__dict__):
        return False
    forget(model)
    if not on:
        model.__dict__[NAME] = True
    return True


def forget(model):
    """As of an encoder that nobody has turned them off for, and that has none."""
    model.__dict__.pop(NAME, None)
    _of_models.pop(model, None)


def graphs_of(model):
    """The Graphs of an encoder, or None where they are turned off, or torch.compile traces it."""
    if torch.compiler.is_compiling() or NAME in model.__dict__:
        return None
    return _of_models.get(model) or _of_models.setdefault(model, Graphs())
