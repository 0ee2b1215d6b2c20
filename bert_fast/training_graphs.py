"""CUDA graphs of training: a step's forward and its backward, each one launch in place of hundreds.

A step of base on the kernels launches some 300 times in its forward and backward, and Python takes
as long for that as for stock, on a slow host several times as long as the GPU computes. A graph of
training is two recordings over the same memory: the encoder's forward, which leaves what the
backward needs, and the backward, which leaves the gradients of all weights. To autograd both are
one function. What comes after the encoder, the loss and the optimizer run as ever.

Off until somebody asks, accelerate(model, training_graphs=True): no GPU has timed them yet.

Which calls     those that graphs.py would record, but with gradients, under autocast too. Not of
                inputs_embeds that want gradients; not with gradient checkpointing, hooks on the
                word embedding or on what autograd saves, or anomaly detection; and not in a process
                group, as all gradients come at once, and leave nothing to hide their exchange
                behind.
One at a time   What a forward left is overwritten by the next. So while the output of one is alive
                and its backward has not run (two texts a step, an output that is kept), further
                calls run without a graph. A backward that keeps its graph may run again until the
                output is gone; another is an error, as it is without.
Memory          As stock's, of the largest bucket, whose padding is stored: bucket and not tokens;
                and twice that of the gradients of the encoder's weights. These come as views of one
                tensor: who keeps one of them keeps all.
When recorded, when dropped   As in graphs.py. train() and eval() drop nothing: graphs of training
                are beside the others. All go where other weights are to be trained.
"""

import weakref
from functools import partial

import torch

from . import graphs
from .architectures import at
from .coverage import parts_of
from .encoder import autocast_dtype, checkpoints
from .graphs import Graphs, OfModels, bucket_of, captured, device_of, drawing_undone, referred
from .kernels.launch import once_differentiable
from .seen import seen

# Whether the backward that runs was told to keep its graph; private to torch, without which it may.
_keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


# What torch.utils.checkpoint, save_on_cpu and the like have put on what autograd saves, or None.
_saves_elsewhere = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: None
)


def _may_record(model, inputs):
    """Whether the gradients of a call are those of weights alone, wanted at its end."""
    embeds, word = inputs.inputs_embeds, at(model, model.architecture.embeddings.word)
    return not (
        (isinstance(embeds, torch.Tensor) and embeds.requires_grad)
        or word._forward_hooks
        or any(map(checkpoints, model.architecture.layers(model)))
        or torch.is_anomaly_enabled()
        or _saves_elsewhere(True) is not None
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


# -- one graph ------------------------------------------------------------------------------
class _Graph(graphs.Graph):
    """A forward and a backward of model, recorded for a bucket. The backward leaves the gradients
    of parameters in flat, one after the other."""

    def __init__(self, model, bucket, inputs, pool, parameters, flat):
        self.flat, self._all = flat, parameters
        grads = _parts(flat, parameters)
        # Kept, as whoever gives a weight other memory does not know of the backward to come.
        encode, self._leaves = _on_leaves_of_its_own(model, parameters)
        with torch.inference_mode(False):
            static = self._hold(bucket, inputs, flat.device)
            shape = bucket.B, bucket.S, model.config.hidden_size
            self.dlast = torch.zeros(shape, dtype=flat.dtype, device=flat.device)

            def forward():
                return encode(static)

            def backward(last):
                # Kept, as it may run again: else what it has read makes room for what it computes.
                found = torch.autograd.grad(
                    last, self._leaves, self.dlast, retain_graph=True, allow_unused=True
                )
                self._used = [i for i, d in enumerate(found) if d is not None]
                torch._foreach_copy_([grads[i] for i in self._used], [found[i] for i in self._used])

            with drawing_undone(flat.device):
                recorded = _record(forward, backward, pool, flat.device)
        self.parameters = [parameters[i] for i in self._used]  # that get a gradient
        self.replay, self.replay_backward, last = recorded
        self.last = last.detach()

    def run_backward(self, dlast):
        """The gradient of each of parameters: tensors of the caller's own."""
        B, S = dlast.shape[:2]
        self.dlast[:B, :S] = dlast  # of what else is there nothing is a token
        self.replay_backward()
        grads = _parts(self.flat.clone(), self._all)
        return [grads[i] for i in self._used]


class _Encoding(torch.nn.Module):
    """The encoder's forward as that of a module, as functional_call wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model._encode(inputs, static=True)[0]


def _on_leaves_of_its_own(model, parameters):
    """(forward of Inputs, tensors in place of the parameters there, in the same memory).

    autograd keeps with a leaf the stream in which it first met it, as long as any output of it is
    alive, and makes streams wait for each other where a backward comes to the leaf. That of a step
    before, whose loss is still at hand, is no stream of a recording, which would fail for it."""
    names = {id(p): f"model.{name}" for name, p in model.named_parameters()}
    leaves = [p.detach().requires_grad_() for p in parameters]
    given = {names[id(p)]: leaf for p, leaf in zip(parameters, leaves)}
    encoding = _Encoding(model)
    return lambda inputs: torch.func.functional_call(encoding, given, (inputs,)), leaves


def _parts(flat, tensors):
    """Views of flat, one after the other, in the shapes of tensors."""
    return torch._utils._unflatten_dense_tensors(flat, tensors)


# Beside those in graphs.py, this is all that is CUDA's own.
def _record(forward, backward, pool, device):
    """forward() -> tensor and backward(tensor) as graphs: what replays each, and the tensor."""
    pool, stream = pool
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backward(forward())  # compiles, and a stream's first product of matrices allocates
        torch.cuda.current_stream().wait_stream(stream)
        of_forward, last = captured(forward, pool, stream)
        of_backward, _ = captured(lambda: backward(last), pool, stream)
    return of_forward.replay, of_backward.replay, last


# -- a step ---------------------------------------------------------------------------------
class _Step:
    """A forward that was replayed, until its backward."""

    def __init__(self, graphs, graph):
        self.graphs, self.graph = graphs, graph
        self.versions = [p._version for p in graph.parameters]
        self.is_done = False

    def backward(self, dlast):
        if self.is_done:
            raise RuntimeError(
                "bert_fast: what this backward needs is gone, as a backward has run before;"
                " give the first retain_graph=True"
            )
        if [p._version for p in self.graph.parameters] != self.versions:
            raise RuntimeError(
                "bert_fast: a weight has been written to since the forward whose gradients are"
                " asked for; step the optimizer after the backward"
            )
        grads = self.graphs.run_backward(self.graph, dlast)
        self.is_done = not _keeps()
        return grads


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, run, *parameters):
        ctx.step = step
        return run()

    @staticmethod
    @partial(once_differentiable, sources=lambda ctx: ctx.step.graph.parameters)
    def backward(ctx, dlast):
        return None, None, *ctx.step.backward(dlast)


# -- the graphs of a model ------------------------------------------------------------------
class TrainingGraphs(Graphs):
    """The graphs of one encoder's training."""

    def _forget(self):
        super()._forget()
        self._listed = self._of_listed = None  # the parameters of a model, and its Seen then
        self._trained = []  # those that are trained
        self._flat = None  # their gradients
        self._step = None  # a weak reference to the last one

    def forward(self, model, inputs, kwargs):
        """last_hidden_state of a call that the kernels cover; None where no graph is to give it."""
        if self.off or not _may_record(model, inputs):
            return None
        with self._lock:
            step = self._step and self._step()
            if step is not None and not step.is_done:
                return None
            self.check(model)
            how = autocast_dtype(device_of(model)), torch.are_deterministic_algorithms_enabled()
            bucket = bucket_of(model, inputs, kwargs, how)
            if bucket is None or not self._take_stock(model):
                return None
            graph = self._graphs.get(bucket)
            self._calls += 1
            try:
                if graph is None:
                    return self.result(model, bucket, inputs, None)
                return self._run(bucket, graph, inputs)
            except torch.OutOfMemoryError as error:
                self.drop(f"out of memory, {error}")
                return None

    def _take_stock(self, model):
        """Whether there are weights to train, of one dtype. Graphs that train others go."""
        now = seen(model)
        if now is None or now is not referred(self._of_listed):
            self._listed, self._of_listed = _weights_of(model), now and weakref.ref(now)
        trained = [p for p in self._listed if p.requires_grad]
        if list(map(id, trained)) != list(map(id, self._trained)):
            self.drop()
            self._trained = trained
        return len({p.dtype for p in trained}) == 1 and all(map(_is_parameter, trained))

    def _new_graph(self, model, bucket, inputs):
        if self._flat is None:
            self._flat = torch.empty(
                sum(p.numel() for p in self._trained),
                dtype=self._trained[0].dtype, device=self._trained[0].device,
            )  # fmt: skip
        return _Graph(model, bucket, inputs, self._pool, self._trained, self._flat)

    def _run(self, bucket, graph, inputs):
        step = _Step(self, graph)
        self._step = weakref.ref(step)
        run = super()._run
        return _Replayed.apply(step, lambda: run(bucket, graph, inputs), *graph.parameters)

    def run_backward(self, graph, dlast):
        with self._lock, graphs.in_turn(self._done, dlast.device) as self._done:
            return graph.run_backward(dlast)


def _is_parameter(t):
    return isinstance(t, torch.nn.Parameter)


def _weights_of(model):
    """What the encoder reads, and the pooler does not; also what stands in a weight's place."""
    found = []
    for module in (m for part in parts_of(model) for m in part.modules()):
        found += [*module._parameters.values(), *module.__dict__.values()]
    return list(dict.fromkeys(t for t in found if isinstance(t, torch.Tensor)))


of_training = OfModels(TrainingGraphs, "_bert_fast_training_graphs", marks_off=False)
training_graphs_of = of_training.of
