"""CUDA graphs: one launch instead of ninety, where those take longer than the GPU's work.

A graph is an encoder's forward recorded once, on tensors at fixed addresses: a call copies its
inputs in, replays, and copies last_hidden_state out. Their shape is that of a bucket: a batch size
and a length, rounded up. The kernels skip what is not a token, so a larger bucket costs little, and
raggedness nothing.

Which calls     on a GPU, without gradients or autocast, of an encoder that does not decode, with a
                mask [B, S] or none, for the usual outputs, in a bucket of at most MAX_TOKENS
                positions. Others run without graphs.
When recorded   at a bucket's second call; the first compiles what runs. Models take turns, as no
                other thread may synchronize the device meanwhile; one that does gets an error, and
                the call runs without a graph. After ATTEMPTS failed recordings in a row, or one
                that ran out of memory, graphs are off until accelerate() is called again.
When dropped    At most LIMIT are kept, of KEPT positions in total. The least recently used is
                evicted once it has not been used for STALE calls: where more sizes recur, some run
                without a graph, as recording takes longer than a forward. All are dropped if a
                weight has moved or a number baked into the recording (eps, scaling) has changed,
                which is noticed at the next call; if memory runs out; by restore().
Memory          one pool for the graphs of a model: what the largest bucket needs for a forward,
                plus each graph's output, at most KEPT rows in total
"""

import collections
import contextlib
import functools
import gc
import logging
import threading
import weakref
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .architectures import at
from .coverage import asked, decodes, is_transformed, reason_of_parts
from .encoder import parameter
from .inputs import Inputs, first_position
from .kernels.launch import fp32_precision
from .seen import seen

MAX_TOKENS = 2**15  # positions; with more, the GPU works longer than the CPU launches
LIMIT = 64  # graphs of a model
KEPT = 2**17  # positions of all graphs of a model
STALE = 1000  # calls of a model
ATTEMPTS = 3  # recordings that may fail

logger = logging.getLogger("bert_fast")


# -- which graph ----------------------------------------------------------------------------
class Bucket(NamedTuple):
    """The calls that one graph serves."""

    B: int
    S: int
    inputs: tuple  # (name, dtype, width or nothing) of each that is given; the mask always is
    tables: tuple  # rows of each embedding, as kernels trap on ids past the recorded table size,
    # and the first one's address: FSDP frees it between calls, when no replay may read it
    fp32_precision: str
    training: tuple | None  # for training graphs: autocast's dtype or None, and whether
    # deterministic algorithms are on


def bucket_of(model, inputs, kwargs, training=None):
    """The Bucket of a call, or None where a graph cannot serve it."""
    x = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
    if torch.is_grad_enabled() != (training is not None) or is_transformed():
        return None
    given = [t for name in COPIED if (t := getattr(inputs, name)) is not None]
    if x is None or not all(isinstance(t, torch.Tensor) for t in given) or x.ndim < 2:
        return None
    if not there_are(x.device):
        return None
    if training is None and torch.is_autocast_enabled(x.device.type):
        return None
    if decodes(model) or asked(model, kwargs, "output_hidden_states"):
        return None
    if asked(model, kwargs, "output_attentions"):
        return None
    B, S = x.shape[:2]
    mask = inputs.attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (B, S)):
        return None
    cross = inputs.encoder_hidden_states, inputs.encoder_attention_mask, inputs.cache
    if any(t is not None for t in cross):
        return None
    kinds = []
    for name in COPIED:
        if (t := getattr(inputs, name)) is not None:
            if t.device != x.device or t.shape[:2] not in ((B, S), (1, S)):
                return None
            kinds.append((name, t.dtype, t.shape[2:]))
    if reason_of_parts(model):
        return None
    tables, most = _tables(model)
    if inputs.position_ids is None and S > most:  # whether that fails depends on the padding
        return None
    rows, columns = _size(B), max(S, min(-(-S // 64) * 64, most))
    if not 0 < rows * columns <= MAX_TOKENS:
        return None
    return Bucket(rows, columns, tuple(kinds), tables, fp32_precision(), training)


COPIED = "input_ids", "inputs_embeds", "token_type_ids", "position_ids"


def _tables(model):
    """(rows of each embedding and the address of the first, how many tokens of a sequence have a
    position), as of now: an id outside a table would trap in the kernel of a stale graph and end
    the process."""
    paths = model.architecture.embeddings
    places = filter(None, (paths.word, paths.position, paths.token_type))
    weights = [parameter(at(model, path), "weight") for path in places]
    rows = [weight.shape[0] for weight in weights]
    place = None if isinstance(weights[0], FakeTensor) else weights[0].data_ptr()
    return (*rows, place), rows[1] - first_position(model)


def _size(B):
    """The next power of two up to 8, then the next multiple of 8."""
    return -(-B // 8) * 8 if B > 8 else 1 << (B - 1).bit_length() if B else 0


# -- one graph ------------------------------------------------------------------------------
class Graph:
    """A forward of model, recorded for a bucket; `inputs` are those of one of its calls."""

    def __init__(self, model, bucket, inputs, pool):
        device = device_of(model)
        with torch.inference_mode(False), torch.no_grad():  # else writable in inference only
            static = self._hold(bucket, inputs, device)
            with drawing_undone(device):
                self.replay, self.last = _record(lambda: model._encode(static)[0], pool, device)

    def _hold(self, bucket, inputs, device):
        """Static inputs in the shape of a bucket, filled with those of a call."""
        B, S = bucket.B, bucket.S
        self.mask = torch.zeros(B, S, dtype=torch.bool, device=device)
        self.inputs = {
            name: torch.zeros(B, S, *width, dtype=dtype, device=device)
            for name, dtype, width in bucket.inputs
        }
        self._shape, self._views = None, {}
        self._write(inputs)
        return Inputs(attention_mask=self.mask, **self.inputs)

    def run(self, inputs):
        """last_hidden_state of a call [B, S, H], in a tensor that the caller owns."""
        shape = self._write(inputs)
        self.replay()
        return self._view(shape, "last").clone(memory_format=torch.contiguous_format)

    def _write(self, inputs):
        """The shape of the call, whose inputs are now where the recording reads them."""
        shape = inputs.shape()
        if shape != self._shape:
            self.mask.zero_()
            self._shape = shape
        if inputs.attention_mask is None:
            self._view(shape, "mask").fill_(True)
        else:
            self._view(shape, "mask").copy_(inputs.attention_mask)
        for name in self.inputs:
            self._view(shape, name).copy_(getattr(inputs, name))
        return shape

    def _view(self, shape, name):
        """What a call of that shape has of a static tensor. Kept: to make one takes 3 us."""
        view = self._views.get((shape, name))
        if view is None:
            if len(self._views) >= 64:  # shapes without end
                self._views.clear()
            B, S = shape
            whole = self.inputs[name] if name in self.inputs else getattr(self, name)
            with torch.inference_mode(False), torch.no_grad():  # else writable in inference only
                view = self._views[shape, name] = whole[:B, :S]
        return view


def device_of(model):
    """Where its weights are; works for a DataParallel replica too, which has no parameters."""
    return at(model, model.architecture.embeddings.word).weight.device


def drawing_undone(device):
    """A call draws the same random numbers as without a graph, even when it is recorded."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# The next seven functions are specific to CUDA.
def there_are(device):
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _new_pool(device):
    """A memory pool for graphs, and the stream to record in: memory is reused only within one."""
    return torch.cuda.graph_pool_handle(), _recording_stream(device)


@functools.cache  # torch hands out 32 streams in rotation, even those that are in use
def _recording_stream(device):
    return torch.cuda.Stream(device)


def _record(forward, pool, device):
    """Record forward() -> tensor: (function that replays it, the tensor that it fills)."""
    pool, stream = pool
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # a stream's first matmul allocates
        torch.cuda.current_stream().wait_stream(stream)
        graph, output = captured(forward, pool, stream)
    return graph.replay, output


def captured(run, pool, stream):
    """(the graph of run(), what it returned). Other threads may still do what a recording forbids
    this one. Garbage collection is off, as destroying a graph would break the capture."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # restored if ending raises
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return graph, run()
    except BaseException:
        _finish_broken_capture(pool, stream)
        raise
    finally:
        if collects:
            gc.enable()


def _finish_broken_capture(pool, stream):
    """Clean up what torch leaves after an invalid capture (pytorch issues 180395, 172390): the
    allocator keeps filling the pool and frees nothing, and random numbers cannot be drawn."""
    try:  # private names, called as torch's inductor does
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    except (AttributeError, RuntimeError):
        return  # nothing to clean up
    number = torch.zeros(1, device=stream.device)
    stream.wait_stream(torch.cuda.current_stream())
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),
    ):
        number.zero_()  # a capture that ends validly




@contextlib.contextmanager
def in_turn(done, device):
    """What is launched inside runs after what was launched inside before, in any stream: after the
    event `done`, if given. Yields the event that is recorded behind it."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        if done is None:
            done = torch.cuda.Event()
        else:
            stream.wait_event(done)
        try:
            yield done
        finally:
            done.record(stream)


# -- the graphs of a model ------------------------------------------------------------------
_recording = threading.Lock()  # shared by all models


class Played(NamedTuple):
    """The result of a replay, before any check."""

    last: torch.Tensor  # last_hidden_state
    recorded: list  # `Graphs._recorded` at that moment


class Graphs:
    """The graphs of one encoder. Threads take turns."""

    def __init__(self):
        self.off = None  # why no more are recorded
        self.is_refused = False  # stock served a call that was played: nothing is, till it does not
        self._lock = threading.RLock()
        self._failures = 0
        self._calls = 0
        self._done = None  # the event after the last replay
        self._forget()

    def _finish_replays(self):
        """Wait: what a replay in another stream uses must not be freed."""
        if self._done is not None:
            self._done.synchronize()

    def _forget(self):
        self._finish_replays()
        self._done = None
        self._graphs = collections.OrderedDict()  # Bucket -> Graph, in the order of use
        self._seen = set()  # buckets that have run without a graph
        self._recorded = None  # what is baked into all graphs, see _burnt_in
        self._of_seen = None  # refers to the Seen of the model at the last comparison
        self._weights = ()  # keeps the memory that graphs read
        self._pool = None

    @property
    def count(self):
        return len(self._graphs)

    def drop(self, why=None):
        """Free all graphs, and record no more if there is a reason why. Returns whether there were
        any."""
        with self._lock:
            there = self.count > 0
            self._forget()
            if why and not self.off:
                self.off = why
                logger.warning("bert_fast: CUDA graphs are off: %s", why)
            return there

    def replay(self, bucket, inputs):
        """Played, if the call's bucket has a graph. Nothing is checked first: the GPU's work hides
        the checks, and `result` decides whether the replay is valid."""
        with self._lock:
            self._calls += 1
            graph = self._graphs.get(bucket)
            if graph is None or self.is_refused:
                return None
            try:
                return Played(self._run(bucket, graph, inputs), self._recorded)
            except torch.OutOfMemoryError as error:
                self.drop(f"out of memory, {error}")
                return None

    def _run(self, bucket, graph, inputs):
        self._graphs[bucket] = graph
        self._graphs.move_to_end(bucket)
        graph.used = self._calls
        with in_turn(self._done, graph.mask.device) as self._done:
            return graph.run(inputs)

    def check(self, model):
        """Drop graphs that no longer match the model, which this call has checked."""
        with self._lock:
            now = seen(model)
            if self._recorded is None or (now is not None and now is referred(self._of_seen)):
                return
            if self._recorded == _burnt_in(model):
                self._of_seen = now and weakref.ref(now)
            else:
                self.drop()

    def result(self, model, bucket, inputs, played):
        """last_hidden_state of a call that the kernels cover: that of the replay, if its graph
        matches the model; else of a new graph; None if none is to be recorded."""
        with self._lock:
            self.is_refused = False
            self.check(model)
            if played is not None and played.recorded is self._recorded:
                return played.last
            if self.off or bucket in self._graphs:  # recorded by another thread meanwhile
                return None
            if bucket not in self._seen:
                self._seen.add(bucket)
                return None
            if not self._make_room(bucket):
                return None
            return self._record(model, bucket, inputs)

    def _make_room(self, bucket):
        """Whether there is room for another graph; a stale one may be evicted for it."""
        while self.count >= LIMIT or sum(b.B * b.S for b in (bucket, *self._graphs)) > KEPT:
            oldest = next(iter(self._graphs), None)
            if oldest is None or self._calls - self._graphs[oldest].used < STALE:
                return False
            self._finish_replays()
            del self._graphs[oldest]
        return True

    def _new_graph(self, model, bucket, inputs):
        return Graph(model, bucket, inputs, self._pool)

    def _record(self, model, bucket, inputs):
        """last_hidden_state of a new graph; None where it could not be recorded."""
        try:
            with _recording:
                self._pool = self._pool or _new_pool(device_of(model))
                graph = self._new_graph(model, bucket, inputs)
        except Exception as error:  # Triton raises classes of its own
            logger.debug("bert_fast: a recording failed", exc_info=True)
            self._failures += 1
            why = f"{type(error).__name__} while recording, {error}"
            over = self._failures == ATTEMPTS or isinstance(error, torch.OutOfMemoryError)
            self.drop(why if over else None)
            return None
        self._failures = 0
        if self._recorded is None:
            now = seen(model)
            self._recorded, self._of_seen = _burnt_in(model), now and weakref.ref(now)
            self._weights = [p.detach() for p in model.parameters()]
        try:
            return self._run(bucket, graph, inputs)
        except torch.OutOfMemoryError as error:
            self.drop(f"out of memory, {error}")
            return None

    def __del__(self):
        if not (self._done and torch.cuda.is_current_stream_capturing()):  # which forbids a wait
            self._finish_replays()


def referred(reference):
    """What a weak reference (or None) refers to, or None."""
    return reference and reference()


NUMBERS = "eps", "scaling", "training", "p", "attention_head_size", "padding_idx"


def _burnt_in(model):
    """What is baked into a recording: the address of each weight, and settings of modules."""
    modules, found = [model], []
    for module in modules:
        state = module.__dict__
        found.append([state.get(name) for name in NUMBERS])
        for p in (*state["_parameters"].values(), *state.values()):
            if isinstance(p, torch.Tensor) and p.layout is torch.strided:
                found.append((p.data_ptr(), p.dtype, p.shape, p.stride()))
        modules += [m for m in state["_modules"].values() if m is not None]
    return found


class OfModels:
    """The graphs of all encoders, of one kind. They are kept outside the models, as a graph belongs
    to one object: not to its copies, nor to DataParallel replicas.

    mark  attribute of encoders for which graphs are turned on, or if marks_off, off. Copies of a
          model have it too, as do models read from a file.
    """

    def __init__(self, kind, mark, marks_off):
        self._kind, self._mark, self._marks_off = kind, mark, marks_off
        self._held = weakref.WeakKeyDictionary()

    def _is_on(self, model):
        return (self._mark in model.__dict__) != self._marks_off

    def of(self, model):
        """The graphs of an encoder, or None where they are off, or torch.compile traces it."""
        if torch.compiler.is_compiling() or not self._is_on(model):
            return None
        return self._held.get(model) or self._held.setdefault(model, self._kind())

    def turn(self, model, on):
        """Turn them on or off for an encoder. Returns whether that changes anything. If recording
        has failed, it may be tried again."""
        failed = model in self._held and self._held[model].off
        if on == self._is_on(model) and not (on and failed):
            return False
        self.forget(model)
        if on != self._marks_off:
            model.__dict__[self._mark] = True
        return True

    def forget(self, model):
        """Return an encoder to the default, without graphs."""
        model.__dict__.pop(self._mark, None)
        if held := self._held.pop(model, None):
            held.drop()


of_inference = OfModels(Graphs, "_bert_fast_no_cuda_graphs", marks_off=True)
graphs_of = of_inference.of
