"""``make figures TOPIC=latency``: accuracy of the latencies, into ``docs/results/latency.json``.

``PARTS="truth"`` measures this part only. The students have random weights, which do not change the time; that of
``peers`` is trained by ``make figures TOPIC=student``. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from app.config import DemoConfig
from app.demo import demo
from benchmarks.latency.measure import open_models, time_models
from benchmarks.latency.open_loop import Load, measure_under_load
from benchmarks.report.schema import Timing
from experiments.demo.toolkit_comparison import compare_peers
from experiments.figures import Figure, Row, command_of, markdown, measure, record
from experiments.int8.tools import TrainedStudent
from experiments.latency.pyperf_check import pyperf_median
from experiments.latency.search_check import measure_recall_code
from experiments.random_student import write_random_student
from export.backends.registry import default_threads, models_of
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.config import Preset, StudentConfig

_FOLDER = Path("runs/figures-latency")
_DIM = 256
_NOISE_SECONDS, _TRUTH_SECONDS, _LOAD_SECONDS = 10.0, 10.0, 40.0
_NOISE_BACKENDS = ("torch", "torch-compile", "onnxruntime-cpu", "openvino")
_TRUTH_BACKENDS = ("torch", "onnxruntime-cpu")
_MAX_DIFFERENCE = 0.05
_REPEATS, _PROCESSES, _VALUES = 3, 3, 50
_SEEDS = (0, 1, 2)


def student(preset: Preset, folder: Path = _FOLDER) -> tuple[str, str]:
    """Return a student with random weights and its FP32 graph; write them if they do not exist."""
    path = folder / preset
    if not (path / "card.json").is_file():
        write_random_student(path, StudentConfig(preset, embedding_dim=_DIM))
    return str(path), str(export_onnx(OnnxConfig(str(path), f"{path}-fp32", images=8)))


def noise(
    paths: Sequence[str], seconds: float, backends: Sequence[str], command: str
) -> tuple[list[Figure], list[Row]]:
    """Run the same benchmark twice, and compare the p50 of each row."""
    first, second = (time_models(paths, (1,), seconds, default_threads(), backends, starts=0) for _ in range(2))
    rows, moves = compare_runs(first, second)
    title = "the same latency benchmark twice"
    largest = max(moves) if moves else None
    return [
        Figure(
            f"{title}: largest change of p50 among rows not marked unstable",
            largest,
            "",
            _MAX_DIFFERENCE,
            "<=",
            command,
        ),
        Figure(f"{title}: rows not marked unstable, of {len(rows)}", len(moves), "", None, ">=", command),
    ], rows


def compare_runs(first: dict[str, Timing], second: dict[str, Timing]) -> tuple[list[Row], list[float]]:
    """Return rows of the table, and the relative changes of p50 of rows that are stable in both runs."""
    rows, moves = [], []
    for name, row in first.items():
        other = second[name]
        if row.latency_ms is None or other.latency_ms is None:
            continue
        pair = row.latency_ms["1"], other.latency_ms["1"]
        ratio = pair[1].p50 / pair[0].p50
        reasons = [f"run {run}: {latency.unstable}" for run, latency in enumerate(pair, 1) if latency.unstable]
        if not reasons:
            moves.append(abs(ratio - 1))
            reasons = [f"p50 moved by {ratio - 1:+.1%} between the runs"] if moves[-1] > _MAX_DIFFERENCE else []
        rows.append(
            {
                "model": name,
                "first, p50 ms": f"{pair[0].p50:.2f}",
                "second": f"{pair[1].p50:.2f}",
                "ratio": f"{ratio:.3f}",
                "unstable": "; ".join(reasons),
            }
        )
    return rows, moves


def truth(
    paths: Sequence[str], seconds: float, processes: int, values: int, command: str
) -> tuple[list[Figure], list[Row]]:
    """Compare p50 with pyperf's median of the same call, three times in turn."""
    threads = default_threads()
    vpr_ms: dict[str, list[float]] = {}
    pyperf_ms: dict[str, list[float]] = {}
    for _ in range(_REPEATS):
        timed = time_models(paths, (1,), seconds, threads, _TRUTH_BACKENDS, starts=0)
        for model in (model for path in paths for model in models_of(path, _TRUTH_BACKENDS)):
            latency = timed[model.name].latency_ms
            assert latency is not None
            vpr_ms.setdefault(model.name, []).append(latency["1"].p50)
            pyperf_ms.setdefault(model.name, []).append(pyperf_median(model, threads, processes, values))
    figures, rows = [], []
    for name in vpr_ms:
        differences = [a / b - 1 for a, b in zip(vpr_ms[name], pyperf_ms[name], strict=True)]
        vpr_median, pyperf_median_ms = statistics.median(vpr_ms[name]), statistics.median(pyperf_ms[name])
        title = f"{name}: p50 against pyperf's, apart by"
        figures.append(
            Figure(
                title,
                abs(vpr_median / pyperf_median_ms - 1),
                "",
                _MAX_DIFFERENCE,
                "<=",
                command,
                (min(map(abs, differences)), max(map(abs, differences))),
            )
        )
        rows.append(
            {
                "model": name,
                "ours, p50 ms": f"{vpr_median:.2f}",
                "pyperf, median ms": f"{pyperf_median_ms:.2f}",
                "each time": ", ".join(f"{difference:+.1%}" for difference in differences),
            }
        )
    return figures, rows


def open_loop(paths: Sequence[str], seconds: float, command: str) -> tuple[list[Figure], list[Row]]:
    """Measure p99 at 80 % of the capacity, for three seeds of random arrivals."""
    figures, rows = [], []
    for name, (model, forward) in open_models(paths, default_threads())[0].items():
        call = partial(forward, model.random_input(1))
        results = [measure_under_load(call, Load("poisson", seed=seed), seconds) for seed in _SEEDS]
        tails = [load.p99 for load in results]
        title = f"{name}: p99 at 80 % of capacity, from when requests were due"
        figures.append(
            Figure(title, statistics.median(tails), "ms", None, "<=", command, (min(tails), max(tails)), _SEEDS)
        )
        rows += [
            {
                "model": name,
                "seed": seed,
                "requests/s": f"{result.rate:.1f}",
                "requests": int(result.calls),
                "p50 ms": f"{result.p50:.2f}",
                "p99 ms": f"{result.p99:.2f}",
                "max ms": f"{result.max:.2f}",
                "p99 of the call alone": f"{result.service_p99:.2f}",
                "busy": f"{result.busy:.0%}",
            }
            for seed, result in zip(_SEEDS, results, strict=True)
        ]
    return figures, rows


def measure_noise() -> None:
    """Record the noise of both students on every backend of this CPU."""
    paths = (*student("small"), *student("sample"))
    figures, table = noise(paths, _NOISE_SECONDS, _NOISE_BACKENDS, command_of("latency", "noise"))
    record("latency", figures, {"noise": table})


def measure_truth() -> None:
    """Record both students in PyTorch and ONNX Runtime against pyperf."""
    paths = (*student("small"), *student("sample"))
    figures, table = truth(paths, _TRUTH_SECONDS, _PROCESSES, _VALUES, command_of("latency", "truth"))
    record("latency", figures, {"truth": table})


def measure_open_loop() -> None:
    """Record the open-loop load of ViT-S/16 at 224 pixels; 40 seconds give enough requests for a p99."""
    figures, table = open_loop(student("small"), _LOAD_SECONDS, command_of("latency", "open-loop"))
    record("latency", figures, {"open-loop": table})


def measure_recall() -> None:
    """Record the recall code against ranx (``make other-metrics``) and faiss, on the demo's student."""
    demo(DemoConfig())
    figures, table = measure_recall_code(
        Path("runs/demo/student"), Path("runs/demo/catalog"), command_of("latency", "recall")
    )
    record("latency", figures, {"recall": table})


def measure_peers() -> None:
    """Record the size curve's student of width 192, exported by this and other toolkits (``make other-toolkits``)."""
    curve, catalog = Path("runs/figures-student/sizes/width-192"), Path("runs/demo-full/catalog")
    figures, table = compare_peers(
        TrainedStudent("sample", curve, catalog, _FOLDER / "peers"), command_of("latency", "peers")
    )
    print(markdown(table))
    record("latency", figures, {"peers": table})


PARTS = {
    "noise": measure_noise,
    "truth": measure_truth,
    "open-loop": measure_open_loop,
    "recall": measure_recall,
    "peers": measure_peers,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
