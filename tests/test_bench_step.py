"""`benchmarks/bench_step.py` and its parts: fair arms, right counts, the arithmetic, and the plot."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from marks import slow_to_build
from script_modules import script_modules
from torch.utils.flop_counter import FlopCounterMode

from segrl.predictions import frame_for, parse_completion

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SEGMENTS = ("core_seg", "medvol", "short")


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules by name."""
    with script_modules(BENCHMARKS) as modules:
        yield modules


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
@slow_to_build
def core_seg(tmp_path_factory):
    """The report of one quick round with memory, and what was printed."""
    path = tmp_path_factory.mktemp("bench") / "core_seg.json"
    done = run("bench_step.py", "--quick", "--rounds", 1, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
@slow_to_build
def full_size_settings(tmp_path_factory):
    """The report of the GPU benchmark with tiny models on the CPU, with the old and reference passes."""
    path = tmp_path_factory.mktemp("bench") / "3b.json"
    options = ("--quick", "--rounds", 1, "--warmup", 0, "--no-memory", "--shape", "medvol", "--generations", 2)
    options += ("--beta", 0.1, "--rollouts", 2, "--device", "cpu", "--peak-flops", 1e12)
    done = run("gpu/bench_step_3b.py", *options, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
@slow_to_build
def profiled(tmp_path_factory):
    """The report of both arms without generation, and the profile."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--quick", "--rounds", 1, "--warmup", 0, "--no-memory", "--device", "cpu", "--peak-flops", 1e12)
    options += ("--loss-only", "--profile", folder / "profile.txt")
    done = run("gpu/bench_step_3b.py", *options, "--json", folder / "loss.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "loss.json").read_text()), (folder / "profile.txt").read_text()


@pytest.fixture(scope="module")
@slow_to_build
def one_arm(tmp_path_factory):
    """The report of segrl alone, after a brief warm-up, without checkpointing."""
    path = tmp_path_factory.mktemp("bench") / "one.json"
    options = ("--quick", "--shape", "short", "--rounds", 1, "--steps", 2, "--no-memory", "--brief-warmup")
    options += ("--device", "cpu", "--no-checkpointing", "--arms", "segrl")
    done = run("gpu/bench_step_3b.py", *options, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


# ---- what is compared ------------------------------------------------------------------------------------------------


class TestRun:
    def test_the_language_model_computes_what_the_shape_says(self, core_seg):
        result = core_seg[0]["results"][0]
        shape, group = result["shape"], result["generations"]
        prompt, answer, rows = shape["prompt_tokens"], shape["completion_tokens"], shape["prompts"] * group
        theirs = result["arms"]["trl"]["counts"]
        assert theirs["lm_tokens/prefill"] == rows * prompt
        assert theirs["lm_tokens/decode"] == rows * (answer - 1)
        assert theirs["lm_tokens/forward"] == rows * (prompt + answer)
        assert theirs["vision_images/forward"] == theirs["vision_images/generate"] == rows
        assert "sam_encodes" not in theirs

    def test_sharing_computes_a_prompt_once(self, core_seg):
        result = core_seg[0]["results"][0]
        shape, group, ours = result["shape"], result["generations"], result["arms"]["segrl"]["counts"]
        prompts, answers = shape["prompts"], shape["prompts"] * group * shape["completion_tokens"]
        assert ours["lm_tokens/forward"] == prompts * shape["prompt_tokens"] + answers
        assert ours["lm_tokens/decode"] == result["arms"]["trl"]["counts"]["lm_tokens/decode"]
        assert ours["sam_encodes"] == prompts
        assert "lm_forwards/masks" not in ours

    def test_both_arms_are_given_the_same_answers(self, core_seg):
        arms = core_seg[0]["results"][0]["arms"]
        assert 0 < arms["trl"]["rewards"]["box_f1"] < 1
        assert arms["segrl"]["rewards"]["box_f1"] == pytest.approx(arms["trl"]["rewards"]["box_f1"], abs=1e-6)
        assert arms["segrl"]["rewards"]["format"] == 0.75
        assert arms["segrl"]["rewards"]["dual_granularity_mask"] > -1

    def test_phases_add_up_to_the_step(self, core_seg):
        for arm in core_seg[0]["results"][0]["arms"].values():
            for step in arm["steps"]:
                phases = {name: value for name, value in step.items() if name not in ("loss", "step")}
                assert sum(phases.values()) == pytest.approx(step["step"])
                assert step["loss"] == pytest.approx(step["forward"] + step["backward"])
                assert min(phases["generate"], phases["forward"], phases["backward"], phases["optimizer"]) > 0
        assert core_seg[0]["results"][0]["arms"]["trl"]["seconds"]["masks"] == 0
        assert core_seg[0]["results"][0]["arms"]["segrl"]["seconds"]["masks"] > 0

    def test_memory_is_that_of_a_process_of_its_own(self, core_seg):
        for arm in core_seg[0]["results"][0]["arms"].values():
            assert 100 * 2**20 < arm["memory"]["start"] <= arm["memory"]["peak"] < 8 * 2**30

    def test_the_report_names_its_circumstances_and_no_paths(self, core_seg):
        report, printed = core_seg
        assert report["command"] == "benchmarks/bench_step.py --quick --rounds 1"
        assert report["versions"]["trl"]
        assert report["threads"] >= 1
        assert str(Path.home()) not in json.dumps(report)
        assert "share of rewards in a step" in printed

    def test_goals_say_whether_they_are_met(self, core_seg):
        report, printed = core_seg
        goals = {goal["name"]: goal for goal in report["results"][0]["goals"]}
        assert all(goal["met"] == (goal["value"] <= goal["goal"] + 1e-9) for goal in goals.values())
        assert goals["language-model forwards for masks"] == {
            "name": "language-model forwards for masks",
            "value": 0.0,
            "goal": 0.0,
            "met": True,
        }
        assert "PASS" in printed

    @pytest.mark.long
    def test_old_and_reference_passes(self, full_size_settings):
        report, printed = full_size_settings
        result = report["results"][0]
        shape, theirs = result["shape"], result["arms"]["trl"]
        rows = 2 * shape["prompts"] * result["generations"]
        assert theirs["counts"]["lm_tokens/old_ref"] == 2 * rows * (shape["prompt_tokens"] + shape["completion_tokens"])
        assert theirs["seconds"]["old_ref"] > 0
        assert theirs["counts"]["lm_forwards/forward"] == 2
        assert result["floor"]["flops"]["trl"]["old_ref"] > 0
        assert report["settings"]["lora"] == 64
        assert "loss, MFU" in printed


class TestProfile:
    @pytest.mark.long
    def test_nothing_is_generated_for_the_loss_alone(self, profiled):
        report, _ = profiled
        result = report["results"][0]
        assert report["settings"]["generates"] is False
        assert report["command"].endswith("--loss-only")  # and no path
        shape, rows = result["shape"], result["shape"]["prompts"] * result["generations"]
        counts = {arm: result["arms"][arm]["counts"] for arm in ("trl", "segrl")}
        assert not any("decode" in name or "prefill" in name for found in counts.values() for name in found)
        assert counts["trl"]["lm_tokens/forward"] == rows * (shape["prompt_tokens"] + shape["completion_tokens"])
        assert {goal["name"] for goal in result["goals"]} == {
            "vision-tower encodes per unique image",
            "SAM encodes per unique image",
        }

    @pytest.mark.long
    def test_both_arms_say_where_the_time_goes(self, parts, profiled):
        report, text = profiled
        theirs, ours = text.split("== ")[1:]
        assert theirs.startswith("core_seg, G=4, trl: ")
        assert ours.startswith("core_seg, G=4, segrl: ")
        for arm, table in (("trl", theirs), ("segrl", ours)):
            lines = [(line[:22].strip(), line[22:].split()) for line in table.splitlines()]
            spent = {part: float(values[-2]) for part, values in lines if part in (*parts["step_profile"].PARTS, "all")}
            assert spent["decoder"] > 0 < spent["LoRA"]
            columns = dict(lines)["LoRA"]
            assert float(columns[0]) == 0 < float(columns[1])  # products but no attention, also in the second forward
            assert (spent["mask head"] > 0) == (arm == "segrl")  # A has none
            assert (spent["vision tower"] > 0) == (arm == "trl")  # B has kept what it saw
            assert sum(spent.values()) == pytest.approx(2 * spent["all"], abs=0.1)
            found = report["results"][0]["arms"][arm]["repeated_loss"]
            assert len(found["seconds"]) == 5
            assert spent["all"] == pytest.approx(1e3 * found["work_seconds"], abs=0.1)
            assert "MFU" in table
            assert "aten::mm" in table

    @pytest.mark.long
    def test_one_arm_after_a_brief_warm_up(self, one_arm):
        report, printed = one_arm
        result = report["results"][0]
        assert report["settings"]["checkpointing"] is False
        assert set(result["arms"]) == {"segrl"}
        assert result["ratio"] == {}
        assert len(result["arms"]["segrl"]["steps"]) == 2
        answer = result["shape"]["completion_tokens"]
        assert result["arms"]["segrl"]["counts"]["lm_forwards/decode"] == answer - 1  # the measured steps are whole
        assert "lm_forwards/masks" not in result["arms"]["segrl"]["counts"]
        assert "B  segrl" in printed
        assert "A  TRL" not in printed

    def test_work_is_sorted_by_part_and_kind(self, parts):
        """A product in the decoder and its gradient on another thread, a cast for LoRA, and what belongs nowhere."""
        profile = parts["step_profile"]

        def span(kind, name, thread, start, length, **given):
            return {"ph": "X", "cat": kind, "name": name, "tid": thread, "ts": start, "dur": length, "args": given}

        def forward(number):
            return {"Sequence number": number, "Fwd thread id": 0}

        events = [
            span("user_annotation", "part: decoder", 1, 0, 100),
            span("cpu_op", "aten::mm", 1, 10, 10, **forward(5)),
            span("cuda_runtime", "cudaLaunchKernel", 1, 12, 2, correlation=1),
            span("user_annotation", "part: LoRA", 1, 30, 20),
            span("cpu_op", "aten::copy_", 1, 31, 5, **forward(6)),
            span("cuda_runtime", "cudaLaunchKernel", 1, 32, 1, correlation=2),
            span("cpu_op", "aten::mul", 1, 120, 5, **forward(7)),
            span("cuda_driver", "cuLaunchKernel", 1, 121, 1, correlation=4),
            span("cpu_op", "MmBackward0", 2, 200, 20, **{"Sequence number": 5, "Fwd thread id": 1}),
            span("cpu_op", "aten::mm", 2, 205, 5),
            span("cuda_runtime", "cudaLaunchKernel", 2, 206, 1, correlation=3),
            {"ph": "M", "name": "process_name"},
            *(
                span("kernel", f"kernel {number}", 7, 300 + number, length, correlation=number)
                for number, length in [(1, 7), (2, 3), (3, 11), (4, 2), (99, 1)]
            ),
        ]
        work = profile.sort_work(events, cuda=True)
        assert work.cells == {
            ("decoder", "matrix products"): 18,
            ("LoRA", "copies and casts"): 3,
            (profile.OUTSIDE, profile.OTHER): 3,
        }
        assert work.kernels["kernel 3"] == 11
        assert work.calls.total() == 5
        text = profile.report(work, [48e-6], cuda=True)
        assert "the GPU waits 50.0%" in text
        on_cpu = profile.sort_work(events, cuda=False)
        assert on_cpu.cells["decoder", "matrix products"] == 10 + 5
        assert on_cpu.cells["decoder", profile.OTHER] == on_cpu.kernels["MmBackward0"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--generations", "1"), "--generations must be at least 2"),
        (("--rounds", "0"), "--rounds 0: expected 1 or more"),
        (("--shape", "long"), "invalid choice: 'long'"),
    ],
)
def test_wrong_options(parts, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        parts["bench_step"].main(options)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_needs_a_gpu():
    done = run("gpu/bench_step_3b.py")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert "--quick" in done.stderr


# ---- inputs ----------------------------------------------------------------------------------------------------------


class TestInputs:
    @pytest.mark.parametrize("name", SEGMENTS)
    def test_prompts_have_the_length_of_the_shape(self, parts, name):
        shapes = parts["step_shapes"]
        quick, full = shapes.QUICK[name], shapes.SHAPES[name]
        _, processor = shapes.build_model(quick)
        for shape in (quick, replace(full, model=quick.model)):
            text = shapes.prompt_text(shape, processor, "Case 3. Segment the dark cyst in this ct image.")
            length = shapes.prompt_length(shape, processor, text)
            assert length == shape.prompt_tokens or (length > shape.prompt_tokens and "normal tissue" not in text)
            assert length <= 1.05 * shape.prompt_tokens

    @pytest.mark.parametrize("name", SEGMENTS)
    def test_answers(self, parts, name):
        shapes = parts["step_shapes"]
        shape = shapes.QUICK[name]
        _, processor = shapes.build_model(shape)
        rows = shapes.build_rows(shape, processor, 3, seed=1)
        prompts = [
            processor.tokenizer(row["prompt"][0]["content"])["input_ids"]
            for row in itertools.islice(itertools.cycle(rows), 24)
        ]
        written = shapes.Answers(shape, processor, rows)(prompts)
        assert {len(ids) for ids in written} == {shape.completion_tokens}
        assert len(set(map(tuple, written))) == len(written)
        frame = frame_for(processor, (shape.image_px, shape.image_px))
        texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        status = Counter(parse_completion(text, frame).status.value for text in texts)
        assert status == {"valid": 18, "extra_text": 6}
        assert all(text.count("<seg>") == 1 for text in texts)

    def test_no_image_occurs_twice(self, parts):
        shapes = parts["step_shapes"]
        shape = shapes.QUICK["medvol"]
        _, processor = shapes.build_model(shape)
        rows = [*shapes.build_rows(shape, processor, 2, seed=0), *shapes.build_rows(shape, processor, 2, seed=1)]
        assert all(len(row["images"]) == shape.images for row in rows)
        assert len({image.tobytes() for row in rows for image in row["images"]}) == 4 * shape.images

    def test_answers_of_another_length_are_refused(self, parts, tmp_path):
        arms, shapes = parts["step_arms"], parts["step_shapes"]
        shape = replace(shapes.QUICK["short"], prompts=1)
        trainer, answers = arms.build_trainer("trl", shape, 2, arms.Settings(), 1, 0, str(tmp_path))
        with (
            pytest.raises(SystemExit, match="differ in length"),
            arms.replayed(lambda prompts: [ids[:-1] for ids in answers(prompts)]),
        ):
            trainer.train()

    def test_replaying_ends(self, parts):
        from trl.trainer.grpo_trainer import GRPOTrainer

        before = GRPOTrainer._generate_single_turn
        with parts["step_arms"].replayed(lambda prompts: []):
            assert GRPOTrainer._generate_single_turn is not before
        assert GRPOTrainer._generate_single_turn is before


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(parts):
    shapes = parts["step_shapes"]
    model, _ = shapes.build_model(shapes.QUICK["core_seg"])
    model.set_attn_implementation("eager")  # whose products are all counted
    return model.eval().requires_grad_(False)


class TestArithmetic:
    def test_decoder_as_counted(self, parts, model):
        cost = parts["step_floor"].Cost(parts["step_shapes"].QUICK["core_seg"].model)
        found = {}
        for tokens in (50, 100):
            with FlopCounterMode(display=False) as counter:
                model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
            found[tokens] = counter.get_total_flops()
            expected = tokens * cost.token + tokens**2 * cost.pair  # eager attention computes the masked half, too
            assert found[tokens] == pytest.approx(expected, rel=0.01)
        assert found[100] > 2 * found[50]

    def test_output_layer_as_counted(self, parts, model):
        cost = parts["step_floor"].Cost(parts["step_shapes"].QUICK["core_seg"].model)
        with FlopCounterMode(display=False) as counter:
            model.lm_head(torch.zeros(1, 7, model.config.text_config.hidden_size))
        assert counter.get_total_flops() == 7 * cost.scored

    @pytest.mark.parametrize("side", [84, 168, 252])
    def test_vision_tower_as_counted(self, parts, model, side):
        shape = replace(parts["step_shapes"].QUICK["core_seg"], image_px=side)
        patches = (side // 14) ** 2
        with FlopCounterMode(display=False) as counter:
            model.model.visual(torch.zeros(patches, 3 * 2 * 14**2), torch.tensor([[1, side // 14, side // 14]]))
        assert counter.get_total_flops() == pytest.approx(parts["step_floor"].image_flops(shape), rel=0.01)

    @pytest.mark.slow
    def test_more_answers_lower_the_floor(self, parts):
        arithmetic, settings = parts["step_floor"].arithmetic, parts["step_arms"].Settings()
        shape = parts["step_shapes"].SHAPES["core_seg"]
        ratios = [arithmetic(shape, group, settings)["ratio"] for group in (4, 8, 16)]
        assert ratios[0]["loss"] > ratios[1]["loss"] > ratios[2]["loss"]
        # by hand, without attention, images and the output layer: (430 + 4 * 200) / (4 * 630)
        assert ratios[0]["loss"] == pytest.approx(1230 / 2520, rel=0.15)

    def test_without_sharing_masks_only_add(self, parts):
        arithmetic, settings = parts["step_floor"].arithmetic, parts["step_arms"].Settings(share=False)
        floor = arithmetic(parts["step_shapes"].QUICK["core_seg"], 4, settings)
        assert floor["ratio"]["generate"] == 1
        assert floor["ratio"]["loss"] > 1
        assert "masks" not in floor["ratio"]

    def test_settings_change_the_arithmetic(self, parts):
        arithmetic, settings = parts["step_floor"].arithmetic, parts["step_arms"].Settings()
        shape = parts["step_shapes"].QUICK["core_seg"]

        def trl(**changes):
            return arithmetic(shape, 4, replace(settings, **changes))["flops"]["trl"]

        plain = trl()
        assert trl(lora=8)["backward"] < plain["backward"] < trl(vision="trained")["backward"]
        assert plain["recomputed"] == 0 < trl(checkpointing=True)["recomputed"]
        assert plain["old_ref"] == 0
        assert trl(rollouts=2)["old_ref"] == pytest.approx(2 * plain["forward"])
        assert trl(beta=0.1)["old_ref"] == pytest.approx(plain["forward"])


# ---- plot ------------------------------------------------------------------------------------------------------------


class TestPlot:
    def test_bars_are_parts_of_trls_step(self, parts, core_seg):
        plot = parts["plot_step"]
        report = core_seg[0]
        root = ElementTree.fromstring(plot.draw([report]))
        space = "{http://www.w3.org/2000/svg}"
        bars = [rect for rect in root.iter(f"{space}rect") if rect.get("height") == str(plot.BAR - 3)]
        rows = sorted({float(bar.get("y", "")) for bar in bars})
        assert len(rows) == 2
        widths = [sum(float(bar.get("width", "")) for bar in bars if float(bar.get("y", "")) == row) for row in rows]
        arms = report["results"][0]["arms"]
        ratio = arms["segrl"]["seconds"]
        ours = sum(ratio[phase] for _, phases, _ in plot.PARTS for phase in phases)
        theirs = sum(arms["trl"]["seconds"][phase] for _, phases, _ in plot.PARTS for phase in phases)
        assert widths[1] / widths[0] == pytest.approx(ours / theirs, rel=0.02)
        assert "core_seg, 140 + 60, G = 4" in [text.text for text in root.iter(f"{space}text")]

    def test_every_phase_is_drawn(self, parts):
        drawn = {phase for _, phases, _ in parts["plot_step"].PARTS for phase in phases}
        assert drawn == set(parts["bench_step"].PHASES)

    def test_command(self, core_seg, tmp_path):
        source, target = tmp_path / "result.json", tmp_path / "assets" / "step.svg"
        source.write_text(json.dumps(core_seg[0]))
        done = run("plot_step.py", source, "-o", target)
        assert done.returncode == 0, done.stderr
        assert ElementTree.parse(target).getroot().tag.endswith("svg")

    def test_nothing_to_draw(self, parts):
        with pytest.raises(SystemExit, match="no results"):
            parts["plot_step"].draw([{"results": []}])
