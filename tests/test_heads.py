"""Adapters, probes, the mask head on a model's forward passes, and from recorded states to masks."""

import copy
import functools
import json
import pickle
import resource
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import FAMILIES, add_head, tiny_headed_model, tiny_model, tiny_sam2_config, tiny_segmenter
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from segrl.caching import FeatureCache
from segrl.errors import CheckpointError, SegRLError, UnknownNameError
from segrl.heads import (
    AnswerProbe,
    LinearAdapter,
    MaskHead,
    MLPAdapter,
    SegInput,
    SegTokenProbe,
    SemanticGuidedAdapter,
    attach_mask_head,
    detach_mask_head,
    find_mask_head,
    register_adapter,
)
from segrl.heads.decoding import Completions, add_masks, generation_states, masks_at
from segrl.models import seg_token_id, tiny_tokenizer
from segrl.predictions import Frame, Status, parse_completion
from segrl.segmenters import Sam2Segmenter

ADAPTERS = [
    SemanticGuidedAdapter(24, 16, num_heads=4),
    SemanticGuidedAdapter(24, 16, num_heads=2, blocks=0, hidden_dim=7, attention_dim=10, num_queries=3),
    LinearAdapter(24, 16),
    MLPAdapter(24, 16),
    MLPAdapter(24, 16, hidden_dim=5),
]


def completions(ids, states):
    batch = Completions.of(ids, "cpu")
    batch.states = states
    return batch


def adapter_name(adapter):
    return f"{type(adapter).__name__}-{sum(p.numel() for p in adapter.parameters())}"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed=0, size=(64, 64)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def seg_input(head, seed=0, mask=False):
    target = (noise(16, 16, seed=seed) > 0).to(torch.uint8) * 255 if mask else None
    return SegInput(head.segmenter.preprocess(picture(seed)), target=target)


def last_written(ids, completion_mask):
    """A probe that is a function."""
    return completion_mask.int().cumsum(1).argmax(1, keepdim=True), completion_mask.any(1, keepdim=True)


class Scaled(LinearAdapter):
    """An adapter with a setting of its own."""

    def __init__(self, input_dim, prompt_dim, *, scale=1.0):
        super().__init__(input_dim, prompt_dim)
        self.scale = scale

    def forward(self, states, state_mask):
        return self.scale * super().forward(states, state_mask)

    def to_config(self):
        return {**super().to_config(), "scale": self.scale}


def _local(base):
    class Local(base): ...

    return Local


def _settings(change):
    """Makes a subclass whose config is changed."""
    return lambda base: type("Faulty", (base,), {"to_config": lambda self: change(base.to_config(self))})


class SmallSam(Sam2Segmenter):
    """A segmenter that needs no settings."""

    def __init__(self, config=None):
        super().__init__(config or tiny_sam2_config())


class Forgetful(Scaled):
    """Is built anew without its setting."""

    @classmethod
    def from_config(cls, config, **context):
        return cls(config["input_dim"], config["prompt_dim"])


class Wider(LinearAdapter):
    """Is built anew with another width than before."""

    def __init__(self, input_dim, prompt_dim, hidden=5):
        super().__init__(input_dim, prompt_dim)
        self.extra = nn.Parameter(torch.zeros(hidden))
        self.more = nn.ParameterList([torch.zeros(1)] * (hidden - 5))


UNSAVED = {  # fault: how to make the class, what the error says
    "local": (_local, "is defined inside a function and cannot be found again; define it at the top of a module, or"),
    "unknown setting": (_settings(lambda c: {**c, "x": 1}), "to_config() does not rebuild it: TypeError"),
    "not JSON": (_settings(lambda c: {**c, "x": {1}}), "to_config() is not JSON-ready: Object of type set"),
    "reserved": (_settings(lambda c: {**c, "type": "x"}), "to_config() has the reserved key 'type'; rename it"),
}
BAD_FILES: list[Any] = [  # change of mask_head.json, how the error goes on behind the file's name
    ("{", "not JSON: "),
    ("[]", "holds a list, expected a JSON object"),
    (lambda c: {**c, "version": 2}, "version: 2; this segrl reads version 1, update segrl"),
    (lambda c: {**c, "version": "1"}, "version: '1'; this segrl reads version 1"),
    (lambda c: {**c, "freeze_encoder": "yes"}, "freeze_encoder: 'yes'; expected true or false"),
    (lambda c: {k: v for k, v in c.items() if k != "freeze_encoder"}, "freeze_encoder: None; expected true"),
    (lambda c: {k: v for k, v in c.items() if k != "probe"}, "probe: None; expected an object with the text 'type'"),
    (
        lambda c: {**c, "adapter": {"input_dim": 8}},
        "adapter: {'input_dim': 8}; expected an object with",
    ),
    (lambda c: {**c, "adapter": {"type": "linaer"}}, "adapter: unknown adapter 'linaer'; did you mean 'linear'?"),
    (lambda c: {**c, "adapter": {"type": "no_module:X"}}, "adapter: adapter 'no_module:X' cannot be imported: Modu"),
    (lambda c: {**c, "adapter": {**c["adapter"], "width": 3}}, "adapter: TypeError: LinearAdapter.__init__() got an"),
    (lambda c: {**c, "segmenter": {**c["segmenter"], "image_size": 33}}, "segmenter: image_size=33: a SAM 2 input"),
    (lambda c: {**c, "adapter": {**c["adapter"], "input_dim": "8"}}, "adapter: "),
    (lambda c: {**c, "adapter": {**c["adapter"], "input_dim": 10**9}}, "adapter.input_dim: 1000000000 is more than"),
    (lambda c: {**c, "segmenter": {**c["segmenter"], "stages": [10**9, 1]}}, "segmenter.stages: 1000000000 is more"),
    (lambda c: {**c, "probe": {"type": "answer", "token_id": 3}}, "probe: probe 'answer' looks for <answer> in the"),
]


class TestAdapters:
    @pytest.mark.parametrize("adapter", ADAPTERS, ids=adapter_name)
    @pytest.mark.parametrize(("masks", "states"), [(0, 1), (0, 4), (1, 1), (3, 1), (2, 5)])
    def test_shapes_and_gradients(self, adapter, masks, states):
        inputs = noise(masks, states, 24).requires_grad_()
        output = adapter(inputs, torch.ones(masks, states, dtype=torch.bool))
        prompts = getattr(adapter, "query", torch.zeros(1, 1)).shape[0]
        assert output.shape == (masks, prompts, 16)
        if masks:
            gradients = torch.autograd.grad(output.square().sum(), [inputs, *adapter.parameters()])
            assert all(torch.isfinite(gradient).all() for gradient in gradients)
            assert gradients[0].any()

    @pytest.mark.parametrize("adapter", ADAPTERS, ids=adapter_name)
    def test_padded_states_do_not_matter(self, adapter):
        states, mask = noise(3, 4, 24), torch.ones(3, 4, dtype=torch.bool)
        mask[0, 2:] = False
        mask[1, 0] = False
        changed = states.clone()
        changed[~mask] = 1e3
        assert torch.equal(adapter(states, mask), adapter(changed, mask))
        short = adapter(states[:1, :2], mask[:1, :2])
        assert torch.allclose(adapter(states[:1], mask[:1]), short, atol=1e-5)
        assert not torch.allclose(adapter(states, torch.ones_like(mask))[0], short[0], atol=1e-3)

    @pytest.mark.parametrize("adapter", ADAPTERS, ids=adapter_name)
    def test_the_config_rebuilds_the_adapter(self, adapter):
        config = json.loads(json.dumps(adapter.to_config()))
        again = type(adapter)(**config)
        assert again.to_config() == adapter.to_config()
        again.load_state_dict(adapter.state_dict())
        states, mask = noise(2, 3, 24), torch.ones(2, 3, dtype=torch.bool)
        assert torch.equal(again(states, mask), adapter(states, mask))

    @pytest.mark.parametrize(("states", "heads", "queries", "blocks"), [(1, 4, 1, 2), (5, 2, 1, 3), (3, 8, 2, 1)])
    def test_semantic_guided_equals_the_equations_of_the_paper(self, states, heads, queries, blocks):
        """h + MLP(LayerNorm(h)) per block, then Proj(LayerNorm(Attn(q, h, h))), written out in float64."""
        adapter = SemanticGuidedAdapter(24, 16, num_heads=heads, num_queries=queries, blocks=blocks).double()
        for n, parameter in enumerate(adapter.parameters()):  # defaults leave biases zero and norms one
            parameter.data.add_(noise(*parameter.shape, seed=n).double() * 0.1)
        inputs = noise(2, states, 24).double()
        weights = dict(adapter.named_parameters())

        def norm(x, name):
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def linear(x, name):
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        h = inputs
        for n in range(blocks):
            inner = linear(norm(h, f"blocks.{n}.0"), f"blocks.{n}.1")
            inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))  # GELU
            h = h + linear(inner, f"blocks.{n}.3")
        if "attention.in_proj_weight" in weights:
            q_weight, k_weight, v_weight = weights["attention.in_proj_weight"].chunk(3)
        else:
            q_weight, k_weight, v_weight = (weights[f"attention.{name}_proj_weight"] for name in "qkv")
        q_bias, k_bias, v_bias = weights["attention.in_proj_bias"].chunk(3)
        expected = []
        for sample in h:
            q, k, v = weights["query"] @ q_weight.T + q_bias, sample @ k_weight.T + k_bias, sample @ v_weight.T + v_bias
            parts = []
            for columns in torch.arange(16).chunk(heads):
                scores = q[:, columns] @ k[:, columns].T / len(columns) ** 0.5
                parts.append(scores.softmax(-1) @ v[:, columns])
            expected.append(linear(torch.cat(parts, dim=1), "attention.out_proj"))
        result = linear(norm(torch.stack(expected), "norm"), "projection")
        mask = torch.ones(2, states, dtype=torch.bool)
        assert torch.allclose(adapter(inputs, mask), result, atol=1e-12)

    def test_linear_is_one_linear_layer_of_the_mean_state(self):
        adapter = LinearAdapter(24, 16)
        assert [tuple(p.shape) for p in adapter.parameters()] == [(16, 24), (16,)]
        states = noise(2, 3, 24)
        mask = torch.tensor([[True, True, False], [True, True, True]])
        means = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
        expected = means @ adapter.projection.weight.T + adapter.projection.bias
        assert torch.allclose(adapter(states, mask)[:, 0], expected, atol=1e-6)

    def test_heads_that_do_not_divide_the_width_are_an_error(self):
        with pytest.raises(SegRLError, match="num_heads=3 does not divide attention_dim=16; choose a divisor"):
            SemanticGuidedAdapter(24, 16, num_heads=3)


class TestSegTokenProbe:
    def test_known_value(self):
        ids = torch.tensor([[9, 1, 9, 9, 1], [9, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 9, 3, 9]])
        written = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
        index, valid = SegTokenProbe(9)(ids, written)
        assert index.shape == valid.shape == (4, 1)
        # the last of several; only in the prompt: none; no token: none; after the completion (padding): not counted
        assert valid[:, 0].tolist() == [True, False, False, True]
        assert index[valid].tolist() == [3, 2]
        assert index.min() >= 0

    @given(st.data())
    def test_is_the_last_written_token(self, data):
        length = data.draw(st.integers(1, 12))
        rows = data.draw(st.lists(st.lists(st.integers(7, 9), min_size=length, max_size=length), min_size=1))
        masks = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in rows]
        index, valid = SegTokenProbe(9)(torch.tensor(rows), torch.tensor(masks))
        for row, mask, position, has in zip(rows, masks, index[:, 0].tolist(), valid[:, 0].tolist(), strict=True):
            places = [t for t in range(length) if row[t] == 9 and mask[t]]
            assert has == bool(places)
            assert not places or position == places[-1]

    def test_no_rows(self):
        index, valid = SegTokenProbe(9)(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4))
        assert index.shape == valid.shape == (0, 1)


@functools.cache
def tokenizer_with(tags):
    return tiny_tokenizer(tag_tokens=tags)


WHOLE, SPLIT = ("<think>", "</think>", "<answer>", "</answer>", "<seg>"), ("<seg>",)


def answer_positions(tokenizer, ids, written, token_id):
    """By decoding ever longer prefixes of the written text: from the token after the tag up to the last `<seg>`."""
    places = [t for t in range(len(ids)) if written[t]]
    segs = [t for t in places if ids[t] == token_id]
    if not segs:
        return []
    before = [t for t in places if t < segs[-1]]

    def text(tokens):
        return tokenizer.decode([ids[t] for t in tokens], clean_up_tokenization_spaces=False)

    start = text(before).rfind("<answer>")
    if start < 0:
        return []
    first = next(n for n in range(len(before) + 1) if len(text(before[:n])) >= start + len("<answer>"))
    after = before[first] if first < len(before) else segs[-1]
    return list(range(after, segs[-1] + 1))


class TestAnswerProbe:
    TEXTS = (
        "<think>One dark cyst.</think><answer>The dark cyst is located at [1, 2, 3, 4].<seg></answer>",
        "<answer><seg></answer>",
        "<answer>one<seg><answer>two<seg>three",
        "<answer>one<seg><answer>two",
        "no tag.<seg>",
        "<answer>no token</answer>",
        "x <answer> [5]<seg>",
        "<<answer>>.<seg>",
        "<answer",
        "",
    )

    @pytest.mark.parametrize("tags", [WHOLE, SPLIT], ids=["whole tags", "split tags"])
    def test_equals_the_text_oracle(self, tags):
        tokenizer = tokenizer_with(tags)
        token_id = seg_token_id(tokenizer)
        prompt = tokenizer("<answer>boxes<seg> a")["input_ids"]
        rows = [prompt + tokenizer(text)["input_ids"] for text in self.TEXTS]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        written = torch.tensor([[len(prompt) <= t < len(row) for t in range(longest)] for row in rows])
        index, valid = AnswerProbe(token_id, tokenizer)(ids, written)
        found = [index[n][valid[n]].tolist() for n in range(len(rows))]
        expected = [
            answer_positions(tokenizer, ids[n].tolist(), written[n].tolist(), token_id) for n in range(len(rows))
        ]
        assert found == expected
        assert [len(places) > 0 for places in found] == [True] * 4 + [False, False, True, True, False, False]
        assert len(found[0]) > 8
        assert found[1] == [len(rows[1]) - len(tokenizer("</answer>")["input_ids"]) - 1]

    @given(st.lists(st.sampled_from(["<answer>", "<ans", "wer>", "<seg>", " a", "[3]", ">", "</answer>"]), max_size=8))
    @pytest.mark.parametrize("tags", [WHOLE, SPLIT], ids=["whole tags", "split tags"])
    def test_equals_the_text_oracle_on_any_pieces(self, tags, pieces):
        tokenizer = tokenizer_with(tags)
        token_id = seg_token_id(tokenizer)
        ids = tokenizer("".join(pieces))["input_ids"] or [tokenizer.pad_token_id]
        index, valid = AnswerProbe(token_id, tokenizer)(torch.tensor([ids]), torch.ones(1, len(ids)))
        assert index[valid].tolist() == answer_positions(tokenizer, ids, [True] * len(ids), token_id)

    def test_the_split_tokenizer_does_split_the_tag(self):
        assert len(tokenizer_with(WHOLE)("<answer>")["input_ids"]) == 1
        assert len(tokenizer_with(SPLIT)("<answer>")["input_ids"]) > 1

    def test_no_rows(self):
        tokenizer = tokenizer_with(WHOLE)
        index, valid = AnswerProbe(1, tokenizer)(torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
        assert index.shape == valid.shape == (0, 1)


@functools.cache
def pair(family="qwen2_5_vl", freeze_encoder=True):
    """Shared headed models; tests leave their weights alone."""
    return tiny_headed_model(family, freeze_encoder=freeze_encoder)


def encoded(processor, texts, images):
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Segment it."}]},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        for text, image in zip(texts, images, strict=True)
    ]
    processor.tokenizer.padding_side = "right"
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt", "padding": True}
    )


class TestBuild:
    def test_unknown_names_suggest_the_closest(self):
        model, processor = tiny_model()
        segmenter, token_id = tiny_segmenter(), seg_token_id(processor)
        with pytest.raises(UnknownNameError, match=r"unknown adapter 'linaer'; did you mean 'linear'\?"):
            MaskHead.build(model, segmenter, token_id=token_id, adapter="linaer")
        with pytest.raises(UnknownNameError, match=r"unknown probe 'seg_tokens'; did you mean 'seg_token'\?"):
            MaskHead.build(model, segmenter, token_id=token_id, probe="seg_tokens")

    def test_the_answer_probe_needs_the_tokenizer(self):
        model, processor = tiny_model()
        with pytest.raises(SegRLError, match=r"probe 'answer' looks for <answer> .* pass tokenizer="):
            MaskHead.build(model, tiny_segmenter(), token_id=seg_token_id(processor), probe="answer")

    def test_what_is_no_segmenter_is_refused_with_what_it_lacks(self):
        class Half(nn.Module):
            image_size = mask_size = prompt_dim = 8

            def preprocess(self, image): ...

            def encode(self, images): ...

        with pytest.raises(SegRLError, match=r"segmenter=Half: .* lacks \['decode', 'decode_boxes', 'freeze'\]"):
            MaskHead(SegTokenProbe(3), LinearAdapter(8, 8), Half())

    @pytest.mark.parametrize("adapter", ["semantic_guided", "linear", "mlp"])
    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_fits_every_family(self, family, adapter):
        model, processor = tiny_headed_model(family, adapter=adapter, hidden_size=96)
        head = find_mask_head(model)
        assert head is not None
        logits = head(noise(2, 1, 96), torch.ones(2, 1, dtype=torch.bool), [seg_input(head)] * 2)
        assert logits.shape == (2, 16, 16)
        assert head.probe.token_id == seg_token_id(processor)

    @pytest.mark.parametrize("form", ["class", "path", "name", "object"])
    def test_parts_of_ones_own_in_every_form(self, form):
        model, _ = tiny_model()
        adapter: Any = {
            "class": Scaled,
            "path": f"{__name__}:Scaled",
            "name": "test_heads_scaled",
            "object": Scaled(64, 32, scale=2.0),
        }[form]
        if form == "name":
            register_adapter(adapter)(Scaled)
        settings: Any = {} if form == "object" else {"scale": 2.0}
        probes = {"class": SegTokenProbe, "path": f"{__name__}:last_written", "name": "seg_token"}
        probe = probes.get(form, last_written)
        segmenter = {"class": SmallSam, "path": f"{__name__}:SmallSam"}.get(form, tiny_segmenter())
        head = MaskHead.build(model, segmenter, token_id=3, adapter=adapter, probe=probe, **settings)
        assert (type(head.adapter), head.adapter.scale) == (Scaled, 2.0)
        assert head.probe is last_written if form in ("path", "object") else head.probe.token_id == 3
        assert isinstance(head.segmenter, SmallSam) == (form in ("class", "path"))

    def test_settings_for_an_adapter_that_is_built_already(self):
        model, _ = tiny_model()
        with pytest.raises(SegRLError, match=r"adapter settings \['blocks'\]: LinearAdapter is built already"):
            MaskHead.build(model, tiny_segmenter(), token_id=3, adapter=LinearAdapter(64, 32), blocks=1)

    @pytest.mark.parametrize(
        ("output", "text"),
        [
            (torch.zeros(2, 32), "returned prompts (2, 32); expected shape (2, prompts, 32)"),
            (torch.zeros(2, 1, 16), "returned prompts (2, 1, 16); expected shape (2, prompts, 32)"),
            (torch.zeros(1, 1, 32), "returned prompts (1, 1, 32); expected shape (2, prompts, 32)"),
            (None, "returned prompts NoneType; expected shape (2, prompts, 32)"),
            ((torch.zeros(2, 1, 32), [1]), "returned auxiliary outputs list; expected a dict"),
            (
                (torch.zeros(2, 1, 32), {"x": torch.zeros(3)}),
                "returned auxiliary output 'x' (3,); expected shape",
            ),
            ((torch.zeros(2, 1, 32), {"mask": torch.zeros(2)}), "returned auxiliary output 'mask' (2,); expected"),
        ],
    )
    def test_an_adapter_that_returns_something_else(self, output, text):
        class Other(LinearAdapter):
            def forward(self, states, state_mask):
                return output

        head = MaskHead(SegTokenProbe(3), Other(8, 32), tiny_segmenter())
        with pytest.raises(SegRLError) as caught:
            head(noise(2, 1, 8), torch.ones(2, 1, dtype=torch.bool), [seg_input(head)] * 2)
        assert str(caught.value).startswith(f"adapter Other: {text}")

    def test_adapter_settings_arrive(self):
        model, processor = tiny_model()
        add_head(model, processor, blocks=1, num_queries=4, num_heads=2)
        head: Any = find_mask_head(model)
        assert len(head.adapter.blocks) == 1
        assert head(noise(1, 1, 64), torch.ones(1, 1, dtype=torch.bool), [seg_input(head)]).shape == (1, 16, 16)

    @pytest.mark.parametrize("freeze_encoder", [True, False])
    def test_what_trains(self, freeze_encoder):
        head: Any = find_mask_head(pair(freeze_encoder=freeze_encoder)[0])
        trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
        prefixes = {name.rsplit("sam.", 1)[-1].split(".")[0] for name in trained if name.startswith("segmenter.")}
        assert prefixes == {"sam_mask_decoder"} | (set() if freeze_encoder else {"image_encoder"})
        assert {name for name, _ in head.adapter.named_parameters(prefix="adapter")} <= trained


class TestRequest:
    TEXTS = ("<answer>The dark cyst is at [1, 2, 3, 4].<seg></answer>", "<answer>None.</answer>", "A.<seg> B.<seg>")

    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_the_forward_decodes_masks_at_the_positions(self, family):
        model, processor = pair(family)
        head: Any = find_mask_head(model)
        images = [picture(n) for n in range(3)]
        batch = encoded(processor, self.TEXTS, images)
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        inputs = [seg_input(head, n) for n in range(3)]
        plain = model(**batch)
        states = model(**batch, output_hidden_states=True).hidden_states[-1]
        with head.decode_next(index, valid, inputs) as request:
            output = model(**batch)
        assert torch.equal(output.logits, plain.logits)
        assert request.rows.tolist() == [0, 2]
        for mask, row in zip(request.logits, (0, 2), strict=True):
            state = states[row, batch["input_ids"][row].tolist().index(head.probe.token_id)]
            if row == 2:
                place = [t for t, token in enumerate(batch["input_ids"][2].tolist()) if token == head.probe.token_id]
                state = states[row, place[-1]]
            expected = head(state.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool), [seg_input(head, row)])
            assert torch.allclose(mask, expected[0], atol=1e-4)

    def test_only_the_next_forward_decodes(self):
        model, processor = pair()
        head: Any = find_mask_head(model)
        batch = encoded(processor, self.TEXTS[:1], [picture()])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        with head.decode_next(index, valid, [seg_input(head)]) as request:
            model(**batch)
            first = request.logits
            model(**batch)
            assert request.logits is first
        with head.decode_next(index, valid, [seg_input(head)]) as unused:
            pass
        model(**batch)
        assert unused.logits is None

    def test_another_number_of_rows_is_an_error_and_leaves_no_request_behind(self):
        model, processor = pair()
        head: Any = find_mask_head(model)
        batch = encoded(processor, self.TEXTS[:2], [picture(), picture(1)])
        one = torch.zeros(1, 1, dtype=torch.long)
        message = "masks were asked for 1 rows, the forward has 2: the batch was split or packed"
        with pytest.raises(SegRLError, match=message), head.decode_next(one, one.bool(), [seg_input(head)]):
            model(**batch)
        assert model(**batch).logits.shape[0] == 2

    @pytest.mark.parametrize("freeze_encoder", [True, False])
    @pytest.mark.parametrize("probe", ["seg_token", "answer"])
    def test_without_any_token_every_trainable_parameter_gets_a_zero_gradient(self, freeze_encoder, probe):
        model, processor = tiny_headed_model(freeze_encoder=freeze_encoder, probe=probe)
        head: Any = find_mask_head(model)
        batch = encoded(processor, [self.TEXTS[1]] * 2, [picture(), picture(1)])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        with head.decode_next(index, valid, [seg_input(head), seg_input(head, 1)]) as request:
            output = model(**batch)
        assert request.rows.tolist() == []
        assert request.logits.shape == (0, 16, 16)
        (output.logits.square().mean() + request.logits.sum()).backward()
        for name, parameter in head.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or not parameter.grad.any(), name
        assert model.lm_head.weight.grad.any()

    def test_the_language_models_gradient_is_untouched_by_an_unused_mask(self):
        model, processor = tiny_headed_model()
        head: Any = find_mask_head(model)
        batch = encoded(processor, self.TEXTS, [picture(n) for n in range(3)])

        def gradients(ask):
            model.zero_grad(set_to_none=True)
            index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
            if ask:
                with head.decode_next(index, valid, [seg_input(head, n) for n in range(3)]):
                    output = model(**batch)
            else:
                output = model(**batch)
            output.logits.square().mean().backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "mask_head" not in n}

        plain, asked = gradients(False), gradients(True)
        assert plain.keys() == asked.keys()
        assert all(torch.equal(plain[name], asked[name]) for name in plain)

    @pytest.mark.parametrize("freeze_encoder", [True, False])
    def test_a_mask_loss_reaches_the_language_model_the_adapter_and_the_decoder(self, freeze_encoder):
        model, processor = tiny_headed_model(freeze_encoder=freeze_encoder)
        head: Any = find_mask_head(model)
        batch = encoded(processor, self.TEXTS, [picture(n) for n in range(3)])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        with head.decode_next(index, valid, [seg_input(head, n) for n in range(3)]) as request:
            output = model(**batch)
        (request.logits.square().mean() + 0 * output.logits.sum()).backward()
        parts = ("adapter.blocks.0.1.weight", "adapter.projection.weight", "sam_mask_decoder.mask_tokens.weight")
        moved = {
            name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
        }
        for part in (*parts, "language_model.layers.0.self_attn.q_proj.weight", "embed_tokens.weight"):
            assert any(name.endswith(part) for name in moved), part
        encoder = {name for name in moved if "image_encoder" in name}
        assert bool(encoder) is not freeze_encoder
        if not freeze_encoder:
            assert any("trunk.patch_embed" in name for name in encoder)
            assert any("neck" in name for name in encoder)


class Guessing(LinearAdapter):
    """Also returns what it saw of states and images, and, if asked, a first guess of the mask."""

    def __init__(self, input_dim, prompt_dim, *, guess=True):
        super().__init__(input_dim, prompt_dim)
        self.guess, self.heat = guess, nn.Linear(input_dim, 1)

    def forward(self, states, state_mask, *, features, index):
        stride4 = features.tensors[-1][index].mean(1, keepdim=True)
        heat = stride4 * self.heat(states[:, :1])[..., None]
        more = {"mask_prompt": heat} if self.guess else {}
        return super().forward(states, state_mask), {"heatmap": heat[:, 0], **more}


class TestAuxiliaryOutputs:
    TEXTS = ("<answer>A.<seg></answer>", "<answer>None.</answer>", "A.<seg>")

    def asked(self, guess=True, texts=TEXTS) -> Any:
        model, processor = tiny_model()
        torch.manual_seed(0)
        head = MaskHead.build(model, tiny_segmenter(), token_id=seg_token_id(processor), adapter=Guessing, guess=guess)
        attach_mask_head(model, head)
        batch = encoded(processor, texts, [picture(n) for n in range(len(texts))])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        inputs = [seg_input(head, n) for n in range(len(texts))]
        with head.decode_next(index, valid, inputs) as request:
            output = model(**batch)
        return model, head, inputs, request, output

    def test_they_arrive_with_the_rows_that_have_a_mask(self):
        _, head, inputs, request, _ = self.asked()
        assert request.rows.tolist() == [0, 2]
        assert request.aux["heatmap"].shape == (2, 16, 16)
        pixels = torch.stack([inputs[n].pixels for n in (0, 2)])
        stride4 = head.segmenter.encode(pixels).tensors[-1].mean(1)
        shape = request.aux["heatmap"] / stride4
        torch.testing.assert_close(shape, shape[:, :1, :1].expand_as(shape), rtol=1e-3, atol=1e-4)

    def test_the_first_guess_prompts_the_segmenter(self):
        _, head, _, request, _ = self.asked()
        _, _, _, plain, _ = self.asked(guess=False)  # of the same seed
        assert not torch.allclose(request.logits, plain.logits, atol=1e-4)
        assert plain.aux.keys() == {"heatmap"}
        request.logits.sum().backward()
        assert head.adapter.heat.weight.grad.any()  # only through the guess

    def test_without_any_token_they_are_empty_and_all_gradients_zero(self):
        _, head, _, request, output = self.asked(texts=self.TEXTS[1:2])
        assert request.aux["heatmap"].shape == (0, 16, 16)
        (output.logits.square().mean() + request.aux["heatmap"].sum()).backward()
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)

    def test_a_segmenter_that_takes_no_guess(self):
        class Plain(Sam2Segmenter):
            def decode(self, features, prompts, index):
                return super().decode(features, prompts, index)

        head = MaskHead(SegTokenProbe(3), Guessing(8, 32), Plain(tiny_sam2_config()))
        with pytest.raises(SegRLError, match=r"Guessing: returned 'mask_prompt', which Plain\.decode does not take"):
            head(noise(1, 1, 8), torch.ones(1, 1, dtype=torch.bool), [seg_input(head)])


class TestFeatures:
    def test_a_frozen_encoder_runs_once_per_unique_input(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        first, second = seg_input(head, 0), seg_input(head, 1)
        features, index = head.features([first, second, first, first])
        assert head.encoded_images == 2
        assert len(features) == 2
        assert index.tolist() == [0, 1, 0, 0]
        again, _ = head.features([second, first])
        assert head.encoded_images == 2
        assert all(torch.equal(a[0], b[1]) for a, b in zip(again.tensors, features.tensors, strict=True))
        assert not any(tensor.requires_grad for tensor in again.tensors)
        third = seg_input(head, 2)
        mixed, index = head.features([first, third])
        assert head.encoded_images == 3
        alone = head.segmenter.encode(third.pixels[None])
        for joined, own in zip(mixed.tensors, alone.tensors, strict=True):
            assert torch.allclose(joined[index[1]], own[0], atol=1e-5)

    def test_a_training_encoder_runs_every_time_once_per_unique_input(self):
        head: Any = find_mask_head(tiny_headed_model(freeze_encoder=False)[0])
        item = seg_input(head)
        for count in (1, 2):
            features, _ = head.features([item, item])
            assert head.encoded_images == count
            assert len(features) == 1
            assert features.tensors[0].requires_grad
        with torch.no_grad():
            head.features([item])
        assert item.features is None  # its weights change: nothing may be kept

    def test_equal_images_share_a_row_and_the_cache(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache = FeatureCache()

        def keyed(seed, key):
            return SegInput(head.segmenter.preprocess(picture(seed)), key=key)

        first, index = head.features([keyed(0, "a"), keyed(1, "b"), keyed(0, "a")])
        assert (len(first), index.tolist(), head.encoded_images) == (2, [0, 1, 0], 2)
        again, index = head.features([keyed(1, "b"), keyed(2, "c"), keyed(0, "a")])
        assert (len(again), index.tolist(), head.encoded_images) == (3, [0, 1, 2], 3)
        for old, new in zip(first.tensors, again.tensors, strict=True):
            assert torch.equal(old, new[[2, 0]])
        assert (head.cache.hits, head.cache.misses) == (2, 3)
        assert head.cache.nbytes == sum(tensor.nbytes for tensor in again.tensors)
        head.features([seg_input(head, 0)])  # without a key it is an image of its own
        assert (head.encoded_images, head.cache.misses) == (4, 3)

    @pytest.mark.parametrize("memory", [None, 0, 1000])
    def test_an_input_keeps_its_features_even_where_the_cache_has_no_room(self, memory):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache = None if memory is None else FeatureCache(memory)
        item = SegInput(head.segmenter.preprocess(picture()), key="a")
        other = SegInput(item.pixels, same_image=item)
        first, _ = head.features([item])
        second, _ = head.features([other, item])
        assert head.encoded_images == 1
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))

    def test_pixels_are_made_when_they_are_needed_and_once(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache, made = FeatureCache(), []

        def pixels():
            made.append(1)
            return head.segmenter.preprocess(picture())

        item = SegInput(pixels, key="a")
        assert not made
        head.features([item])
        assert len(made) == 1
        assert torch.equal(item.pixels, head.segmenter.preprocess(picture()))
        assert len(made) == 1
        head.features([SegInput(pixels, key="a")])
        assert len(made) == 1

    def test_an_input_is_sent_with_its_pixels_not_with_what_makes_them(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        item = SegInput(functools.partial(head.segmenter.preprocess, picture()), key="a", target=torch.ones(2, 2))
        other = SegInput(functools.partial(head.segmenter.preprocess, picture()), same_image=item)
        sent = pickle.dumps([item, other])
        assert len(sent) < 2 * item.pixels.nbytes
        first, second = pickle.loads(sent)
        assert torch.equal(first.pixels, head.segmenter.preprocess(picture()))
        assert second.same_image is first
        assert second.pixels is first.pixels
        assert (first.key, first.features, first.target.shape) == ("a", None, (2, 2))

    def test_new_weights_are_encoded_anew(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache, pixels = FeatureCache(), head.segmenter.preprocess(picture())
        head.features([SegInput(pixels, key="a")])
        head.segmenter.load_state_dict(tiny_segmenter(seed=1).state_dict())
        features, _ = head.features([SegInput(pixels, key="a")])
        assert head.encoded_images == 2
        for found, expected in zip(features.tensors, tiny_segmenter(seed=1).encode(pixels[None]).tensors, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)

    def test_autocast_has_features_of_its_own(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache, pixels = FeatureCache(), head.segmenter.preprocess(picture())
        for _ in range(2):
            full, _ = head.features([SegInput(pixels, key="a")])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half, _ = head.features([SegInput(pixels, key="a")])
        assert head.encoded_images == 2
        assert full.tensors[1].dtype == torch.float32
        assert half.tensors[1].dtype == torch.bfloat16

    def test_features_made_for_inference_can_be_trained_on(self):
        head: Any = find_mask_head(tiny_headed_model()[0])
        head.cache, pixels = FeatureCache(), head.segmenter.preprocess(picture())
        item = SegInput(pixels, key="a")
        with torch.inference_mode():
            head.features([item])
        for one in (item, SegInput(pixels, key="a")):
            head(noise(1, 1, 64), torch.ones(1, 1).bool(), [one]).sum().backward()
        assert head.encoded_images == 1

    def test_a_copy_of_the_head_has_a_cache_of_its_own(self):
        head: Any = detach_mask_head(tiny_headed_model()[0])
        head.features([seg_input(head)])  # SAM 2 keeps its position encodings from the first image on
        plain = len(pickle.dumps(head))
        head.cache = FeatureCache(123_456_789)
        head.features([SegInput(head.segmenter.preprocess(picture(n)), key=str(n)) for n in range(20)])
        assert head.cache.nbytes > 500_000
        assert len(pickle.dumps(head)) < plain + 1000
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert other.cache is not head.cache
            assert (other.cache.memory_bytes, other.cache.nbytes) == (123_456_789, 0)
            features, _ = other.features([SegInput(head.segmenter.preprocess(picture(0)), key="0")])
            expected, _ = head.features([SegInput(head.segmenter.preprocess(picture(0)), key="0")])
            # kept from a batch of 20, computed again alone: the same up to rounding
            torch.testing.assert_close(features.tensors[0], expected.tensors[0], rtol=1e-5, atol=1e-5)
        assert head.state_dict().keys() == find_mask_head(pair()[0]).state_dict().keys()  # type: ignore[union-attr]

    def test_the_mask_is_that_of_its_own_image(self):
        head: Any = find_mask_head(pair()[0])
        items, state, valid = [seg_input(head, n) for n in range(2)], noise(1, 1, 64), torch.ones(1, 1).bool()
        alone = [head(state, valid, [item]) for item in items]
        order = [1, 0, 0, 1]
        joined = head(state.expand(4, -1, -1), valid.expand(4, -1), [items[n] for n in order])
        for mask, n in zip(joined, order, strict=True):
            assert torch.allclose(mask, alone[n][0], atol=1e-5)
        assert not torch.allclose(alone[0], alone[1], atol=1e-3)

    def test_no_masks(self):
        head: Any = find_mask_head(pair()[0])
        features, _ = head.features([seg_input(head)])
        index = torch.zeros(0, dtype=torch.long)
        assert head.segmenter.decode(features, noise(0, 1, 32), index).shape == (0, 16, 16)


class TestRecord:
    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_states_of_a_generation_equal_those_of_one_forward(self, family):
        model, processor = pair(family)
        head: Any = find_mask_head(model)
        processor.tokenizer.padding_side = "left"
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": picture(n)}, {"type": "text", "text": text}]}]
            for n, text in enumerate(["Find it.", "Where is the dark cyst in this image?"])
        ]
        batch = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )
        start = batch["input_ids"].size(1)
        with head.record(last_only=True) as recording, torch.no_grad():
            output = model.generate(
                **batch, max_new_tokens=6, min_new_tokens=6, suppress_tokens=[model.config.image_token_id]
            )
        ids = output[:, start:].tolist()
        states = generation_states(recording, ids)
        assert states is not None
        assert states.shape == (2, 5, 64)
        written = torch.ones(2, 6, dtype=torch.long)
        whole = {**batch, "input_ids": output, "attention_mask": torch.cat([batch["attention_mask"], written], 1)}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(written)], 1)
        with head.record() as one, torch.no_grad():
            model(**whole)
        assert [tuple(call.shape) for call in one.calls] == [(2, start + 6, 64)]
        assert torch.allclose(states, one.calls[0][:, start:-1], atol=1e-4)

    def test_nothing_is_kept_outside(self):
        model, processor = pair()
        head: Any = find_mask_head(model)
        batch = encoded(processor, ["A"], [picture()])
        with head.record() as recording:
            model(**batch)
        model(**batch)
        assert len(recording.calls) == 1
        assert not recording.calls[0].requires_grad


class TestAttach:
    def test_twice_is_an_error(self):
        model, processor = tiny_headed_model()
        other = MaskHead.build(model, tiny_segmenter(), token_id=seg_token_id(processor))
        with pytest.raises(SegRLError, match=r"Qwen2_5_VLForConditionalGeneration already has a mask head; detach"):
            attach_mask_head(model, other)

    def test_a_model_without_backbone_is_an_error(self):
        model, processor = tiny_model()
        head = MaskHead.build(model, tiny_segmenter(), token_id=seg_token_id(processor))
        with pytest.raises(SegRLError, match=r"Linear has no backbone under base_model_prefix=None"):
            attach_mask_head(nn.Linear(2, 2), head)

    @pytest.mark.parametrize("family", list(FAMILIES))
    def test_detach_restores_the_forward_bit_for_bit(self, family):
        model, processor = tiny_model(family)
        batch = encoded(processor, ["A.<seg>"], [picture()])
        before, keys = model(**batch).logits, list(model.state_dict())
        add_head(model, processor)
        assert torch.equal(model(**batch).logits, before)
        head = detach_mask_head(model)
        assert isinstance(head, MaskHead)
        assert find_mask_head(model) is None
        assert detach_mask_head(model) is None
        assert list(model.state_dict()) == keys
        with head.record() as recording:
            assert torch.equal(model(**batch).logits, before)
        assert recording.calls == []
        attach_mask_head(model, head)
        with head.record() as recording:
            model(**batch)
        assert len(recording.calls) == 1

    @pytest.mark.parametrize("first", ["peft", "head"])
    def test_through_peft(self, first):
        model, processor = tiny_model()
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        if first == "peft":
            wrapped = add_head(get_peft_model(model, config), processor)
        else:
            wrapped = get_peft_model(add_head(model, processor), config)
        head: Any = find_mask_head(wrapped)
        assert head is find_mask_head(wrapped.get_base_model())
        head.freeze()
        batch = encoded(processor, ["A.<seg>"], [picture()])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        with head.decode_next(index, valid, [seg_input(head)]) as request:
            wrapped(**batch)
        request.logits.square().mean().backward()
        lora = {name: p.grad for name, p in wrapped.named_parameters() if "lora_B" in name and "language" in name}
        assert lora
        assert all(gradient is not None and gradient.any() for gradient in lora.values())
        with pytest.raises(SegRLError, match="already has a mask head"):
            attach_mask_head(wrapped, head)
        assert detach_mask_head(wrapped) is head

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_has_a_head_of_its_own(self, how):
        model, processor = tiny_headed_model()
        original: Any = find_mask_head(model)
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        head: Any = find_mask_head(other)
        assert head is not None
        assert head is not original
        batch = encoded(processor, ["A.<seg>"], [picture()])
        index, valid = head.probe(batch["input_ids"], torch.ones_like(batch["input_ids"]))
        with original.record() as recording, head.decode_next(index, valid, [seg_input(head)]) as request:
            other(**batch)
        assert recording.calls == []
        with original.decode_next(index, valid, [seg_input(original)]) as expected:
            model(**batch)
        assert torch.equal(request.logits, expected.logits)
        assert detach_mask_head(other) is head
        with head.record() as recording:
            other(**batch)
        assert recording.calls == []
        with original.record() as recording:
            model(**batch)
        assert len(recording.calls) == 1


class TestFiles:
    @pytest.mark.parametrize("adapter", ["semantic_guided", "linear", "mlp"])
    @pytest.mark.parametrize("probe", ["seg_token", "answer"])
    def test_round_trip(self, adapter, probe, tmp_path):
        model, processor = tiny_headed_model(adapter=adapter, probe=probe, freeze_encoder=False)
        head: Any = find_mask_head(model)
        head.save_pretrained(tmp_path / "new" / "folder")
        again = MaskHead.from_pretrained(tmp_path / "new" / "folder", tokenizer=processor.tokenizer)
        assert again.to_config() == head.to_config()
        expected = head.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
        assert not again.freeze_encoder
        assert type(again.probe) is type(head.probe)
        trains = [(name, p.requires_grad) for name, p in head.named_parameters()]
        assert [(name, p.requires_grad) for name, p in again.named_parameters()] == trains

    def test_a_folder_without_head_is_an_error(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no mask_head\.json; expected a folder written by a segrl trainer"):
            MaskHead.from_pretrained(tmp_path)
        head: Any = find_mask_head(pair()[0])
        with pytest.raises(CheckpointError, match=r"no mask_head\.safetensors"):
            head.load_weights(tmp_path)

    def test_weights_of_another_head_are_an_error(self, tmp_path):
        find_mask_head(tiny_headed_model(adapter="linear")[0]).save_pretrained(tmp_path)  # type: ignore[union-attr]
        head: Any = find_mask_head(tiny_headed_model(adapter="mlp")[0])
        with pytest.raises(CheckpointError, match=r"does not fit this head.*adapter\.layers\.0\.weight"):
            head.load_weights(tmp_path)

    def test_parts_of_a_module_are_found_by_their_path(self, tmp_path):
        head = MaskHead(last_written, Scaled(8, 32, scale=3.0), tiny_segmenter(seed=1))
        head.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "mask_head.json").read_text())
        assert config["adapter"] == {"type": f"{__name__}:Scaled", "input_dim": 8, "prompt_dim": 32, "scale": 3.0}
        assert config["probe"] == {"type": f"{__name__}:last_written"}
        again = MaskHead.from_pretrained(tmp_path)
        assert again.probe is last_written
        states, valid = noise(2, 1, 8), torch.ones(2, 1, dtype=torch.bool)
        expected = head(states, valid, [seg_input(head)] * 2)
        assert torch.equal(again(states, valid, [seg_input(again)] * 2), expected)

    def test_a_head_built_in_code_gets_the_weights(self, tmp_path):
        class Local(LinearAdapter): ...

        MaskHead(SegTokenProbe(3), LinearAdapter(8, 32), tiny_segmenter()).save_pretrained(tmp_path)
        own = MaskHead(SegTokenProbe(3), Local(8, 32), tiny_segmenter(seed=1))
        head = MaskHead.from_pretrained(tmp_path, head=own)
        assert head is own
        expected = MaskHead.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in head.state_dict().items())

    def test_saving_leaves_the_generator_as_it_was(self, tmp_path):
        head: Any = find_mask_head(tiny_headed_model()[0])
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        head.save_pretrained(tmp_path)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("part", ["probe", "adapter", "segmenter"])
    @pytest.mark.parametrize("fault", list(UNSAVED))
    def test_what_does_not_rebuild_a_part_is_found_when_it_is_saved(self, part, fault, tmp_path):
        make, text = UNSAVED[fault]
        base, arguments = {
            "probe": (SegTokenProbe, (3,)),
            "adapter": (LinearAdapter, (8, 32)),
            "segmenter": (Sam2Segmenter, (tiny_sam2_config(),)),
        }[part]
        kind = make(base)
        if fault != "local":
            globals()["Faulty"] = kind
            kind.__module__, kind.__qualname__, kind.__name__ = __name__, "Faulty", "Faulty"
        parts = {"probe": SegTokenProbe(3), "adapter": LinearAdapter(8, 32), "segmenter": tiny_segmenter()}
        head = MaskHead(**{**parts, part: kind(*arguments)})
        with pytest.raises(CheckpointError) as caught:
            head.save_pretrained(tmp_path / "new")
        assert str(caught.value).startswith(f"{part} {kind.__name__} cannot be saved: ")
        assert text in str(caught.value)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("adapter", "text"),
        [
            (Forgetful(8, 32, scale=2.0), "it has other settings ['scale']; return every argument of __init__ from"),
            (Wider(8, 32, hidden=7), "it has other weights ['extra', 'more.0', 'more.1']; return every argument"),
        ],
    )
    def test_a_part_that_is_another_one_when_it_is_built_anew(self, adapter, text, tmp_path):
        head = MaskHead(SegTokenProbe(3), adapter, tiny_segmenter())
        with pytest.raises(CheckpointError) as caught:
            head.save_pretrained(tmp_path / "new")
        assert f"adapter {type(adapter).__name__} cannot be saved: built from to_config(), {text}" in str(caught.value)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(("change", "text"), BAD_FILES)
    def test_damaged_and_newer_files_name_file_and_key(self, change, text, tmp_path):
        MaskHead(SegTokenProbe(3), LinearAdapter(8, 32), tiny_segmenter()).save_pretrained(tmp_path)
        path = tmp_path / "mask_head.json"
        config = json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps(change(config)))
        with pytest.raises(CheckpointError) as caught:
            MaskHead.from_pretrained(tmp_path)
        assert str(caught.value).startswith(f"{path}: {text}")
        assert "\n" not in str(caught.value)

    def test_damaged_weights_name_the_file(self, tmp_path):
        MaskHead(SegTokenProbe(3), LinearAdapter(8, 32), tiny_segmenter()).save_pretrained(tmp_path)
        (tmp_path / "mask_head.safetensors").write_bytes(b"no")
        with pytest.raises(CheckpointError, match=r"mask_head\.safetensors: cannot be read"):
            MaskHead.from_pretrained(tmp_path)

    def test_sizes_are_compared_before_anything_is_made(self, tmp_path):
        """A width of 2 million would take 64 MB; the file says that it is 8."""
        MaskHead(SegTokenProbe(3), LinearAdapter(8, 32), tiny_segmenter()).save_pretrained(tmp_path)
        path = tmp_path / "mask_head.json"
        config = json.loads(path.read_text())
        config["adapter"]["input_dim"] = 2_000_000
        path.write_text(json.dumps(config))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"safetensors: does not fit .*adapter\.\S+ is \(32, 8\) instead of"):
            MaskHead.from_pretrained(tmp_path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB

    def test_files_from_before_there_were_versions(self, tmp_path):
        head = MaskHead(SegTokenProbe(3), LinearAdapter(8, 32), tiny_segmenter())
        head.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "mask_head.json").read_text())
        assert config.pop("version") == 1
        config["segmenter"]["type"] = "Sam2Segmenter"
        (tmp_path / "mask_head.json").write_text(json.dumps(config))
        assert MaskHead.from_pretrained(tmp_path).to_config() == head.to_config()


class TestDecoding:
    def test_completions(self):
        batch = Completions.of([[5, 6, 7], [8], []], "cpu")
        assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
        assert batch.exists.sum(1).tolist() == batch.own.sum(1).tolist() == [3, 1, 0]
        assert batch.last_text_ids() == [[5, 6, 7], [8], []]
        turns = Completions.of([[5, 6, 7, 8, 9], [1, 2]], "cpu", own=[[1, 0, 1, 1, 0], [1, 1]])
        assert turns.last_text_ids() == [[7, 8], [1, 2]]
        turns.known = torch.tensor([[True] * 5, [False] * 5])
        assert turns.probed().tolist() == [[True, False, True, True, False], [False] * 5]

    def test_states_of_single_tokens_are_none(self):
        head: Any = find_mask_head(pair()[0])
        with head.record(last_only=True) as recording:
            head.on_backbone(noise(2, 7, 64))
        assert [tuple(call.shape) for call in recording.calls] == [(2, 1, 64)]
        assert generation_states(recording, [[4], [5]]) is None

    def test_masks_at_equals_one_by_one(self):
        logits, sizes = noise(4, 16, 16), [(40, 30), (16, 16), (40, 30), (5, 90)]
        masks = masks_at(logits, sizes)
        assert [mask.shape for mask in masks] == sizes
        assert all(mask.dtype == bool for mask in masks)
        assert np.array_equal(masks[1], logits[1].numpy() > 0)
        for mask, one, size in zip(masks, logits, sizes, strict=True):
            full = F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            assert np.array_equal(mask, full.numpy() > 0)
        assert masks_at(noise(0, 16, 16), []) == []

    def rows(self, texts, **tags):
        tokenizer = tokenizer_with(WHOLE)
        frame = Frame("original_px", (64, 48), None)
        predictions = [parse_completion(text, frame) for text in texts]
        return tokenizer, predictions, [tokenizer(text)["input_ids"] for text in texts]

    def test_rows_get_masks_from_the_state_at_their_token(self):
        good = "<think>A.</think><answer>One at [1, 2, 3, 4].<seg></answer>"
        tokenizer, predictions, ids = self.rows([good, "<think>A.</think><answer>No.</answer>", good + " x"])
        head = MaskHead(SegTokenProbe(seg_token_id(tokenizer)), LinearAdapter(8, 32), tiny_segmenter())
        states, inputs = noise(3, max(map(len, ids)) - 1, 8), [seg_input(head, n) for n in range(3)]
        results = add_masks(head, predictions, completions(ids, states), inputs, [(48, 64), (48, 64), (20, 30)])
        assert [result.status for result in results] == [p.status for p in predictions]
        assert results[0].valid
        assert results[1].mask is None
        for n, size in ((0, (48, 64)), (2, (20, 30))):
            place = ids[n].index(seg_token_id(tokenizer))
            logits = head(states[n : n + 1, place : place + 1], torch.ones(1, 1).bool(), [inputs[n]])
            mask = results[n].mask
            assert mask is not None
            assert mask.shape == size
            expected = F.interpolate(logits[:, None].detach(), size=size, mode="bilinear", align_corners=False)[0, 0]
            assert (mask == (expected.numpy() > 0)).mean() > 0.999

    def test_the_letters_without_the_token_earn_no_mask(self):
        tokenizer = tokenizer_with(WHOLE)
        text = "<think>A.</think><answer>One at [1, 2, 3, 4].<seg></answer>"
        prediction = parse_completion(text, Frame("original_px", (64, 48), None))
        assert prediction.valid
        token_id = seg_token_id(tokenizer)
        letters = tokenizer_with(WHOLE[:-1])(text)["input_ids"]
        assert token_id not in letters
        head = MaskHead(SegTokenProbe(token_id), LinearAdapter(8, 32), tiny_segmenter())
        states = noise(1, len(letters), 8)
        (result,) = add_masks(head, [prediction], completions([letters], states), [seg_input(head)], [(48, 64)])
        assert (result.mask, result.has_seg, result.status) == (None, False, Status.NO_SEG_TOKEN)

    def test_a_token_that_ends_a_cut_off_completion_has_no_mask(self):
        tokenizer, predictions, ids = self.rows(["<think>A.</think><answer>One at [1, 2, 3, 4].<seg>"])
        head = MaskHead(SegTokenProbe(seg_token_id(tokenizer)), LinearAdapter(8, 32), tiny_segmenter())
        states = noise(1, len(ids[0]) - 1, 8)
        (result,) = add_masks(head, predictions, completions(ids, states), [seg_input(head)], [(48, 64)])
        assert result.mask is None
        assert not result.valid
        assert result.status is predictions[0].status

    def test_without_states_there_are_no_masks(self):
        tokenizer, predictions, ids = self.rows(["<seg>"])
        head = MaskHead(SegTokenProbe(seg_token_id(tokenizer)), LinearAdapter(8, 32), tiny_segmenter())
        (result,) = add_masks(head, predictions, completions(ids, None), [seg_input(head)], [(48, 64)])
        assert result.mask is None
        assert head.encoded_images == 0


class TestRunningStandardisation:
    """`SemanticGuidedAdapter(standardise=True)`: running statistics of the states, against plain numpy."""

    def test_follows_mean_and_variance_and_ignores_empty_batches(self):
        adapter = SemanticGuidedAdapter(24, 16, standardise=True)
        batches = [noise(5, 24, seed=1) * 3 + 2, noise(0, 24), noise(7, 24, seed=2)]
        mean, variance = np.zeros(24), np.ones(24)
        for batch in batches:
            adapter.observe(batch)
            if len(batch):
                values = batch.double().numpy()
                variance += 0.1 * (((values - mean) ** 2).mean(0) - variance)
                mean += 0.1 * (values.mean(0) - mean)
        np.testing.assert_allclose(adapter.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(adapter.variance, variance, rtol=1e-5)

    def test_prompts_are_those_of_the_standardised_states(self):
        torch.manual_seed(0)
        adapter = SemanticGuidedAdapter(24, 16, standardise=True)
        plain = SemanticGuidedAdapter(24, 16)
        plain.load_state_dict({k: v for k, v in adapter.state_dict().items() if k not in ("mean", "variance")})
        adapter.observe(noise(9, 24, seed=3) + 5)
        states, valid = noise(4, 2, 24, seed=4), torch.ones(4, 2, dtype=torch.bool)
        standardised = (states - adapter.mean) / (adapter.variance + 1e-4).sqrt()
        torch.testing.assert_close(adapter(states, valid), plain(standardised, valid))

    def test_only_training_batches_with_a_token_count(self):
        """A row without `<seg>` decodes a stand-in state, which must not enter the statistics; nor does evaluation."""
        model, processor = tiny_model("qwen2_5_vl")
        model = add_head(model, processor, standardise=True)
        head = find_mask_head(model)
        assert head is not None
        side = head.segmenter.image_size
        inputs = [SegInput(torch.zeros(3, side, side))] * 2
        states = noise(2, 6, model.config.get_text_config().hidden_size, seed=5)

        def forward(valid):
            with head.decode_next(torch.tensor([[3], [4]]), torch.tensor(valid), inputs):
                head.on_backbone(states)

        adapter: Any = head.adapter
        head.train()
        forward([[False], [False]])
        assert not adapter.mean.any()
        head.eval()
        forward([[True], [True]])
        assert not adapter.mean.any()
        head.train()
        forward([[False], [True]])
        torch.testing.assert_close(adapter.mean, 0.1 * states[1, 4])
