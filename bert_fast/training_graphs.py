"""CUDA graphs of training: a step's forward and its backward, each one launch instead of hundreds.

A step of base on the kernels launches some 300 times in its forward and backward. Python takes as
long for that as for stock, on a slow host several times as long as the GPU computes. A training
graph is two recordings over the same memory: the encoder's forward, which saves what the backward
needs, and the backward, which computes the gradients of all weights. To autograd both are a single
function. What follows the encoder, the loss and the optimizer run as usual.

Off by default; accelerate(model, training_graphs=True) turns them on: no GPU has timed them yet.

Which calls     those that graphs.py would record, but with gradients, and under autocast too. Not
                with inputs_embeds, gradient checkpointing, hooks on the word embedding or on saved
                tensors, or anomaly detection; nor inside a backward, whose thread the recording of
                another model may be waiting for; nor in a process group, as all gradients arrive at
                once, leaving no computation to overlap their exchange with.
One at a time   Each forward overwrites what the previous one saved. So while an output is alive and
                its backward has not run (two texts per step, an output that is kept), further calls
                run without a graph. A backward with retain_graph may run again until the output is
                gone; without it a second one is an error, as in stock.
Memory          That of stock for the largest bucket, including its padding, plus twice the
                gradients of the encoder's weights. These are returned as views of one tensor:
                keeping one of them keeps all.
When recorded, when dropped   As in graphs.py. train() and eval() drop nothing: training graphs
                are kept apart from the others. All are dropped if other weights are to be trained.
"""

import copy
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

# Whether the running backward has retain_graph=True; private to torch. Assumed true without it.
_keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# The backward that runs in this thread, or -1.
_running = getattr(torch._C, "_current_graph_task_id", lambda: -1)

# The saved-tensor hooks of torch.utils.checkpoint, save_on_cpu and the like, or None.
_saves_elsewhere = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: None
)


def _may_record(model, inputs):
    """Whether a call needs gradients of weights alone, all at its end."""
    return not (
        inputs.inputs_embeds is not None
        or at(model, model.architecture.embeddings.word)._forward_hooks
        or any(map(checkpoints, model.architecture.layers(model)))
        or torch.is_anomaly_enabled()
        or _running() != -1
        or _saves_elsewhere(True) is not None
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


# -- one graph ------------------------------------------------------------------------------
class _Graph(graphs.Graph):
    """A forward and a backward of model, recorded for a bucket. The backward writes the gradients
    of parameters into flat, one after the other."""

    def __init__(self, model, bucket, inputs, pool, parameters, flat):
        self.flat, self._all = flat, parameters
        grads = _parts(flat, parameters)
        # Kept alive: a weight may be given other memory while a backward is still to come.
        model, self._leaves = _on_leaves_of_its_own(model, parameters)
        with torch.inference_mode(False):
            static = self._hold(bucket, inputs, flat.device)
            shape = bucket.B, bucket.S, model.config.hidden_size
            self.dlast = torch.zeros(shape, dtype=flat.dtype, device=flat.device)

            def forward():
                return model._encode(static, static=True)[0]

            def backward(last):
                # Retained, as it may run again: else its results would reuse the memory it reads.
                found = torch.autograd.grad(
                    last, self._leaves, self.dlast, retain_graph=True, allow_unused=True
                )
                self._used = [i for i, d in enumerate(found) if d is not None]
                torch._foreach_copy_([grads[i] for i in self._used], [found[i] for i in self._used])

            with drawing_undone(flat.device):
                recorded = _record(forward, backward, pool, flat.device)
        self.parameters = [parameters[i] for i in self._used]  # those that get a gradient
        self.replay, self.replay_backward, last = recorded
        self.last = last.detach()

    def run_backward(self, dlast):
        """The gradient of each of parameters, in tensors that the caller owns."""
        self._view(tuple(dlast.shape[:2]), "dlast").copy_(dlast)  # the rest of it is padding
        self.replay_backward()
        grads = _parts(self.flat.clone(), self._all)
        return [grads[i] for i in self._used]


def _on_leaves_of_its_own(model, parameters):
    """(a copy of the model's modules that uses other leaves in place of parameters, in the same
    memory; these leaves).

    autograd remembers the stream in which it first saw a leaf, as long as any output of it is
    alive, and synchronizes streams when a backward reaches the leaf. If the loss of an earlier step
    is still alive, that is not the stream of the recording, which would therefore fail."""
    leaves = {p: p.detach().requires_grad_() for p in parameters}

    def copied(module):
        twin = copy.copy(module)
        twin._parameters = {name: leaves.get(p, p) for name, p in module._parameters.items()}
        twin._modules = {name: m and copied(m) for name, m in module._modules.items()}
        return twin

    return copied(model), list(leaves.values())


def _parts(flat, tensors):
    """Views of flat, one after the other, in the shapes of tensors."""
    return torch._utils._unflatten_dense_tensors(flat, tensors)


# Apart from those in graphs.py, the only function specific to CUDA.
def _record(forward, backward, pool, device):
    """Record forward() -> tensor and backward(tensor): what replays each, and the tensor."""
    pool, stream = pool
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backward(forward())  # compiles, and a stream's first matmul allocates
        torch.cuda.current_stream().wait_stream(stream)
        of_forward, last = captured(forward, pool, stream)
        of_backward, _ = captured(lambda: backward(last), pool, stream)
    return of_forward.replay, of_backward.replay, last


# -- a step ---------------------------------------------------------------------------------
class _Step:
    """A replayed forward, until its backward has run."""

    def __init__(self, graphs, graph):
        self.graphs, self.graph = graphs, graph
        self.weights = graphs._listed  # the backward reads what is not trained, too
        self.versions = self._versions_now()
        self.is_done = False

    def _versions_now(self):
        return [None if t.is_inference() else t._version for t in self.weights]

    def backward(self, dlast):
        if self.is_done:
            raise RuntimeError(
                "bert_fast: what this backward needs is gone, as a backward has run before;"
                " give the first retain_graph=True"
            )
        if self._versions_now() != self.versions:
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
        self._listed = self._of_listed = None  # a model's parameters, and its Seen at the time
        self._trained = []  # the trained ones
        self._flat = None  # their gradients
        self._step = None  # a weak reference to the last one

    def forward(self, model, inputs, kwargs):
        """last_hidden_state of a call that the kernels cover; None if no graph is to compute it."""
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
        """Whether there are weights to train, all of one dtype. Drops graphs that train others."""
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
    """The encoder's tensors, without the pooler's; also those that stand in for a weight."""
    found = []
    for module in (m for part in parts_of(model) for m in part.modules()):
        found += [*module._parameters.values(), *module.__dict__.values()]
    return list(dict.fromkeys(t for t in found if isinstance(t, torch.Tensor)))


of_training = OfModels(TrainingGraphs, "_bert_fast_training_graphs", marks_off=False)
training_graphs_of = of_training.of
