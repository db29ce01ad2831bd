"""Compiled decoder layers: the same numbers, one graph for all layers, and no compilation after the first steps."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from builders import sft_args
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from sharing_checks import Answer, Prompt, batch_of, build, checkpointed, close, loss_and_gradients, make_trainer
from sharing_runs import run, same_runs
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from trainer_checks import text_rows
from transformers import TrainerCallback

from segrl.errors import SegRLError
from segrl.sharing import compile_layers, enable_sharing
from segrl.sharing.group_attention import attend
from segrl.sharing.layout import build_layout
from segrl.sharing.packed_op import decode_layout, encode_layout, packed_attention
from segrl.trainers import SegSFTTrainer

# torch's compiler reads the gradient of its inputs while it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def layout_of(groups: list[tuple[int, list[int]]]) -> Any:
    prompts = [prompt for prompt, lengths in groups for _ in lengths]
    completions = [length for _, lengths in groups for length in lengths]
    ends = torch.tensor([len(lengths) for _, lengths in groups]).cumsum(0).tolist()
    members = [list(range(end - len(lengths), end)) for end, (_, lengths) in zip(ends, groups, strict=True)]
    return build_layout(members, prompts, completions, max(completions), "cpu")


groups_of_lengths = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3)), min_size=1, max_size=3
)


class TestOperation:
    @given(groups_of_lengths)
    def test_a_layout_goes_through_a_tensor(self, groups):
        layout = layout_of(groups)
        found = decode_layout(tuple(encode_layout(layout).tolist()), torch.device("cpu"))
        wanted = layout.batches
        shapes = [[(part.prompts, part.completions, part.longest) for part in one.parts] for one in (found, wanted)]
        assert shapes[0] == shapes[1]
        for mine, yours in ((found.index, wanted.index), (found.places, wanted.places)):
            assert (mine is None) is (yours is None)
            assert mine is None or torch.equal(mine, yours)

    @given(groups_of_lengths)
    def test_values_and_gradients(self, groups):
        layout = layout_of(groups)
        rng = torch.Generator().manual_seed(layout.tokens)
        tensors = [torch.randn(1, heads, layout.tokens, 8, generator=rng) for heads in (4, 2, 2)]
        results = []
        for call in (
            lambda q, k, v: packed_attention(q, k, v, encode_layout(layout), 0.3),
            lambda q, k, v: attend(layout.batches, q, k, v, 0.0, 0.3),
        ):
            inputs = [tensor.clone().requires_grad_() for tensor in tensors]
            output = call(*inputs)
            (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in inputs)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_inside_a_mode(self):
        """A mode of PyTorch (here one that counts) calls operations where autograd is off."""
        layout = layout_of([(3, [2, 1])])
        grads = []
        for context in (nullcontext(), FlopCounterMode(display=False)):
            query, key, value = (torch.arange(96.0).view(1, 2, 6, 8).mul(0.01).requires_grad_() for _ in range(3))
            with context:
                packed_attention(query, key, value, encode_layout(layout), 0.3).square().sum().backward()
            grads.append(value.grad)
        assert torch.equal(*grads)


class TestRefused:
    def test_layers_of_other_kinds(self):
        model, _ = build("text")
        model.config.layer_types = ["linear_attention"] * 2
        kind = type(model.model.layers[0])
        assert "layers of the types ['linear_attention']" in str(compile_layers(model, "eager"))
        assert type(model.model.layers[0]) is kind

    def test_one_warning_and_training_goes_on(self, tmp_path):
        model, processor = build("text")
        model.config.layer_types = ["sliding_attention"] * 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"compile_layers": True, "share_prompt": False}
            trainer = make_trainer(model, processor, tmp_path, settings=settings)
        said = [str(item.message) for item in caught if "compile_layers" in str(item.message)]
        assert len(said) == 1
        assert "only full_attention can be compiled. The layers run uncompiled" in said[0]
        assert not hasattr(trainer.model.model.layers[0], "_segrl_compiled")

    def test_settings(self, tmp_path):
        model, processor = build("text")
        for settings, said in (
            ({"compile_backend": "induktor"}, "unknown backend of torch.compile 'induktor'"),
            ({"torch_compile": True}, "torch_compile=True compiles the whole model"),
        ):
            with pytest.raises(SegRLError, match=said):
                make_trainer(
                    model, processor, tmp_path, settings={"compile_layers": True, "share_prompt": False, **settings}
                )

    @pytest.mark.slow
    @pytest.mark.long
    def test_a_backend_that_fails(self):
        """Without a C++ compiler inductor raises; the model is as it was, and shares prompts."""
        import torch._inductor.config as config

        model, _ = build("text")
        kind = type(model.model.layers[0])
        enable_sharing(model)
        with config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
            assert compile_layers(model, "inductor") is not None
        assert type(model.model.layers[0]) is kind
        assert enable_sharing(model) is None


class Graphs(TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_a_run_with_masks(tmp_path):
    """Old scores, reference and loss of every step are compiled, generation is not; nothing compiles after step 3."""
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    plain = run(tmp_path, **settings)
    counters.clear()
    graphs = Graphs()
    settings |= {"compile_layers": True, "compile_backend": "aot_eager"}
    compiled = run(tmp_path, **settings)
    same_runs(compiled, plain)
    layers = compiled.model.get_decoder().layers
    assert {type(layer)._segrl_compiled for layer in layers} == {"aot_eager"}
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    assert counters["frames"]["total"] == counters["frames"]["ok"] == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    trainer = compiled
    trainer.add_callback(graphs)
    trainer.args.max_steps = 5
    before = counters["stats"]["unique_graphs"]
    trainer.train()
    assert graphs.after == [before] * 5  # other rows, other lengths


STEPS = [
    ([Prompt(3 + n % 4), Prompt(7), Prompt(1 + n % 3)],
     [Answer((3 * n + row) % 3, 1 + (5 * n + 2 * row) % 9) for row in range(4 + n)]) for n in range(5)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["text", "qwen2_5_vl", "qwen3_vl", "llava"])
@pytest.mark.parametrize("checkpoint", [None, False])
def test_adapters_and_checkpoints(backend, kind, checkpoint, tmp_path):
    if backend == "inductor" and kind in ("qwen3_vl", "llava"):
        pytest.skip("two families are enough for a compiler that takes a minute")
    model, processor = build(kind)
    lora = LoraConfig(r=2, target_modules=r".*(language_model|model\.layers).*\.(q_proj|v_proj|down_proj)")
    trainer = make_trainer(model, processor, tmp_path, peft_config=lora)
    if checkpoint is not None:
        checkpointed(trainer.model, checkpoint)
    batches = [
        batch_of(
            processor,
            prompts if kind == "text" else [Prompt(p.words, (n % 3,)) for n, p in enumerate(prompts)],
            answers,
        )
        for prompts, answers in STEPS
    ]
    expected = [loss_and_gradients(trainer, batch) for batch in batches]
    counters.clear()
    assert compile_layers(trainer.model, backend) is None
    graphs = []
    for batch, (loss, wanted, _) in zip(batches, expected, strict=True):
        found, gradients, _ = loss_and_gradients(trainer, batch)
        close(found, loss, scale=1.0)
        norm = torch.stack([value.norm() for value in wanted.values()]).norm().item()
        for name, value in wanted.items():
            close(gradients[name], value, scale=1e-2 * norm, tolerance=2e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1] <= 4
    assert not counters["graph_break"]
    decoder = copy.deepcopy(trainer.model).get_base_model().get_decoder()
    assert type(decoder.layers[0])._segrl_compiled == backend


@pytest.mark.slow
@pytest.mark.long
def test_supervised(tmp_path):
    results = []
    for compiled in (False, True):
        model, tokenizer = build("text")
        rows = text_rows(8).add_column("completion", [[{"role": "assistant", "content": "It is small."}]] * 8)
        settings = {"compile_layers": compiled, "compile_backend": "aot_eager", "max_steps": 4}
        trainer = SegSFTTrainer(model, sft_args(tmp_path, **settings), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert results[0] == pytest.approx(results[1], abs=1e-5)
