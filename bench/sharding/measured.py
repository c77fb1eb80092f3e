"""The memory of a policy in training, measured: real modules, real sharding and real steps on tensors without data.

Under ``FakeTensorMode`` every operation runs but computes shapes alone, and under the fake process group a process
takes part in collectives of any number of processes that are not there: so one process without a GPU sees what each of
64 holds. Nothing is assumed about the policy: it is built by transformers and peft, cut by the package's plan and
trained by the package's forward pass, autograd and AdamW. The bytes are those of live storages, sorted by what they
are for (``torch.distributed._tools``). The same code measures real tensors in a real process group (``fake=False``).
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from bench.combiners.memory import MemoryTracker, peak_bytes
from bench.sharding.closed_form import RANK, Work
from moa_lightning.functional.logprobs import token_logprobs
from moa_lightning.models import AdapterOff, FrozenCopy, Policy, Reference, ValueHeads
from moa_lightning.models.loading import disable_dropout
from moa_lightning.models.sharding import Mesh, ShardingPlan, replicated

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """How processes share a model."""

    processes: int
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Processes that share one copy."""
        return self.processes // self.replicas

    @property
    def name(self) -> str:
        """Of a column."""
        return f"{self.replicas} x {self.shards}" if self.replicas > 1 else str(self.processes)

    def mesh(self) -> Mesh:
        """On the CPU."""
        if self.replicas > 1:
            return replicated("cpu", self.replicas, self.processes)
        return init_device_mesh("cpu", (self.processes,))


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """Within it this process is the first of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tokenizer() -> PreTrainedTokenizerFast:
    """One that has no more than the end token."""
    core = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def build(config: PretrainedConfig, work: Work, precision: torch.dtype = torch.float32) -> Policy:
    """A policy as a run has it before it is cut; call it under a ``FakeTensorMode`` or not."""
    with torch.device("meta"):  # peft cannot move fake tensors, but it can make them on no device
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        disable_dropout(model)
        if work.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        backbone = _adapted(model) if work.lora else model
        heads = ValueHeads(config.hidden_size, [f"objective {i}" for i in range(work.objectives)])
    return Policy(_with_memory(backbone, precision), tokenizer(), _with_memory(heads, torch.float32)).train()


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    gpt2 = model.config.model_type == "gpt2"  # whose layers hold their weights transposed, and peft wants to be told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=RANK, task_type="CAUSAL_LM", fan_in_fan_out=gpt2))


def _with_memory(model: Any, precision: torch.dtype) -> Any:
    made: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    filled = _filled(parameter, precision)
                    made[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _filled(buffer, buffer.dtype)
    return model


def _filled(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(tensor.shape, 0.01 if dtype.is_floating_point else 0, dtype=dtype)


class AllSelected(TorchDispatchMode):
    """A boolean index selects every row: which ones it selects is data, and fake tensors have none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, its boolean indices replaced by as many whole numbers."""
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            args = (args[0], self._numbers(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += [torch.zeros(index.numel(), dtype=torch.long) for _ in range(index.ndim)]
            else:
                found.append(index)
        return found


class Tracker(FSDPMemTracker):
    """Remembers the most that was gathered at once too."""

    gathered = 0

    def _update_peak_stats(self, peak_state: Any) -> None:
        super()._update_peak_stats(peak_state)
        self.gathered = max(self.gathered, self.bytes("UNSHARDED_PARAM", "ALL_GATHER"))

    def bytes(self, *kinds: str) -> int:
        """What these kinds hold now; the names are the library's."""
        return sum(
            size
            for of_device in self._curr_mem_snap.values()
            for kind, size in of_device.items()
            if getattr(kind, "name", kind) in kinds
        )

    @property
    def peak(self) -> int:
        """The most that was live at once."""
        return sum(self._peak_mem.values())


def measure(config: PretrainedConfig, work: Work, layout: Layout, fake: bool = True) -> dict[str, int]:
    """Bytes on the first process, by the name of the part; a process group runs.

    The first process holds the most: the last ones have no more than padding where a dimension does not come out even.
    """
    mesh = layout.mesh()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        warnings.simplefilter("ignore")  # of fake tensors, and of tensors that are views
        policy = build(config, work)
        plan = ShardingPlan(param_dtype="bfloat16" if work.element == 2 else None)
        reference: Reference = AdapterOff() if work.lora else FrozenCopy()
        reference.setup(policy)
        plan.apply(policy, mesh)
        copies: list[Policy] = []
        reference.shard(policy, lambda copy: (plan.apply(copy, mesh), copies.append(copy))[0])
        reward = AutoModelForSequenceClassification.from_config(_classifier(config))
        plan.apply_frozen(reward, mesh)
        found = _step(policy, work, fake)
        found["reference"] = _held(parameter for copy in copies for parameter in copy.parameters())
        found["reward"] = _held(reward.parameters())
        return found


def _classifier(config: PretrainedConfig) -> PretrainedConfig:
    one = copy.deepcopy(config)
    one.num_labels = 1
    return one


def _step(policy: Policy, work: Work, fake: bool) -> dict[str, int]:
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found = {"parameters": _held(policy.parameters())}
    optimizer, inputs = torch.optim.AdamW(trained), _inputs(work)
    tracker = Tracker(policy, optimizer)
    tracker.track_inputs(inputs)
    with tracker, AllSelected() if fake else nullcontext():
        before = tracker.bytes("Total")
        with policy.generation_context(policy):
            found["gathered to sample"] = tracker.bytes("Total") - before
        tracker.gathered = 0
        output = policy(*inputs)
        found["activations"] = tracker.bytes("ACT")
        _loss(output).backward()
        del output
        found["gathered to train"] = tracker.gathered
        found["peak of a step"] = tracker.peak - before + found["parameters"]
    del tracker
    found["gradients"] = _held(parameter.grad for parameter in trained)
    optimizer.step()
    found["optimizer"] = _held(value for state in optimizer.state.values() for value in state.values())
    return found


def activations(config: PretrainedConfig, work: Work) -> dict[str, int]:
    """What does not depend on the number of processes: activations, logits and cache, of the policy uncut."""
    precision = torch.float32 if work.element == 4 else torch.bfloat16
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        policy, inputs = build(config, work, precision), _inputs(work)
        held = [*policy.parameters(), *policy.buffers(), *inputs]
        with MemoryTracker(held) as tracker, AllSelected():
            before = tracker.live
            output = policy(*inputs)
            found = {"activations": tracker.live - before}
            del output
        cache = policy.eval().causal_lm(inputs[0], use_cache=True).past_key_values
        found["cache"] = _held(part for layer in cache.layers for part in (layer.keys, layer.values))
    found["logits"] = _logits(config.vocab_size, work, precision)
    return found


def _logits(vocabulary: int, work: Work, precision: torch.dtype) -> int:
    """The most that log-probabilities hold at once beside the hidden states, which are narrow here; real tensors."""
    shape = (work.sequences, work.trained)
    head = nn.Linear(1, vocabulary, bias=False, dtype=precision).requires_grad_(False)
    hidden_BTD = torch.zeros((*shape, 1), dtype=precision, requires_grad=True)
    tokens_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)

    def there_and_back() -> None:
        token_logprobs(hidden_BTD, head, tokens_BT, mask_BT)[0].sum().backward()

    held = [head.weight, hidden_BTD, tokens_BT, mask_BT]
    return peak_bytes(there_and_back, held) - _held(held)


def _inputs(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    ids_BL = torch.zeros((work.sequences, work.length), dtype=torch.long)
    return ids_BL, torch.ones_like(ids_BL), torch.ones((work.sequences, work.trained), dtype=torch.bool)


def _loss(output: Any) -> Tensor:
    loss: Tensor = output.logprobs_BT.sum() + output.values_BTN.sum()
    return loss


def _held(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors: padding included, memory that several share counted once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
