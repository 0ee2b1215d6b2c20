"""What the models are run with: stock in every form that people use, and ours."""

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from measure import Skip, captured
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from workloads import Contender

import bert_fast
from bert_fast.kernels import launch

BACKENDS = {  # of F.scaled_dot_product_attention, and the devices that have them
    "math": (SDPBackend.MATH, ("cpu", "cuda")),
    "flash": (SDPBackend.FLASH_ATTENTION, ("cpu", "cuda")),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, ("cuda",)),
}


def needs(*packages):
    """Raise Skip unless all are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed")


def forced(backend, device, run):
    """run with one backend of sdpa alone. Raises Skip where that does not take these inputs."""
    choice, devices = BACKENDS[backend]
    if device.type not in devices:
        raise Skip(f"sdpa has no {backend} backend on {device.type}")

    def forced_run(*args, **kwargs):
        try:
            with sdpa_kernel(choice):
                return run(*args, **kwargs)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Skip(f"sdpa's {backend} backend does not take these inputs") from None
            raise

    return forced_run


def varlen_kernel(device, dtype):
    """FlashAttention's kernel for packed sequences, and a word on whose build it is.

    kernel(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen) takes and returns [T, heads, D].
    """
    if device.type != "cuda":
        raise Skip("FlashAttention runs on a GPU alone")
    if dtype not in (torch.float16, torch.bfloat16):
        raise Skip("FlashAttention takes fp16 and bf16 alone")
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func, f"flash-attn {metadata.version('flash_attn')}"
    needs("torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, f"torch.nn.attention.varlen of torch {torch.__version__}"


# -- forwards: batch -> hidden states [B, S, H] ---------------------------------------------
def stock(problem, implementation):
    """A copy of the model on one of transformers' attention implementations."""
    model = copy.deepcopy(problem.subject)
    model.set_attn_implementation(implementation)
    return model


def _hidden(model):
    def forward(**batch):
        return model(**batch).last_hidden_state

    forward.model = model  # whose parameters a training step changes
    return forward


def _eager(problem):
    return _hidden(stock(problem, "eager"))


def _sdpa(problem):
    return _hidden(stock(problem, "sdpa"))


def _graphed_sdpa(problem):
    """Stock as a CUDA graph for each shape of input, as who knows the shapes would serve it."""
    if problem.subject.device.type != "cuda":
        raise Skip("CUDA graphs are for GPUs")
    return graphed(problem, lambda run: captured(run, torch.cuda.current_stream()))


def graphed(problem, capture):
    """The model behind capture(run) -> (replay, what that fills), once for each shape.

    Whether there is padding is known beforehand: stock waits for the GPU to ask. A mask has four
    dimensions, with which stock does not ask. Without padding the attention is one that has no
    mask: of none, transformers 5.17 makes one while it is captured, which rules out flash.
    """
    batches = (*problem.timed, *problem.checked)
    padded = not all(batch["attention_mask"].all() for batch in batches)
    ALL_ATTENTION_FUNCTIONS.register("bench_unmasked", _unmasked)
    model = stock(problem, "sdpa" if padded else "bench_unmasked")
    recorded = {}

    def forward(input_ids, attention_mask):
        seen = attention_mask[:, None, None].bool()  # [B, 1, 1, S]
        if (shape := input_ids.shape) not in recorded:
            ids, mask = input_ids.clone(), seen.clone()
            wide = mask.expand(-1, -1, shape[1], -1) if padded else None
            run = partial(model, input_ids=ids, attention_mask=wide)
            recorded[shape] = ids, mask, *capture(run)
        ids, mask, replay, result = recorded[shape]
        ids.copy_(input_ids)
        mask.copy_(seen)
        replay()
        return result.last_hidden_state.clone()

    return forward


def _unmasked(module, q, k, v, mask, *, scaling=None, dropout=0.0, **_):
    """transformers' sdpa for an encoder without padding, whatever its mask is."""
    o = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
    return o.transpose(1, 2).contiguous(), None


def _forced_sdpa(backend, problem):
    return forced(backend, problem.subject.device, _sdpa(problem))


def _flex(problem):
    """FlexAttention, which skips the blocks of keys that are all padding."""
    return _hidden(stock(problem, "flex_attention"))


def _unpadded(problem):
    """Stock without padding, from the embedding to the last layer, on FlashAttention."""
    return unpadded(problem, *varlen_kernel(problem.subject.device, problem.subject.dtype))


def unpadded(problem, kernel, implementation):
    """The model on tokens alone; finding them, and putting padding back, are part of a call."""

    def attend(module, q, k, v, mask, *, cu_seq_lens_q, max_length_q, **_):
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # [T, heads, D]
        o = kernel(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return o[None], None

    # A name without "flash", to which transformers would add checks of its own.
    ALL_ATTENTION_FUNCTIONS.register("bench_packed", attend)
    model = stock(problem, "bench_packed")

    def forward(input_ids, attention_mask):
        lengths = attention_mask.sum(1)
        rows = attention_mask.flatten().nonzero().flatten()
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = model(
            input_ids=input_ids.flatten()[rows][None],
            position_ids=positions.expand_as(input_ids).flatten()[rows][None],
            cu_seq_lens_q=cu_seqlens,
            max_length_q=int(lengths.max()),
        ).last_hidden_state[0]
        padded = hidden.new_zeros(input_ids.numel(), hidden.shape[1])
        padded[rows] = hidden
        return padded.view(*input_ids.shape, -1)

    forward.implementation, forward.model = implementation, model
    return forward


def _compiled(problem, mode=None):
    on_gpu = problem.subject.device.type == "cuda"
    if mode and not on_gpu:
        raise Skip(f"{mode} is for GPUs")
    model = torch.compile(
        stock(problem, "sdpa"), fullgraph=True, dynamic=not problem.static, mode=mode
    )

    def forward(**batch):
        torch.compiler.cudagraph_mark_step_begin()  # the results of earlier batches may go
        return model(**batch).last_hidden_state

    forward.model = model
    return forward


def _ours(problem, **options):
    on_gpu = problem.subject.device.type == "cuda"
    if not on_gpu and options.keys() & {"cuda_graphs", "training_graphs"}:
        raise Skip("CUDA graphs are for GPUs")
    if "frozen" in options and on_gpu:
        raise Skip("frozen weights make no difference on a GPU")
    model = bert_fast.accelerate(copy.deepcopy(problem.subject), **options)
    if reason := bert_fast.report(model).swapped[0].reason:
        raise Skip(f"would run the stock forward: {reason}")
    return _hidden(model)


def _dependent(problem):
    """Ours, whose kernels may start while the one before each ends."""
    if problem.subject.device.type != "cuda" or not launch.depends(launch.arch()):
        raise Skip("dependent launches need an NVIDIA GPU of sm_90 or newer")
    run = _ours(problem)

    def forward(**batch):
        launch.DEPENDENT = True
        try:
            return run(**batch)
        finally:
            launch.DEPENDENT = False

    forward.model = run.model
    return forward


# -- onnxruntime ----------------------------------------------------------------------------
def _onnxruntime(problem):
    """The exported model with onnxruntime's own fusions, on as many threads as torch has."""
    needs("onnxruntime", "onnxscript")
    import onnxruntime

    device = problem.subject.device
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device.type]
    if provider not in onnxruntime.get_available_providers():
        raise Skip(f"this onnxruntime has no {provider}; onnxruntime-gpu has")
    if problem.subject.dtype == torch.bfloat16:
        raise Skip("onnxruntime's inputs and outputs are numpy's, which has no bf16")
    names = ("input_ids", "attention_mask")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on while the next contender runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            stock(problem, "sdpa"), kwargs=problem.checked[0], f=path, dynamo=True,
            dynamic_shapes=dict.fromkeys(names, sizes), external_data=True, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise Skip(f"onnxruntime could not start its {provider}")
    output = session.get_outputs()[0].name

    def on_cpu(**arrays):
        return torch.from_numpy(session.run([output], arrays)[0])

    def on_gpu(**batch):
        """Inputs and output stay on the GPU."""
        binding = session.io_binding()
        for name in names:
            t = batch[name]
            binding.bind_input(name, "cuda", 0, "int64", list(t.shape), t.data_ptr())
        hidden = batch["input_ids"].new_empty(
            *batch["input_ids"].shape, problem.subject.config.hidden_size,
            dtype=problem.subject.dtype,
        )  # fmt: skip
        kind = {torch.float32: "float32", torch.float16: "float16"}[hidden.dtype]
        binding.bind_output(output, "cuda", 0, kind, list(hidden.shape), hidden.data_ptr())
        torch.cuda.current_stream().synchronize()  # it runs on a stream of its own
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return hidden

    def bind(batches):
        if device.type == "cuda":
            return lambda: [on_gpu(**batch) for batch in batches]
        arrays = [{name: batch[name].numpy() for name in names} for batch in batches]
        return lambda: [on_cpu(**a) for a in arrays]

    bind.implementation = f"{provider} of onnxruntime {onnxruntime.__version__}"
    return bind


# -- the lists ------------------------------------------------------------------------------
def bound(forward):
    """forward for each batch, as a contender binds it."""

    def bind(batches):
        return lambda: [forward(**batch) for batch in batches]

    bind.implementation = getattr(forward, "implementation", None)
    return bind


COMPARED = 256  # sequences of a batch, at most: more of them in fp64 would fill a GPU


def at_tokens(result, batches):
    """Hidden states of the tokens: what a model computes for padding has no meaning."""
    return [
        h[:COMPARED][batch["attention_mask"][:COMPARED].bool()]
        for h, batch in zip(result, batches, strict=True)
    ]


@dataclass(frozen=True)
class Model:
    """A way to run the model: for inference, and, if it can be differentiated, for training."""

    name: str
    forward: Callable  # problem -> forward(input_ids, attention_mask)
    infers: bool = True
    trains: bool = False
    warm_ups: int = 0  # steps before the one whose gradients are checked
    drops: bool = True  # probabilities too, where modules have a dropout
    slow: bool = False

    def inference(self):
        build = lambda problem: bound(self.forward(problem))  # noqa: E731
        return Contender(self.name, build, at_tokens, slow=self.slow)


MODELS = (
    Model("stock sdpa", _sdpa, trains=True),
    Model("stock eager", _eager, trains=True),
    Model("stock sdpa, CUDA graphs", _graphed_sdpa),
    *(Model(f"sdpa {backend}", partial(_forced_sdpa, backend)) for backend in BACKENDS),
    Model("FlashAttention unpadded", _unpadded, trains=True, drops=False),
    Model("flex_attention", _flex, slow=True),
    Model("torch.compile", _compiled, trains=True, slow=True),
    Model(
        "torch.compile reduce-overhead", partial(_compiled, mode="reduce-overhead"), slow=True
    ),
    Model("torch.compile max-autotune", partial(_compiled, mode="max-autotune"), slow=True),
    Model("ours, without graphs", partial(_ours, cuda_graphs=False)),
    Model("ours, dependent launches", _dependent),
    Model("ours, frozen", partial(_ours, frozen=True)),
    Model(
        "ours, training graphs", partial(_ours, training_graphs=True),
        infers=False, trains=True, warm_ups=2,
    ),
    Model("ours", _ours, trains=True),
)  # fmt: skip
SDPA, OURS = (next(m for m in MODELS if m.name == name) for name in ("stock sdpa", "ours"))
ONNXRUNTIME = Contender("onnxruntime", _onnxruntime, at_tokens)
INFERENCE = (
    *(m.inference() for m in MODELS if m.infers and m is not OURS), ONNXRUNTIME, OURS.inference()
)  # fmt: skip
