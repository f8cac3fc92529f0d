"""The ``vpr`` command: every verb is a function of one configuration dataclass, found by name.

The stages are imported only when their verb is called, so ``vpr --help`` is quick and this package
depends on none of them.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from vpr import __version__
from vpr.common.distributed import destroy_process_group
from vpr.common.errors import BudgetExceeded, UserError, explain_system_error
from vpr.common.log import configure_logging
from vpr.common.recipes import install_safe_yaml_loader
from vpr.common.telemetry import disable_telemetry


@dataclass(frozen=True)
class Command:
    """Where a verb's function and configuration are, and what it is for; ``positional`` keys need no ``--key``."""

    module: str
    function: str
    config_module: str
    config: str
    help: str
    positional: bool = False


COMMANDS = {
    "catalog": Command(
        "vpr.data.build_catalog",
        "build_catalog",
        "vpr.data.config",
        "CatalogConfig",
        "read images into a checked, split catalogue",
    ),
    "teacher data": Command(
        "teacher.data", "build_data", "teacher.config", "DataConfig", "join data sets into one catalogue to train on"
    ),
    "teacher train": Command(
        "teacher.train", "train", "teacher.config", "TrainConfig", "fine-tune an OpenCLIP tower with ArcFace"
    ),
    "teacher embed": Command(
        "teacher.embed", "embed_catalog", "vpr.retrieval.config", "EmbedConfig", "embed a catalogue with a teacher"
    ),
    "teacher soup": Command(
        "teacher.soup", "soup", "teacher.config", "SoupConfig", "average teachers, or one with its zero-shot weights"
    ),
    "teacher runs": Command(
        "teacher.runs", "runs", "teacher.config", "RunsConfig", "list teachers and unfinished training runs"
    ),
    "student distill": Command(
        "student.distill", "distill", "student.config", "DistillConfig", "distil a teacher into a small ViT"
    ),
    "student embed": Command(
        "student.embed", "embed_catalog", "vpr.retrieval.config", "EmbedConfig", "embed a catalogue with a student"
    ),
    "calibrate": Command(
        "calibration.calibrate",
        "calibrate",
        "calibration.config",
        "CalibrateConfig",
        "measure INT8 ranges on training images",
    ),
    "export onnx": Command(
        "export.to_onnx", "export_onnx", "export.config", "OnnxConfig", "write a student as ONNX, FP32 or FP16"
    ),
    "export int8": Command(
        "export.int8", "export_int8", "export.config", "Int8Config", "write an INT8 Q/DQ graph from ONNX and ranges"
    ),
    "export engine": Command(
        "export.tensorrt.build",
        "build_engine",
        "export.config",
        "EngineConfig",
        "build TensorRT engines from an ONNX graph",
    ),
    "export serving": Command(
        "export.serving",
        "export_serving",
        "export.config",
        "ServingConfig",
        "write a Triton model repository and gallery",
    ),
    "export parity": Command(
        "export.parity_report",
        "compare_exports",
        "export.config",
        "ParityConfig",
        "compare exports with the student, layer by layer",
    ),
    "bench recall": Command(
        "benchmarks.recall.measure",
        "measure_recall",
        "benchmarks.config",
        "RecallConfig",
        "recall of models on the same queries",
    ),
    "bench latency": Command(
        "benchmarks.latency.measure",
        "measure_latency",
        "benchmarks.config",
        "LatencyConfig",
        "latency of models on this machine",
    ),
    "bench scale": Command(
        "benchmarks.scale",
        "measure_scale_table",
        "benchmarks.config",
        "ScaleConfig",
        "exact and approximate search as a gallery grows",
    ),
    "bench report": Command(
        "benchmarks.report.build",
        "build_report",
        "benchmarks.config",
        "ReportConfig",
        "recall and latency as JSON, Markdown and HTML",
    ),
    "bench compare": Command(
        "benchmarks.compare",
        "compare_reports",
        "benchmarks.config",
        "CompareConfig",
        "what changed from one report to another",
        positional=True,
    ),
    "search": Command(
        "vpr.retrieval.search_command",
        "search_gallery",
        "vpr.retrieval.config",
        "SearchConfig",
        "nearest gallery images of embedded queries",
    ),
    "search serve": Command(
        "app.search_page.server", "serve", "app.config", "ServeConfig", "serve a local page to search by image"
    ),
    "demo": Command("app.demo", "demo", "app.config", "DemoConfig", "the whole pipeline on the embedded sample"),
    "doctor": Command("app.doctor", "doctor", "app.config", "DoctorConfig", "what this machine can run, and why not"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 and one line on anything the caller can put right, 1 where a named budget is broken."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    silence_libraries()
    configure_logging()
    try:
        run(arguments)
        destroy_process_group()
    except UserError as error:
        _fail(str(error))
    except BudgetExceeded as broken:
        print(f"vpr: {broken}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if told := explain_system_error(error):
            _fail(told)
        if not isinstance(error, OSError):
            raise
        if error.filename is None:
            _fail(f"{_plain_line(error)}: check the network, the disk and the paths")
        _fail(f"{error.filename}: {error.strerror}: check that the path exists and is writable")
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: Sequence[str]) -> Any:
    """Run one verb and return what its function returns.

    Raises:
        UserError: an unknown verb, key or value, or whatever the verb finds wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return None
    if arguments[0] == "--version":
        print(f"vpr {__version__}")
        return None
    name, rest = _split(list(arguments))
    verb = COMMANDS[name]
    config = read_config(getattr(importlib.import_module(verb.config_module), verb.config), name, rest)
    return getattr(importlib.import_module(verb.module), verb.function)(config)


def read_config(config_class: type[Any], name: str, arguments: Sequence[str]) -> Any:
    """A configuration from ``--config file.yaml`` and dotted flags over it, checked by type."""
    install_safe_yaml_loader()
    longer = [f"vpr {other}: {verb.help}" for other, verb in COMMANDS.items() if other.startswith(f"{name} ")]
    parser = ArgumentParser(
        prog=f"vpr {name}", description=COMMANDS[name].help, epilog="; ".join(longer), exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML recipe; flags override it")
    parser.add_class_arguments(config_class, as_positional=COMMANDS[name].positional)
    try:
        parsed, usual = parser.parse_args(list(arguments)), parser.get_defaults()
        # A recipe may say ``key:`` and nothing behind it, which jsonargparse takes for any type.
        if empty := [key for key, value in usual.items() if value is not None and parsed.get(key) is None]:
            raise UserError(f"{empty[0]}: is empty: give a value, or leave the line out")
        values = parser.instantiate_classes(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"vpr {name}: {_plain_line(error)}: see 'vpr {name} --help'") from None
    return config_class(**{key: value for key, value in vars(values).items() if key != "config"})


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    group = sorted(verb for verb in COMMANDS if verb.split()[0] == arguments[0])
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print("\n".join(f"vpr {verb:16} {COMMANDS[verb].help}" for verb in group))
        sys.exit(0 if len(arguments) > 1 else 2)
    raise UserError(f"vpr: no command '{' '.join(arguments[:2])}': choose one of {', '.join(group or COMMANDS)}")


def _overview() -> str:
    lines = [f"  vpr {name:16} {verb.help}" for name, verb in COMMANDS.items()]
    return "\n".join(["usage: vpr COMMAND [--config recipe.yaml] [--key value ...]", "", *lines])


def _plain_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _fail(message: str) -> None:
    print(f"vpr: error: {message}", file=sys.stderr)
    sys.exit(2)


def silence_libraries() -> None:
    """Silence libraries' notices."""
    # Libraries' notices hide the few lines that matter here; their errors still come through.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "open_clip", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    disable_telemetry()
