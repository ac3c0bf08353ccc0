"""`python -m bench.report`: what is read, what is drawn, and that nothing in a picture lies over anything
else.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bench import drawing, figures, report
from bench.figures import Figure
from bench.record import INTERPRETER_NOTE
from smollm2.cli import run_command
from smollm2.errors import LoadError, UsageError

ORIGIN = {
    "device": "A GPU", "versions": {"torch": "2.13.0"}, "commit": "a" * 40, "date": "2026-11-25T10:00:00",
}  # fmt: skip


def entry(seconds: float, **facts: Any) -> dict[str, Any]:
    return {"stats": {"median": seconds}, "extra_info": {**ORIGIN, "dtype": "bf16", **facts}}


def generated(
    variant: str, rate: float, batch: int = 1, prompt: int = 32, read: float | None = 20.0
) -> list[dict[str, Any]]:
    facts = {"variant": variant, "batch": batch, "prompt_tokens": prompt}
    measured = {} if read is None else {"read_gb_per_s": read}
    decode = {"tokens_per_second": rate, "bytes_per_token": 10**8, "copy_gb_per_s": 90.0, **measured}
    return [
        entry(0.5, phase="prefill", tokens_per_second=10 * rate, **facts),
        entry(1 / rate, phase="decode", **decode, **facts),
    ]


ROOF = {"copy_gb_per_s": 100.0, "matmul_tflops": 1.0}
SUITES = {
    "machine_info": {},
    "benchmarks": [
        *generated("eager bf16", 20.0), *generated("transformers bf16", 19.0),
        *generated("llama.cpp F16", 90.0),
        *generated("eager bf16", 15.0, prompt=512), *generated("eager bf16", 60.0, batch=8),
        # 1e6 bytes at 1e11 bytes/s are 10 us, 1e6 operations 1 us: the floor is 10 us
        entry(2e-5, op="swiglu", phase="forward", variant="reference", bytes=10**6, flops=10**6, us=20.0,
            roof=ROOF, batch=1, length=64),
        entry(3e-5, op="swiglu", phase="backward", variant="compile", bytes=10**6, flops=0, us=30.0,
            roof=ROOF, batch=1, length=64),
        entry(9.0, op="swiglu", phase="forward", variant="triton", note=INTERPRETER_NOTE, batch=1, length=64),
        *[
            entry(1.0, op="loss memory", variant=name, tokens=n, peak_memory_bytes=n * share,
                logits_bytes=n * 98304)
            for n in (1024, 2048) for name, share in (("reference", 100_000), ("all logits", 500_000))
        ],
        entry(1.0, phase="data", variant="text, workers=0"),
    ],
}  # fmt: skip
STEP = {
    **ORIGIN,
    "step_peers": {
        "batch": 2, "length": 512,
        "results": {
            "bf16": {
                "variants": {
                    "ours": {"step_ms": 1024.0}, "transformers": {"step_ms": 2048.0},
                    "ours+compile": {"failed": "no compiler"},
                },
                "matmul_floor_ms": 512.0,
            }
        },
    },
}  # fmt: skip
LADDER = {
    **ORIGIN,
    "ladder": {
        "model": "135M", "dtype": "bfloat16", "batch": 2, "length": 512, "backend": "triton",
        "rungs": {
            "plain eager": {"tokens_per_second": 100.0, "peak_mb": 900.0,
                "launches": {"forward": 10, "backward": 20, "update": 5}},
            "graph capture": {"tokens_per_second": 300.0, "launches": {"step": 1}},
            "compile": {"failed": "no time was left"},
        },
    },
}  # fmt: skip
ROOFLINE = {
    **ORIGIN,
    "roofline": {
        "dtype": "bf16", "batch": 2, "length": 512, "context": 512,
        "step": {
            "operations_ms": {"swiglu": {"torch": {"forward": 2.0, "backward": 4.0}},
                "loss": {"torch": {"forward+backward": 9.0}}},
            "floors_ms": {"swiglu": {"forward": 1.0, "backward": 2.0},
                "loss": {"forward": 1.0, "backward": 2.0}},
            "whole_ms": {"torch": 20.0}, "floor_ms": 6.0,
        },
    },
}  # fmt: skip


def timed(op: str, phase: str, variant: str, us: float, gb_per_s: float, tflops: float) -> dict[str, Any]:
    facts = {"op": op, "phase": phase, "variant": variant, "us": us, "gb_per_s": gb_per_s, "tflops": tflops}
    return {**facts, "percent_of_roof": 50.0, "spread": 0.01}


OTHER = {**ORIGIN, "device": "A GPU of another kind"}
ATTENTION = [
    ("attention", 10.0), ("attention 2048", 30.0), ("attention documents 512", 8.0),
    ("attention documents 2048", 9.0),
]  # fmt: skip
KERNELS = {
    **OTHER,
    "kernels": {
        "dtype": "bf16", "batch": 32, "length": 512,
        "roof": {"copy_gb_per_s": 2000.0, "matmul_tflops": 800.0},
        "rows": [
            timed("swiglu", "forward", "triton", 50.0, 2900.0, 0.0),
            timed("swiglu", "forward", "reference", 900.0, 161.0, 0.0),
            timed("swiglu", "backward", "triton", 90.0, 2800.0, 0.0),
            timed("swiglu", "backward", "math", 95.0, 2700.0, 0.0),
            *[
                timed(op, phase, variant, 60.0, 900.0, share * tflops) for op,
                tflops in ATTENTION for phase in ("forward", "backward")
                for variant, share in (("triton", 8.0), ("cudnn", 9.0), ("flex", 7.0))
            ],
            timed("attention", "forward", "math", 2000.0, 27.0, 5.0),
            {"op": "attention", "variant": "flash-attn", "failed": "not installed"},
        ],
    },
}  # fmt: skip


def decoded(variant: str, batch: int, keys: int, rate: float) -> dict[str, Any]:
    facts = {"variant": variant, "backend": variant.split()[0], "batch": batch, "keys": keys}
    return {**facts, "tokens_per_second": rate, "bytes": 10**9}


RATES = (("triton captured", 1500.0), ("transformers", 50.0), ("triton eager", 90.0))
GENERATION = {
    **OTHER,
    "generation": {
        "dtype": "bfloat16", "bandwidth": {"read_gb_per_s": 3000.0},
        "rows": [
            *[decoded(name, batch, keys, rate * batch) for keys in (1024, 64) for batch in (1, 64) for name,
                rate in RATES],
            {"variant": "triton captured", "backend": "triton", "batch": 256, "keys": 64,
                "failed": "no time was left"},
        ],
        "prefill": [
            {"backend": name, "batch": 32, "tokens": 512, "us": us, "tokens_per_second": 32 * 512e6 / us,
                "tflops": 4e6 / us}
            for name, us in (("triton", 22000.0), ("torch", 32000.0))
        ],
    },
}  # fmt: skip
TRAIN = {
    **OTHER,
    "step": {
        "model": "135M", "batch": 32, "length": 512,
        "variants": {
            "torch": {"tokens_per_second": 1e5, "step_ms": 163.84, "peak_memory_gb": 11.85, "mfu": None},
            "triton+graph": {"tokens_per_second": 4e5, "step_ms": 40.96, "peak_memory_gb": 12.06,
                "mfu": 0.348},
            "torch+compile": {"failed": "stopped"},
        },
    },
}  # fmt: skip
SERVE = {
    **ORIGIN,
    "serve": {
        "max_tokens": 64,
        "rows": [
            {"clients": clients, "variant": variant, "tokens_per_second": rate * clients**0.5,
                "client_tokens_per_second": rate, "first_token_ms": 9.0, "first_token_p95_ms": 19.0}
            for clients in (1, 4, 16)
            for variant, rate in (("compiled bf16", 70.0), ("llama.cpp F16", 60.0), ("compiled int8", 120.0))
        ] + [{"clients": 4, "variant": "llama.cpp Q8_0", "failed": "not installed"}],
    },
}  # fmt: skip
ALL = {
    "suites.json": SUITES, "step.json": STEP, "ladder.json": LADDER, "roofline.json": ROOFLINE,
    "kernels.json": KERNELS, "serve.json": SERVE,
}  # fmt: skip
GPU = {"kernels.json": KERNELS, "generation.json": GENERATION, "train.json": TRAIN}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def by_key(found: list[Figure]) -> dict[tuple[str, str, str], Figure]:
    return {figure.key: figure for figure in found}


def test_every_library_has_a_colour_of_its_own():
    names = (
        "transformers bf16,llama.cpp F16,liger,litgpt+compile,ours,reference,cudnn,flash,flex,compile".split(
            ","
        )
    )
    assert len({drawing.colour(name) for name in names}) == len(names)
    assert drawing.colour("compiled bf16") == drawing.colour("triton captured") == drawing.OURS


def test_every_picture_is_drawn_as_png_and_svg_at_the_width_of_a_readme(tmp_path, capsys):
    out = tmp_path / "pictures"
    assert run_command(report.main, [str(write(tmp_path, ALL)), "--out", str(out)]) == 0
    wanted = {f"{name}.{kind}" for name in report.PICTURES for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == wanted
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == wanted
    for name in report.PICTURES:
        image = imread(out / f"{name}.png")
        assert image.shape[1] == drawing.WIDTH * drawing.DPI
        assert image[0, :, :3].min() == 1.0 and image[:, :, :3].mean() > 0.7, "a light background"


@pytest.mark.parametrize("name", report.PICTURES)
def test_no_text_lies_over_another_and_none_is_cut_off(name, tmp_path):
    found, _ = figures.gather(write(tmp_path, ALL))
    assert_legible(report.PICTURES[name][1](found))


@pytest.mark.parametrize("name", ["generation", "step", "roofline", "attention", "decode"])
def test_pictures_of_a_gpu_are_legible(name, tmp_path):
    assert_legible(report.PICTURES[name][1](figures.gather(write(tmp_path, GPU))[0]))


def assert_legible(picture: Any) -> None:
    picture.canvas.draw()
    renderer = picture.canvas.get_renderer()
    legends = [*picture.legends, *(axes.get_legend() for axes in picture.axes if axes.get_legend())]

    def texts(artist: Any) -> list[Any]:
        return [text for text in artist.findobj(lambda one: hasattr(one, "get_text"))]

    elsewhere = {text for legend in legends for text in texts(legend)}
    for axes in picture.axes:
        elsewhere |= {*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")}
    words = [text for text in texts(picture) if text.get_text().strip() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words if text not in elsewhere]
    boxes += [("a legend", legend.get_window_extent(renderer)) for legend in legends]
    width, height = picture.canvas.get_width_height()
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (
            f"{text!r} is cut off"
        )
        for other, second in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(second.padded(-1)), f"{text!r} lies over {other!r}"


def test_every_caption_has_device_dtype_date_and_commit(tmp_path):
    found, _ = figures.gather(write(tmp_path, ALL))
    for name, (kinds, make) in report.PICTURES.items():
        shown = make(found)._supxlabel.get_text()
        wanted = "A GPU", "2026-11-25", f"commit {'a' * 7}", "torch 2.13.0"
        assert all(words in shown for words in wanted), name
        assert any(words in shown for words in ("bf16", "bfloat16", "answers of 64 tokens")) and kinds


def test_a_caption_of_many_commits_has_several_lines():
    many = [
        Figure("step", str(n), "ours", 1.0, None, {**ORIGIN, "commit": f"{n}" * 40 + " with changes"})
        for n in range(9)
    ]
    lines = drawing.caption(many).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= drawing.CAPTION
    assert "8888888 with changes" in " ".join(lines)


def test_toy_sizes_say_so_in_the_picture():
    noted = Figure("step", "a", "ours", 1.0, None, {**ORIGIN, "note": "tiny sizes: times mean nothing"})
    assert drawing.caption([noted]).startswith("NOTE: tiny sizes: times mean nothing\n")


def test_figures_are_those_of_the_files(tmp_path):
    found = by_key(figures.gather(write(tmp_path, ALL))[0])
    decode = found["decode", "batch 1, prompt 32", "llama.cpp F16"]
    assert (decode.value, decode.limit) == (90.0, pytest.approx(200.0))  # 20 GB/s over 0.1 GB
    assert found["prefill", "batch 1, prompt 32", "llama.cpp F16"].limit is None
    step = found["step", "bf16, 135M, 2 x 512", "transformers"]
    assert (step.value, step.limit) == (500.0, 2000.0)
    assert ("step", "bf16, 135M, 2 x 512", "ours+compile") not in found
    alone = found["operation", "operations alone, 1 x 64 tokens, bf16: swiglu forward", "reference"]
    assert (alone.value, alone.limit) == (2e-5, pytest.approx(1e-5))
    joint = found["operation", "a training step, 2 x 512 tokens: loss forward+backward", "torch"]
    assert (joint.value, joint.limit) == (pytest.approx(9e-3), pytest.approx(3e-3))
    served = found["serving", "4 clients", "compiled bf16"]
    assert (served.value, served.facts["first_token_p95_ms"]) == (140.0, 19.0)
    assert ("serving", "4 clients", "llama.cpp Q8_0") not in found
    rung = found["rung", "135M model, 2 x 512 tokens, bfloat16, backend triton", "plain eager"]
    assert (rung.value, rung.facts["launches"], rung.facts["peak_memory_bytes"]) == (100.0, 35, 9e8)


def test_the_limit_of_the_memory_is_what_was_read_in_the_same_run(tmp_path):
    """Not a copy, and not the rate of another file, but for a run that did not measure its own."""
    runs = {f"{batch}.json": (batch, read) for batch, read in ((1, 20.0), (8, 30.0), (2, None))}
    files = {
        name: {"benchmarks": generated("eager bf16", 20.0, *run, read=read)}
        for name, (*run, read) in runs.items()
    }
    # type: ignore[dict-item]
    section = {**ROOFLINE["roofline"], "copy_gb_per_s": 85.0, "read_gb_per_s": 40.0}
    write(tmp_path, {**files, "roofline.json": {**ROOFLINE, "roofline": section}})
    decode = [figure for figure in figures.gather(tmp_path)[0] if figure.kind == "decode"]
    assert {figure.facts["batch"]: figure.limit for figure in decode} == pytest.approx(
        {1: 200.0, 8: 300.0, 2: 400.0}
    )
    assert report.limit_label(decode) == drawing.LIMIT, "the rates differ"
    assert report.limit_label(decode[:1]) == f"{drawing.LIMIT}, {decode[0].facts['at']}"


def test_figures_of_a_gpu_are_those_of_the_files(tmp_path):
    found = by_key(figures.gather(write(tmp_path, GPU))[0])
    assert not [key for key in found if key[2] in ("flash-attn", "torch+compile") or "256" in key[1]], (
        "what failed"
    )
    decode = found["decode", "batch 64, 1024 keys", "triton captured"]
    # 1 GB at 3,000 GB/s for 64 tokens
    assert (decode.value, decode.limit) == (96_000.0, pytest.approx(64 * 3000.0))
    prefill = found["prefill", "batch 32, prompt 512", "triton"]
    assert prefill.facts["columns"] == {"ms": "22.0", "TFLOP/s": "182"}
    steps = [figure for figure in found.values() if figure.kind == "step"]
    assert [(figure.variant, figure.limit) for figure in steps] == [("triton+graph", None), ("torch", None)]
    assert steps[0].facts["columns"] == {"ms": "41.0", "peak GB": "12.06", "MFU": "34.8%"}
    assert "MFU" not in steps[1].facts["columns"]
    swiglu = found["operation", "operations alone, 32 x 512 tokens, bf16: swiglu forward", "triton"]
    assert swiglu.limit == pytest.approx(50e-6 * 2900 / 3000), (
        "of the read in another file, not of the slower copy in its own"
    )
    attention = found["operation", "operations alone, 32 x 512 tokens, bf16: attention forward", "triton"]
    assert attention.limit == pytest.approx(60e-6 * 900 / 3000)
    assert not [figure for figure in found.values() if figure.kind == "operation" and "2048" in figure.case]
    rate = found["attention", "2048 tokens, packed documents, backward", "flex"]
    assert (rate.value, rate.facts["tokens"]) == (63.0, 2048)


def test_a_long_bar_is_broken_and_has_its_number(tmp_path):
    axes = report.draw_roofline(figures.gather(write(tmp_path, GPU))[0]).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert axes.get_title(loc="left") == "swiglu forward"
    assert {"50.0", "900", "97%"} <= {*words} and words.count("//") == 1
    assert max(bar.get_width() for bar in axes.patches) == pytest.approx(50 * drawing.CUT)


def test_decode_on_a_gpu_has_its_limit_and_the_numbers_of_the_fastest(tmp_path):
    panels = report.draw_decode(figures.gather(write(tmp_path, GPU))[0]).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["64 keys", "1,024 keys", "batch of 1", ""]
    assert [text.get_text() for text in panels[1].texts] == ["1,500", "96,000"]
    assert len(panels[1].lines) == len(RATES) + 1
    assert panels[3].get_legend().get_texts()[-1].get_text() == "limit of the memory, 3,000 GB/s"


def test_what_the_interpreter_or_a_failure_left_is_no_figure(tmp_path):
    found = figures.gather(write(tmp_path, ALL))[0]
    assert not [
        figure for figure in found if figure.variant in ("triton", "compile") and figure.facts.get("note")
    ]
    assert not [figure for figure in found if figure.kind == "rung" and figure.variant == "compile"]


def test_of_two_files_with_the_same_figure_the_later_counts(tmp_path):
    older, newer = copy.deepcopy(STEP), copy.deepcopy(STEP)
    older["date"], older["step_peers"]["results"]["bf16"]["variants"]["ours"]["step_ms"] = (
        "2025-01-01T00:00:00",
        4096.0,
    )
    found = by_key(figures.gather(write(tmp_path, {"a.json": newer, "b.json": older}))[0])
    assert found["step", "bf16, 135M, 2 x 512", "ours"].value == 1000.0


def test_a_file_that_is_not_known_or_damaged_is_named_and_left_out(tmp_path, capsys):
    damaged = {"step_peers": {"batch": 2, "results": []}}
    folder = write(
        tmp_path, {"step.json": STEP, "other.json": {"a": 1}, "damaged.json": damaged, "list.json": [1]}
    )
    assert run_command(report.main, [str(folder)]) == 0
    errors = capsys.readouterr().err
    for name in ("other.json", "damaged.json", "list.json"):
        assert f"{name}: left out" in errors
    assert "step.json" not in errors and "ladder: not drawn" in errors
    assert (folder / "step.png").exists() and not (folder / "ladder.png").exists()


def test_no_line_joins_two_points_and_hollow_marks_are_explained_where_there_are_some(tmp_path):
    found = figures.gather(write(tmp_path, ALL))[0]
    assert {line.get_linestyle() for line in report.draw_decode(found).axes[0].lines} == {"None"}
    many = [
        Figure("decode", f"batch {n}", "ours", 1.0 * n, None, {**ORIGIN, "batch": n, "context": 8})
        for n in (1, 2, 4)
    ]
    assert [line.get_linestyle() for line in report.draw_decode(many).axes[0].lines] == ["-"]
    measured = {"operations_ms": {"swiglu": {"torch": {"forward": 2.0}}}, "whole_ms": {}}
    token = {**measured, "floor_ms": 1.0, "floors_ms": {"swiglu": {"forward": 1.0}}}
    content = copy.deepcopy(ROOFLINE)
    content["roofline"]["token"] = token  # type: ignore[index]
    titles = [axes.get_title(loc="left") for axes in report.draw_roofline(figures.read(content)).axes]
    assert titles == ["a training step, 2 x 512 tokens (hollow: backward)", "a decoded token, 512 keys"]


def test_decode_is_drawn_only_against_what_was_varied(tmp_path):
    one = [figure for figure in figures.gather(write(tmp_path, ALL))[0] if figure.kind == "decode"]
    assert len(report.draw_decode(one).axes) == 2
    assert len(report.draw_decode([figure for figure in one if figure.facts["batch"] == 1]).axes) == 1
    assert report.draw_decode([figure for figure in one if figure.case == "batch 1, prompt 32"]) is None


def test_markdown_has_a_row_per_variant_and_the_share_of_the_limit(tmp_path, capsys):
    assert run_command(report.main, [str(write(tmp_path, ALL)), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| ours | 1,000 (50 %) |" in lines and "| transformers | 500.0 (25 %) |" in lines
    assert "| llama.cpp F16 | 90.0 (45 %) |  |  |" in lines
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_without_figures_or_no_folder_is_an_error(tmp_path):
    with pytest.raises(LoadError, match="no figures to draw"):
        figures.gather(write(tmp_path, {"other.json": {"a": 1}}))
    with pytest.raises(UsageError, match="expected a folder of results, found nothing"):
        figures.gather(tmp_path / "absent")
