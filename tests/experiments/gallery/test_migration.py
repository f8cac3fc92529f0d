from __future__ import annotations

from experiments.gallery.migration import migration_figure, migration_rows


def test_rows_have_the_chosen_adapter_and_the_shares() -> None:
    curve = [
        {"share": step / 10, "recall": 0.4 + step / 100, "interval": [0.3, 0.6], "ratio": 0.8 + step / 50,
         "ratio_interval": [0.7, 1.1]} for step in range(11)
    ]  # fmt: skip
    plan = {
        "adapters": [
            {"method": "procrustes", "ridge": None, "is_chosen": False},
            {"method": "linear", "ridge": 0.1, "is_chosen": True},
        ],
        "order": "random",
        "old_recall": {"recall": 0.35, "interval": None},
        "curve": curve,
    }
    rows = migration_rows("a", plan)
    assert [row["embedded again"] for row in rows] == ["0%", "10%", "20%", "50%", "80%", "100%"]
    assert {row["adapter, order"] for row in rows} == {"linear, ridge 0.1, random"}
    assert {row["old model alone"] for row in rows} == {"0.350"}
    assert rows[3]["recall@1 [95 %]"] == "0.450 [0.300, 0.600]"
    assert rows[-1]["over the new model's own [95 %]"] == "1.000 [0.700, 1.100]"
    figure = migration_figure("a", plan, "command")
    assert (figure.value, figure.interval, figure.met) == (0.8, (0.7, 1.1), False)
