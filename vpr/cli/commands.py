"""Table of commands: the function and the configuration of each, found by name and imported when called."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command of ``vpr``.

    Attributes:
        target: Function, as ``module:name``; it takes the configuration.
        config: Configuration dataclass, as ``module:name``; the module imports no heavy library.
        help: One line for the overview.
        common: Optional keys that the short help shows.
        positional: Keys that take values without a flag, in this order.
        aliases: Keys by another name of their flag.
        hints: What to do instead, for flags that the command does not have.
        infers: Whether embedding images takes most of the time, so that memory is kept between batches.
    """

    target: str
    config: str
    help: str
    common: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    infers: bool = False

    def load_function(self) -> Any:
        """Import and return the function."""
        return _load(self.target)

    def load_config(self) -> type[Any]:
        """Import and return the configuration class."""
        return _load(self.config)

    @property
    def stage(self) -> str:
        """Name of the stage's package, which holds the recipes."""
        return self.target.partition(".")[0]


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# fmt: off
_TRAINING = ("loader.batch_size", "loader.workers", "loader.keep_in_memory", "run.ema", "run.precision", "dry_run")
_STAGES = "A teacher's rates and epochs are in --stages: --stages '{train: all, epochs: 3, lr_tower: 1e-4}'."

COMMANDS = {  # name: target, configuration, help, common keys
    "catalog": Command("vpr.data.build_catalog:build_catalog", "vpr.data.config:CatalogConfig",
        "read images into a checked, split catalogue",
        ("root", "columns", "validation", "test", "resplit", "skip_unreadable")),
    "catalog check": Command("vpr.retrieval.check_command:check_catalog", "vpr.retrieval.config:CatalogCheckConfig",
        "find wrong labels and duplicates in a catalogue, and clean it", ("catalog", "apply", "outlier", "duplicate")),
    "catalog relocate": Command("vpr.data.relocate:relocate_catalog", "vpr.data.config:RelocateConfig",
        "point a catalogue to images that were moved"),
    "teacher data": Command("teacher.data:build_data", "teacher.config:DataConfig",
        "join data sets into one catalogue to train on",
        ("products10k", "aicrowd", "csv", "validation", "test", "resplit", "skip_unreadable")),
    "teacher convert": Command("teacher.convert:convert", "teacher.tower_config:ConvertConfig",
        "convert a PyTorch checkpoint to safetensors", ("key", "keep_head")),
    "teacher choose": Command("teacher.choose:choose", "teacher.choose_config:ChooseConfig",
        "compare untrained towers on your validation split", ("output", "batch_size", "threads", "seed"), infers=True),
    "teacher train": Command("teacher.train:train", "teacher.config:TrainConfig",
        "fine-tune an image tower with margin, proxy and pair losses",
        ("tower.name", "tower.pretrained", "stages", *_TRAINING, "seed"),
        hints={"--lr": _STAGES, "--epochs": _STAGES}, infers=True),
    "teacher embed": Command("teacher.embed:embed_catalog", "vpr.retrieval.config:EmbedConfig",
        "embed a catalogue with a teacher", ("split", "batch_size", "threads"), infers=True),
    "teacher soup": Command("teacher.soup:soup", "teacher.config:SoupConfig",
        "average teachers, or one with its zero-shot weights", ("method", "batch_size"), infers=True),
    "teacher fuse": Command("teacher.fuse:fuse", "teacher.config:FuseConfig",
        "fuse several teachers into one", ("embedding_dim", "shrinkage", "batch_size"), infers=True),
    "teacher runs": Command("teacher.runs:runs", "teacher.config:RunsConfig",
        "list teachers and unfinished training runs", ("folder", "output")),
    "student distill": Command("student.distill:distill", "student.config:DistillConfig",
        "distil a teacher into a small ViT",
        ("model.preset", "model.stem", "start", "quantise.ranges", "epochs", "lr", *_TRAINING, "seed"), infers=True),
    "student embed": Command("student.embed:embed_catalog", "vpr.retrieval.config:EmbedConfig",
        "embed a catalogue with a student", ("split", "batch_size", "threads"), infers=True),
    "calibrate": Command("calibration.calibrate:calibrate", "calibration.config:CalibrateConfig",
        "measure INT8 ranges on training images", ("count", "method", "selection", "smooth", "correct"), infers=True),
    "export onnx": Command("export.to_onnx:export_onnx", "export.config:OnnxConfig",
        "write a teacher or student as ONNX, FP32 or FP16", ("precision", "catalog", "input"),
        aliases={"student": "model"}),
    "export int8": Command("export.int8:export_int8", "export.config:Int8Config",
        "write an INT8 Q/DQ graph from ONNX and ranges", ("base", "max_recall_drop", "catalog", "scope"),
        infers=True),
    "export engine": Command("export.tensorrt.build:build_engine", "export.config:EngineConfig",
        "build TensorRT engines from an ONNX graph", ("backend", "target", "min_batch", "opt_batch", "max_batch")),
    "export serving": Command("export.serving:export_serving", "export.config:ServingConfig",
        "write a Triton model repository and gallery", ("name", "device", "index", "threshold")),
    "export parity": Command("export.parity_report:compare_exports", "export.config:ParityConfig",
        "compare exports with their network, layer by layer", ("split", "layers"), aliases={"student": "reference"},
        infers=True),
    "export verify": Command("export.verify:verify", "export.verify_config:VerifyConfig",
        "find where a client's preprocessing departs from a model's", ("vectors", "endpoint"), infers=True),
    "bench recall": Command("benchmarks.recall.measure:measure_recall", "benchmarks.config:RecallConfig",
        "measure recall of models on the same queries", ("split",), infers=True),
    "bench skew": Command("benchmarks.recall.skew:measure_skew", "benchmarks.config:SkewConfig",
        "measure recall of queries that are preprocessed in other ways", ("split", "pipelines"), infers=True),
    "bench latency": Command("benchmarks.latency.measure:measure_latency", "benchmarks.config:LatencyConfig",
        "measure latency of models on this machine", ("batches", "seconds", "threads", "backends")),
    "bench storage": Command("benchmarks.storage.command:measure_storage", "benchmarks.config:StorageConfig",
        "find the smallest vectors and index within a recall budget",
        ("max_recall_drop", "confidence", "max_ms", "sizes", "dims", "formats", "indexes", "distractors", "model",
         "reference"), infers=True),
    "bench report": Command("benchmarks.report.build:build_report", "benchmarks.config:ReportConfig",
        "write recall and latency as JSON, Markdown and HTML", ("split", "batches", "seconds", "threads", "ranges")),
    "bench compare": Command("benchmarks.compare:compare_reports", "benchmarks.config:CompareConfig",
        "show what changed from one report to another",
        ("max_recall_drop", "max_latency_ratio", "max_size_ratio"), positional=("before", "after")),
    "embed": Command("export.embed:embed_catalog", "export.config:EmbedConfig",
        "embed a catalogue with any model: teacher, student, graph or engine",
        ("split", "backend", "batch_size", "threads"), infers=True),
    "gallery threshold": Command("vpr.retrieval.threshold_command:find_threshold",
        "vpr.retrieval.config:ThresholdConfig", "find the score below which a search answers 'no match'",
        ("max_false_accept", "confidence", "split", "score", "compare")),
    "gallery create": Command("vpr.gallery.change:create_gallery", "vpr.gallery.config:CreateConfig",
        "create a gallery that can change, from embeddings", ("columns", "metadata", "threshold", "address")),
    "gallery add": Command("vpr.gallery.change:add_images", "vpr.gallery.config:AddConfig",
        "add embedded images to a gallery", ("metadata", "split")),
    "gallery update": Command("vpr.gallery.change:update_images", "vpr.gallery.config:UpdateConfig",
        "replace images, metadata or the threshold of a gallery", ("embeddings", "metadata", "threshold")),
    "gallery remove": Command("vpr.gallery.change:remove_images", "vpr.gallery.config:RemoveConfig",
        "remove products or images from a gallery", ("products", "images", "table")),
    "gallery search": Command("vpr.gallery.search_command:search_in_gallery",
        "vpr.gallery.config:GallerySearchConfig", "find the nearest images of embedded queries in a gallery",
        ("output", "k", "where", "probes")),
    "gallery plan-migration": Command("vpr.gallery.plan:plan_migration", "vpr.gallery.config:PlanConfig",
        "plan a gallery's migration to a new model: adapter, order and recall on the way", ("seed",)),
    "gallery migrate": Command("export.gallery_migration:migrate_gallery", "export.migrate_config:MigrateConfig",
        "give a gallery a new model, and embed its images in the order of a plan",
        ("model", "catalogs", "rows", "skip_missing"), infers=True),
    "gallery verify": Command("vpr.gallery.inspect:verify_gallery", "vpr.gallery.config:VerifyGalleryConfig",
        "check a gallery's stored vectors, ids and index", ("embeddings",)),
    "gallery compact": Command("vpr.gallery.change:compact_gallery", "vpr.gallery.config:CompactConfig",
        "erase removed images and older versions from a gallery's files", ("index",)),
    "gallery info": Command("vpr.gallery.inspect:print_info", "vpr.gallery.config:InfoConfig",
        "show counts, version and model of a gallery"),
    "gallery export": Command("vpr.gallery.inspect:export_embeddings", "vpr.gallery.config:ExportConfig",
        "write a gallery as embeddings, for faiss and other commands", ("where",)),
    "search": Command("vpr.retrieval.search_command:search_gallery", "vpr.retrieval.config:SearchConfig",
        "find the nearest gallery images of embedded queries", ("output", "k", "threshold")),
    "search serve": Command("app.search_page.server:serve", "app.config:ServeConfig",
        "serve a local page to search by image",
        ("catalog", "split", "embeddings", "galleries", "catalogs", "threshold", "port"), infers=True),
    "recipes list": Command("vpr.common.recipes:list_recipes", "vpr.common.recipes:ListConfig",
        "list the packaged recipes"),
    "recipes show": Command("vpr.common.recipes:show_recipe", "vpr.common.recipes:ShowConfig",
        "print a packaged recipe", positional=("name",)),
    "recipes copy": Command("vpr.common.recipes:copy_recipe", "vpr.common.recipes:CopyConfig",
        "copy a packaged recipe to a folder, to change it", positional=("name", "folder")),
    "demo": Command("app.demo:demo", "app.config:DemoConfig",
        "run the pipeline on the embedded sample", ("output", "full")),
    "doctor": Command("app.doctor:doctor", "app.config:DoctorConfig",
        "show what this machine can run, and why not, or the licences of models", ("models", "require_licence")),
    "completion": Command("vpr.cli.completion:print_completion", "vpr.cli.completion:CompletionConfig",
        "print a completion script for bash, zsh or fish", positional=("shell",)),
}
# fmt: on

# Commands that compute on a GPU where there is one; they take `--device`.
DEVICE_COMMANDS = frozenset(
    {
        *("teacher choose", "teacher train", "teacher embed", "teacher soup", "teacher fuse", "embed"),
        *("student distill", "student embed", "export int8", "export engine", "export parity", "export verify"),
        *("bench recall", "bench latency", "bench report", "bench skew", "bench storage", "gallery migrate"),
        *("search serve", "demo"),
    }
)
