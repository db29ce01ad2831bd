"""A packed row: its layout, its attention, what it refuses, and which models take it."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from builders import FAMILIES, add_head
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sharing_checks import KINDS, Answer, Prompt, batch_of, build, cases
from torch.nn import functional as F
from transformers import GenerationConfig

from segrl.errors import SegRLError
from segrl.models import backbone_of, base_instance, tiny_causal_lm
from segrl.sharing import Packed, PromptKey, enable_sharing, install_vision, pack_rows, select_rows
from segrl.sharing.attention import shared_attention
from segrl.sharing.layout import build_layout

few = settings(max_examples=25)


def whole(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Ids, mask, width of the completions, and the images, as `pack_rows` takes them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    return ids, mask, batch["completion_ids"].size(1), {name: batch[name] for name in names if name in batch}


def must_pack(*arguments: Any, **images: Any) -> Packed:
    packed = pack_rows(*arguments, **images)
    assert packed is not None
    return packed


# ---- layout ----------------------------------------------------------------------------------------------------------


@st.composite
def groupings(draw: Any) -> tuple[list[list[int]], list[int], list[int], int]:
    """Members of each group, prompt and completion lengths by row, and the completions' width."""
    owner = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    members = [[row for row, group in enumerate(owner) if group == one] for one in dict.fromkeys(owner)]
    lengths = {group: draw(st.integers(1, 6)) for group in set(owner)}
    completions = [draw(st.integers(0, 5)) for _ in owner]
    return members, [lengths[group] for group in owner], completions, max(1, *completions) + draw(st.integers(0, 2))


class TestLayout:
    @given(groupings())
    def test_every_token_has_one_place(self, grouping):
        members, prompts, completions, width = grouping
        layout = build_layout(members, prompts, completions, width, "cpu")
        assert layout.tokens == sum(prompts[group[0]] for group in members) + sum(completions)
        assert layout.rows.shape == (len(prompts), width + 1)
        taken = []
        for group, rows in zip(layout.groups, members, strict=True):
            last = group.start + group.prompt - 1
            for row in rows:
                length = completions[row]
                places = layout.rows[row].tolist()
                assert places[0] == last
                assert places[length + 1 :] == [last] * (width - length)
                taken += places[1 : length + 1]
            taken += range(group.start, group.start + group.prompt)
        assert sorted(taken) == list(range(layout.tokens))

    def test_equal_lengths_need_no_index(self):
        layout = build_layout([[0, 1], [2, 3]], [3] * 4, [4] * 4, 4, "cpu")
        assert [part.prompts for part in layout.batches.parts] == [(3, 3)]
        assert (layout.batches.index, layout.batches.places) == (None, None)

    def test_groups_of_similar_shape_are_one_batch(self):
        """Within a quarter more products of queries and keys; a long prompt is a batch of its own."""
        lengths = {30: [9, 10], 90: [10, 10], 31: [10, 8], 32: [10, 10, 10]}
        prompts = [prompt for prompt, own in lengths.items() for _ in own]
        completions = [length for own in lengths.values() for length in own]
        members = [[0, 1], [2, 3], [4, 5], [6, 7, 8]]
        batches = build_layout(members, prompts, completions, 10, "cpu").batches
        assert [part.prompts for part in batches.parts] == [(30, 31, 32), (90,)]
        assert [part.completions for part in batches.parts] == [3, 2]

    @given(groupings())
    def test_a_batch_computes_little_more_than_its_groups(self, grouping):
        """At most a quarter, beside the padding of a group's completions to the longest."""
        members, prompts, completions, width = grouping
        layout = build_layout(members, prompts, completions, width, "cpu")
        apart = [build_layout([rows], prompts, completions, width, "cpu").batches.parts[0].work for rows in members]
        assert sum(part.work for part in layout.batches.parts) <= 1.25 * sum(apart)
        assert sum(len(part.prompts) for part in layout.batches.parts) == len(members)


class TestAttention:
    @few
    @given(groupings(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
    def test_equals_a_mask_over_the_whole_row(self, grouping, key_heads, seed):
        """Token i sees token j of its own group if j comes before it in the prompt or in the same completion."""
        members, prompts, completions, width = grouping
        layout = build_layout(members, prompts, completions, width, "cpu")
        torch.manual_seed(seed)
        query = torch.randn(1, 4, layout.tokens, 8, requires_grad=True)
        key, value = (torch.randn(1, key_heads, layout.tokens, 8, requires_grad=True) for _ in range(2))
        group_of, part_of = [], []
        for number, rows in enumerate(members):
            parts = [(0, prompts[rows[0]]), *((n + 1, completions[row]) for n, row in enumerate(rows))]
            part_of += [part for part, length in parts for _ in range(length)]
            group_of += [number] * sum(length for _, length in parts)
        sees = torch.tensor(
            [
                [group_of[i] == group_of[j] and part_of[j] in (0, part_of[i]) and j <= i for j in range(layout.tokens)]
                for i in range(layout.tokens)
            ]
        )
        repeated = [tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value)]
        expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=sees, scale=0.3).transpose(1, 2)
        found, none = shared_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, shared_prompt=layout)
        assert none is None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
        given_ = torch.autograd.grad((found * weight).sum(), (query, key, value))
        for one, other in zip(given_, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("extra", "named"),
        [
            ({"sliding_window": 4}, "sliding_window=4"),
            ({"softcap": 30.0}, "softcap=30.0"),
            ({"s_aux": torch.ones(2)}, "use s_aux$"),
        ],
    )
    def test_what_it_does_not_compute_is_refused(self, extra, named):
        layout = build_layout([[0, 1]], [2, 2], [1, 1], 1, "cpu")
        states = torch.randn(1, 2, layout.tokens, 8)
        with pytest.raises(SegRLError, match=named):
            shared_attention(torch.nn.Identity(), states, states, states, None, shared_prompt=layout, **extra)

    @pytest.mark.parametrize("length", [3, 5])
    def test_another_length_than_the_layouts_is_refused(self, length):
        layout = build_layout([[0, 1]], [2, 2], [1, 1], 1, "cpu")
        states = torch.randn(1, 2, length, 8)
        with pytest.raises(SegRLError, match=r"queries of shape \(1, 2"):
            shared_attention(torch.nn.Identity(), states, states, states, None, shared_prompt=layout)


# ---- packing ---------------------------------------------------------------------------------------------------------


class TestPackRows:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_states_are_those_of_rows_of_their_own(self, kind):
        """Also of the prompt's last token, against rows without any padding, one by one."""
        model, processor = build(kind)
        assert enable_sharing(model) is None
        backbone = backbone_of(model)

        @few
        @given(cases(kind))
        def check(case):
            prompts, answers, seed = case
            batch = batch_of(processor, prompts, answers, seed=seed)
            ids, mask, keep, images = whole(batch)
            packed = pack_rows(backbone, ids, mask, keep, batch["prompt_keys"], **images)
            keys = batch["prompt_keys"]
            if len(set(keys)) == len(keys):
                assert packed is None
                return
            assert packed is not None
            lengths = {key: len(key.tokens) for key in keys}
            assert packed.inputs["input_ids"].shape == (1, sum(lengths.values()) + int(batch["completion_mask"].sum()))
            with torch.no_grad():
                states = backbone(**packed.inputs, use_cache=False).last_hidden_state
            assert states.shape[:2] == (len(answers), keep + 1)
            for row, answer in enumerate(answers):
                real = mask[row].bool()
                own = select_rows(range(row, row + 1), **images)
                own.pop("num_images")
                types = own.pop("mm_token_type_ids", None)
                if types is not None:
                    own["mm_token_type_ids"] = types[:, real]
                own = {name: value for name, value in own.items() if value is not None}
                with torch.no_grad():
                    alone = backbone(input_ids=ids[row : row + 1, real], use_cache=False, **own).last_hidden_state[0]
                expected = alone[len(keys[row].tokens) - 1 :]
                torch.testing.assert_close(states[row, : answer.length + 1], expected, rtol=1e-4, atol=1e-4)
                labels = packed.labels[row].tolist()
                assert labels == [*ids[row, -keep:][: answer.length].tolist(), *[-100] * (keep + 1 - answer.length)]

        check()

    @pytest.fixture
    def text(self):
        model, tokenizer = tiny_causal_lm(hidden_size=64, vocab_size=640)
        batch = batch_of(tokenizer, [Prompt(3), Prompt(5)], [Answer(0, 3), Answer(1, 2), Answer(0, 4), Answer(1, 4)])
        ids, mask, keep, _ = whole(batch)
        return backbone_of(model), ids, mask, keep, batch["prompt_keys"]

    def test_part_of_the_rows(self, text):
        backbone, ids, mask, keep, keys = text
        assert pack_rows(backbone, ids, mask, keep, keys, range(0, 2)) is None
        packed = must_pack(backbone, ids, mask, keep, keys, range(1, 4))
        assert packed.labels.shape == (3, keep + 1)
        assert packed.inputs["input_ids"].tolist() == [
            [*keys[1].tokens, *ids[1, -4:-2].tolist(), *ids[3, -4:].tolist(), *keys[0].tokens, *ids[2, -4:].tolist()]
        ]

    def test_positions_of_a_completion_follow_its_prompt(self, text):
        backbone, ids, mask, keep, keys = text
        packed = must_pack(backbone, ids, mask, keep, keys, range(1, 4))
        one, other = len(keys[1].tokens), len(keys[0].tokens)
        expected = [*range(one), *range(one, one + 2), *range(one, one + 4), *range(other + 4)]
        assert packed.inputs["position_ids"].tolist() == [expected]

    def test_keys_that_lie(self, text):
        backbone, ids, mask, keep, keys = text
        assert pack_rows(backbone, ids, mask, keep, [keys[0]] * 4) is None
        wrong = ids.clone()
        wrong[2, 0 if mask[2, 0] else int(mask[2].argmax())] += 1
        assert pack_rows(backbone, wrong, mask, keep, keys) is None
        assert pack_rows(backbone, ids, mask, keep, [PromptKey((1,), (str(n),)) for n in range(4)]) is None

    @pytest.mark.parametrize("where", ["prompt", "completion"])
    def test_masks_with_holes(self, text, where):
        backbone, ids, mask, keep, keys = text
        holed = mask.clone()
        holed[0, -keep - 2 if where == "prompt" else -keep] = 0
        holed[2, -keep - 2 if where == "prompt" else -keep] = 0
        assert pack_rows(backbone, ids, holed, keep, keys) is None

    def test_empty_prompt(self, text):
        backbone, ids, mask, keep, _ = text
        empty = mask.clone()
        empty[:, :-keep] = 0
        assert pack_rows(backbone, ids, empty, keep, [PromptKey(())] * 4) is None

    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_without_pictures_have_no_pixels(self, family):
        """A micro-batch of text-only rows out of a batch that has pictures: models do not take zero of them."""
        model, processor = build(family)
        rows = [Answer(1, 3), Answer(1, 2), Answer(0, 2), Answer(0, 3)]
        batch = batch_of(processor, [Prompt(3, (0, 1)), Prompt(5)], rows)
        ids, mask, keep, images = whole(batch)
        packed = must_pack(backbone_of(model), ids, mask, keep, batch["prompt_keys"], range(0, 2), **images)
        assert not {"pixel_values", "image_grid_thw"} & packed.inputs.keys()
        assert not {"pixel_values", "image_grid_thw"} & select_rows(range(0, 2), **images).keys()
        assert select_rows(range(2, 4), **images)["pixel_values"].shape == images["pixel_values"].shape


# ---- which models ----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def model_of(name: str, **changes: Any) -> Any:
    """A tiny causal model of a transformers family."""
    config = getattr(transformers, f"{name}Config", None) or getattr(transformers, f"{name}TextConfig")
    own = {"head_dim": 16} if name.startswith("Gemma") else {}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config(**{**SMALL, **own, **changes})).eval()


REFUSED: dict[str, tuple[Any, str]] = {
    "gemma2": (lambda: model_of("Gemma2"), r"Gemma2ForCausalLM has layers of the types .*'sliding_attention'"),
    "softcap": (
        lambda: model_of("Gemma2", layer_types=["full_attention"] * 2),
        "its attention layers use softcap=50.0",
    ),
    "window": (lambda: model_of("Mistral", sliding_window=8), "Mistral.* has a sliding window of 8 tokens"),
    "layer-windows": (
        lambda: model_of("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "Qwen2ForCausalLM has layers of the types",
    ),
    "sinks": (
        lambda: model_of(
            "GptOss", head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2
        ),
        "its attention layers use s_aux$",
    ),
    "mamba": (lambda: model_of("Mamba", state_size=4), "MambaForCausalLM has"),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
        ),
        "GPT2LMHeadModel has no decoder layers with a self_attn",
    ),
    "router": (
        lambda: model_of("Mixtral", num_local_experts=2, output_router_logits=True),
        "output_router_logits=True, and the loss of the router counts every token",
    ),
    "encoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
        ),
        "T5ForConditionalGeneration has no decoder-only backbone",
    ),
    "prompt-learning": (
        lambda: get_peft_model(model_of("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "PromptTuningConfig puts virtual tokens before the prompt",
    ),
    "vocabulary": (lambda: model_of("Llama", vocab_size=8), "the vocabulary is too small"),
}


class TestSupport:
    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_with_a_reason(self, name):
        build_it, reason = REFUSED[name]
        model = build_it().eval()
        ids = torch.randint(3, 8, (2, 5))
        arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            before = model(input_ids=ids, **arguments).logits
            found = enable_sharing(model)
            after = model(input_ids=ids, **arguments).logits
        assert found is not None
        assert torch.equal(before, after)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found)

    @pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Granite", "Olmo2"])
    def test_supported(self, name):
        changes = {"sliding_window": None} if name == "Mistral" else {}
        assert enable_sharing(model_of(name, **changes)) is None

    def test_unknown_implementation_of_attention(self):
        from transformers import AttentionInterface

        def own(module, query, key, value, attention_mask, **extra):
            return value.transpose(1, 2), None

        AttentionInterface.register("test_own_attention", own)
        model = model_of("Llama")
        model.set_attn_implementation("test_own_attention")
        assert "attention implementation 'test_own_attention' is not one of sdpa, eager" in str(enable_sharing(model))

    def test_states_that_differ_are_noticed(self):
        """A model that mixes neighbours outside its attention would be wrong, and is refused."""
        model = model_of("Llama")

        def mix(module, args, output):
            return output + output.roll(1, dims=1)

        model.model.layers[0].mlp.register_forward_hook(mix)
        assert "states of LlamaForCausalLM differ by" in str(enable_sharing(model))


# ---- what it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
class TestUntouched:
    def test_every_other_pass_bit_for_bit(self, kind):
        model, processor = build(kind)
        batch = batch_of(processor, [Prompt(3, () if kind == "text" else (0, 1))], [Answer(0, 3), Answer(0, 2)])
        ids, mask, _, images = whole(batch)
        images.pop("num_images", None)
        settings_ = GenerationConfig(max_new_tokens=6, pad_token_id=0)

        def outputs():
            with torch.no_grad():
                yield model(input_ids=ids, attention_mask=mask, **images).logits
                yield model.generate(input_ids=ids, attention_mask=mask, generation_config=settings_, **images)

        before, names = list(outputs()), set(model.state_dict())
        config = model.config.to_dict()
        assert enable_sharing(model) is None
        assert enable_sharing(model) is None
        install_vision(backbone_of(model), model.get_decoder(), _cache())
        after = list(outputs())
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert set(model.state_dict()) == names
        assert model.config.to_dict() == config

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "saved"])
    def test_copies_share_as_well(self, kind, way, tmp_path):
        model, processor = build(kind)
        assert enable_sharing(model) is None
        install_vision(backbone_of(model), model.get_decoder(), _cache())
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            model.save_pretrained(tmp_path)
            other = type(model).from_pretrained(tmp_path)
        assert enable_sharing(other) is None
        batch = batch_of(processor, [Prompt(3, () if kind == "text" else (0, 1))], [Answer(0, 3), Answer(0, 2)])
        ids, mask, keep, images = whole(batch)
        states = []
        for one in (model, other):
            packed = must_pack(backbone_of(one), ids, mask, keep, batch["prompt_keys"], **images)
            with torch.no_grad():
                states.append(backbone_of(one)(**packed.inputs, use_cache=False).last_hidden_state)
            with torch.no_grad():  # the copy is another model: nothing of one is used by the other
                next(iter(other.get_decoder().parameters())).add_(1.0)
                if kind != "text":
                    next(p for n, p in other.named_parameters() if "vis" in n).add_(1.0)
        assert states[0].shape == states[1].shape
        assert not torch.allclose(states[0], states[1])
        with torch.no_grad():
            packed = must_pack(backbone_of(model), ids, mask, keep, batch["prompt_keys"], **images)
            again = backbone_of(model)(**packed.inputs, use_cache=False).last_hidden_state
        assert torch.equal(again, states[0])

    def test_peft_and_a_head_come_after_or_before(self, kind):
        """Layers, adapters and heads may be put in before or after."""
        model, processor = build(kind)
        batch = batch_of(processor, [Prompt(3)], [Answer(0, 3), Answer(0, 2)])
        ids, mask, keep, images = whole(batch)
        assert enable_sharing(model) is None
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = get_peft_model(model, lora)
        assert enable_sharing(wrapped) is None
        if kind != "text":
            add_head(wrapped, processor)
        backbone = backbone_of(base_instance(wrapped))
        packed = must_pack(backbone, ids, mask, keep, batch["prompt_keys"], **images)
        with torch.no_grad():
            states = backbone(**packed.inputs, use_cache=False).last_hidden_state
            own = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, -keep - 1 :]
        torch.testing.assert_close(states[0], own[0], rtol=1e-4, atol=1e-4)


def _cache() -> Any:
    from segrl.caching import FeatureCache

    return FeatureCache(memory_bytes=2**24)
