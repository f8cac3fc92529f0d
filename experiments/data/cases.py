"""Cases of data sets that earlier versions misread, and the tests that hold the right result of each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from experiments.figures import ROOT, Figure, Row
from vpr.common.errors import UserError

_DATA, _TEACHER, _BENCH = "tests/vpr/data", "tests/teacher", "tests/benchmarks"
# Each case, and the tests that its right result needs. A case without a test counts as wrong.
CASES: dict[str, tuple[str, ...]] = {
    "a table's own test rows stay test rows": (
        f"{_DATA}/test_division.py::test_own_test_rows_stay_and_the_training_products_are_divided",
    ),
    "likewise in `vpr teacher data`": (
        f"{_TEACHER}/test_data.py::test_training_products_of_a_table_with_a_test_split_are_divided",
    ),
    "roles without a split are scored": (f"{_DATA}/test_division.py::test_roles_without_a_split_are_scored",),
    "a model scored on products it has seen is marked": (
        f"{_BENCH}/test_project.py::test_model_is_marked_when_its_catalogue_has_grown_and_was_split_again",
        f"{_BENCH}/test_project.py::test_every_model_records_what_it_has_seen",
    ),
    "ids with white space or another Unicode form": (
        f"{_DATA}/test_identities.py::test_spellings_of_an_id_are_one_product",
    ),
    "ids that are missing, such as `nan`": (f"{_DATA}/test_identities.py::test_missing_ids_stop_or_are_set_aside",),
    "one image with two labels, or under 14 products": (
        f"{_DATA}/test_identities.py::test_image_of_several_products_is_set_aside",
    ),
    "semicolons, and headers in another case": (f"{_DATA}/test_tables.py::test_separators_and_case_of_the_header",),
    "columns of other names": (f"{_DATA}/test_tables.py::test_other_names_are_suggested_and_mapped",),
    "absolute paths and backslashes": (
        f"{_DATA}/test_tables.py::test_paths_below_an_image_root",
        f"{_DATA}/test_tables.py::test_backslashes_do_not_lead_out",
    ),
    "boxes as shares, corners or centres": (
        f"{_DATA}/test_boxes.py::test_every_form_gives_the_same_boxes",
        f"{_DATA}/test_boxes.py::test_wrong_reading_is_rejected_with_the_likely_one",
    ),
    "boxes in columns of other names": (f"{_DATA}/test_boxes.py::test_known_columns_are_read",),
    "boxes that reach out of their image": (
        f"{_DATA}/test_boxes.py::test_boxes_that_reach_out_are_counted_and_clipped",
    ),
    "boxes of the stored image, with EXIF orientation": (
        f"{_DATA}/test_boxes.py::test_boxes_of_the_stored_image_are_turned_with_it",
        f"{_DATA}/test_boxes.py::test_aicrowd_boxes_are_about_the_stored_image",
    ),
    "queries that are copies of a gallery image": (
        f"{_DATA}/test_identities.py::test_queries_equal_to_a_gallery_image_are_set_aside",
        f"{_DATA}/test_identities.py::test_near_duplicates_of_queries_are_counted",
    ),
    "a catalogue that grows": (
        f"{_DATA}/test_build_catalog.py::test_products_of_a_growing_folder_keep_their_split",
        f"{_DATA}/test_growth.py::test_no_version_scores_what_an_earlier_one_has_seen",
    ),
    "a project that moves": (f"{_BENCH}/test_project.py::test_moved_project_is_up_to_date",),
    "a recall budget of 18 queries": (
        "tests/export/test_mixed_precision.py::test_small_budget_is_not_confirmable",
        "tests/vpr/retrieval/test_drop_test.py::test_no_change_has_the_exact_bound",
    ),
    "`--keep` with a name that matches nothing": (
        "tests/export/test_qdq.py::test_excluded_name_without_a_layer_is_rejected",
    ),
    "BatchNorm with one image in a batch": (f"{_TEACHER}/test_train.py::test_batch_norm_of_one_image_is_rejected",),
    "statistics of the pretrained weights": (
        f"{_TEACHER}/test_train.py::test_plan_shows_the_statistics_of_the_weights",
        f"{_TEACHER}/test_towers.py::test_timm_tower_equals_timm",
    ),
    "a JSON tower without pooling": (f"{_TEACHER}/test_registry.py::test_tower_without_pooling_is_rejected",),
    "the Triton hand-off in ONNX Runtime 1.20": (
        "tests/export/test_oldest_runtime.py::test_every_graph_equals_this_runtime",
    ),
    "models of equal names": (f"{_BENCH}/test_models.py::test_rows_of_equal_names_are_named_by_path",),
    "an INT8 graph over FP16 on ONNX Runtime": (
        "tests/export/test_bias.py::test_int8_graph_gives_the_values_of_the_reference",
    ),
}
RECIPES = f"{_TEACHER}/test_recipe_sources.py::test_numbers_equal_those_of_the_source"
GROWTH = "tests/vpr/data/test_growth.py::test_no_version_scores_what_an_earlier_one_has_seen"
HEADERS = f"{_TEACHER}/test_recipe_sources.py::test_header_lists_the_deviations"


def run_tests(tests: Sequence[str]) -> dict[str, bool]:
    """Run tests of the project in a process of their own; return whether each passed, by its id with parameters.

    Raises:
        UserError: Pytest cannot run, or finds no test.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:xdist", "-m", "not gpu", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if not report.is_file():
            raise UserError(f"pytest: it failed ({process.stderr.strip()[-300:]}). Run `make test` first.")
        outcomes: dict[str, bool] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            is_wrong = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
            outcomes[f"{case.get('file')}::{case.get('name')}"] = not is_wrong
    if not outcomes:
        raise UserError(f"pytest: it ran none of {', '.join(tests)}. Run `make test` first.")
    return outcomes


def passed(test: str, outcomes: dict[str, bool]) -> bool:
    """Return whether a test passed with all of its parameters."""
    found = [right for name, right in outcomes.items() if name.partition("[")[0] == test]
    return bool(found) and all(found)


def case_figures(command: str) -> tuple[list[Figure], list[Row]]:
    """Return the number of cases with the right result, and a row for each."""
    outcomes = run_tests(
        sorted({test for tests in CASES.values() for test in tests if (ROOT / test.partition("::")[0]).is_file()})
    )
    rows: list[Row] = []
    for case, tests in CASES.items():
        is_right = bool(tests) and all(passed(test, outcomes) for test in tests)
        names = ", ".join(f"`{test.rpartition('::')[2]}`" for test in tests)
        rows.append({"case": case, "right": "yes" if is_right else "no", "tests": names or "–"})
    right = sum(row["right"] == "yes" for row in rows)
    name = "misread data sets and runs: cases with the right result"
    return [Figure(name, float(right), "cases", float(len(rows)), ">=", command)], rows


def recipe_figures(command: str) -> tuple[list[Figure], list[Row]]:
    """Return the number of recipes whose numbers equal those of their source, and a row for each."""
    outcomes = run_tests([RECIPES, HEADERS])
    names = [test.partition("[")[2].rstrip("]") for test in outcomes if test.startswith(f"{RECIPES}[")]
    rows: list[Row] = []
    for name in names:
        numbers, header = (outcomes.get(f"{test}[{name}]", False) for test in (RECIPES, HEADERS))
        deviations = _count_deviations(ROOT / "teacher" / "recipes" / f"{name}.yaml")
        is_equal = {True: "yes", False: "no"}
        rows.append(
            {"recipe": name, "numbers of the source": is_equal[numbers and header], "listed deviations": deviations}
        )
    equal = sum(row["numbers of the source"] == "yes" for row in rows)
    title = "recipes with the numbers of their source, and deviations listed"
    return [Figure(title, float(equal), "recipes", float(len(rows)), ">=", command)], rows


def growth_figures(command: str) -> list[Figure]:
    """Return how many random histories of a catalogue score a row that training, calibration or selection has seen."""
    outcomes = run_tests([GROWTH])
    name = f"random catalogues that grow, {len(outcomes)} over all readers: those with a scored row that was seen"
    return [Figure(name, float(len(outcomes) - sum(outcomes.values())), "catalogues", 0.0, "<=", command)]


def _count_deviations(recipe: Path) -> int:
    """Return the number of items under `Deviations` in a recipe's header."""
    header: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    start = next((index for index, line in enumerate(header) if "Deviations" in line), len(header))
    return sum(line.lstrip("# ").startswith("- ") for line in header[start:])
