"""The scripts that measure training and allocation: they run, say what they were asked for, and go on where they stopped."""

import importlib
import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def call(script, *options, quick=True):
    """The object that a script prints under --json."""
    path = REPOSITORY / "scripts" / f"{script}.py"
    command = [sys.executable, str(path), *(["--quick"] if quick else []), "--json", "--threads", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560 if quick else 900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) >= {"script", "device", "versions", "seeds", "seconds", "rows", "figures"}
    assert (found["script"], found["quick"]) == (script, quick)
    return found


@pytest.fixture
def cifar(data_folder_for_tests):
    for needed in ("cifar-10-batches-py/test_batch", "weights/resnet32-d509ac18.th", "weights/resnet20-12fca82f.th"):
        if not (data_folder_for_tests / needed).is_file():
            pytest.skip(f"{needed} is not in the data folder: python scripts/download_cifar10.py")


def test_training_bench_compares_loops_in_one_run():
    found = call("bench_training")
    loops = {row["loop"]: row for row in found["rows"]}
    assert set(loops) >= {"plain, 0 workers", "plain, 2 workers", "resident", "ours", "projected"}
    plain = max(row["images_per_second"] for loop, row in loops.items() if loop.startswith("plain"))
    assert found["figures"]["throughput_ratio"] == pytest.approx(loops["ours"]["images_per_second"] / plain)
    assert 0 < found["figures"]["projection_share"] < 1


def test_the_papers_tables_are_run_once_and_read_from_disk_the_second_time(tmp_path, cifar):
    first = call("reproduce_paper", "--out", str(tmp_path))
    assert [row["method"] for row in first["rows"]] == ["dense", "projection", "decomposed", "ours"]
    assert all(row["status"] == "complete" and row["test_accuracy"] > 40 for row in first["rows"])
    sizes = {row["method"]: row["ratio"] for row in first["rows"]}
    assert 4.28 <= sizes["projection"] == sizes["decomposed"] <= sizes["ours"] < 4.5
    assert first["figures"]["decomposition_loss_max"] <= 100 / 250 + 1e-9  # one image of 250
    assert not any(name.startswith("ours_minus_paper") for name in first["figures"])  # that takes the full run
    table = (tmp_path / "quick" / "table.md").read_text()
    assert "320 training images" in table
    assert "| ratio | 4.28 |" in table
    assert (tmp_path / "quick" / "figure.png").stat().st_size > 5_000
    again = call("reproduce_paper", "--out", str(tmp_path))
    assert again["rows"] == first["rows"]
    assert again["seconds"] < first["seconds"]


def test_the_records_tables_go_on_where_they_stopped_and_the_recipe_is_chosen_without_the_test_set(
    tmp_path, monkeypatch, capsys
):
    """In this process, and in one of its own that a GPU's runs would share it with; digits, an untrained net."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    records = importlib.import_module("records")

    def made(*options):
        words = ["records.py", "--quick", "--json", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*words, *options])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        records.main()
        return json.loads(capsys.readouterr().out)

    nothing = made("--minutes", "0")
    assert (nothing["rows"], nothing["figures"]["runs"], nothing["figures"]["runs_planned"]) == ([], 0, 6)
    assert "the same command goes on" in nothing["notes"][-2]
    first = made("--workers", "1")
    assert [(row["table"], row["method"]) for row in first["rows"]] == [
        ("paper", "ours"), ("haloc", "ours"), ("haloc", "dense"), ("paper", "dense"), ("paper", "projection"), ("paper", "decomposed"),
    ]  # fmt: skip
    rows = {(row["table"], row["method"]): row for row in first["rows"]}
    assert all(row["status"] == "complete" and row["test_accuracy"] is not None for row in first["rows"])
    assert rows["paper", "ours"]["ratio"] >= rows["paper", "projection"]["ratio"] >= 4.28
    assert rows["haloc", "ours"]["macs"] <= 1 - 0.722
    assert not {name for name in first["figures"] if "paper" in name or "public" in name}  # digits say nothing of these
    assert "| ours | " in (tmp_path / "quick" / "table.md").read_text()
    again = made()
    assert again["rows"] == first["rows"]
    chosen = made("--choose")
    assert {row["value"] for row in chosen["rows"]} == {0.02, 0.01}
    assert all(row["test_accuracy"] is None for row in chosen["rows"])
    best = max(chosen["rows"], key=lambda row: row["val_accuracy"])
    assert chosen["figures"]["chosen_lr"] == best["value"]
    assert "chosen by validation" in made("--minutes", "0")["notes"][0]


def test_the_allocator_bench_holds_the_solver_against_the_optimum():
    found = call("bench_allocators", "--only", "resnet50")
    figures = found["figures"]
    assert figures["two_budget_feasible"] == 1
    assert 0 <= figures["milp_gap_max"] <= 0.005
    assert 0 <= figures["two_budget_gap_max"] <= 0.01
    assert figures["resnet50_seconds"] < 1
    assert {row["part"] for row in found["rows"]} == {"resnet50", "two budgets"}
    assert all(row["gap_to_milp"] <= row["certified_gap"] * 1.01 + 1e-6 for row in found["rows"])


def test_the_allocator_bench_scores_every_allocator(cifar):
    found = call("bench_allocators", "--only", "trained", "--images", "200")
    figures = found["figures"]
    names = {name.removeprefix("accuracy_resnet20_50_") for name in figures if name.startswith("accuracy_resnet20_50_")}
    assert names >= {
        "solver",
        "solver_kfac",
        "solver_fisher",
        "solver_activation",
        "uniform",
        "minimax",
        "evbmf",
        "stable_rank",
    }
    assert figures["accuracy_resnet20_100_dense"] > 95
    assert figures["best_above_uniform_everywhere"]
    assert all(row["macs"] <= 0.5 for row in found["rows"] if row["part"] == "resnet20" and row["allocator"] != "dense")


def test_an_ablation_pairs_its_variants_with_the_base(tmp_path, cifar):
    found = call("ablate_recipe", "--out", str(tmp_path), "--only", "EMA .95")
    assert [row["variant"] for row in found["rows"]] == ["base", "EMA .95"]
    assert found["rows"][0]["differences"] == [0.0]
    difference = found["rows"][1]["val_accuracy"] - found["rows"][0]["val_accuracy"]
    assert found["rows"][1]["differences"] == [pytest.approx(difference, abs=0.006)]


def test_the_search_bench_compares_the_search_with_its_controls(tmp_path):
    controls = ("direct_tpe", "random")
    found = call("bench_search", "--out", str(tmp_path), "--methods", ",".join(["allocated_tpe", *controls]))
    figures = found["figures"]
    assert figures["hv_allocated_tpe_8"] >= max(figures[f"hv_{m}_64"] for m in controls) > 0
    assert figures["hv_allocated_tpe_8"] <= figures["hv_allocated_tpe_16"] <= figures["hv_allocated_tpe_32"]
    assert figures["within_budget"] == 1
    assert figures["same_seed_same_plans"] == 1
    assert 0 < figures["driver_ms_100"] < 100
    trials = {row["method"]: len(row["points"]["accuracy, macs ratio"]) for row in found["rows"] if "points" in row}
    assert set(trials.values()) == {32, 64}


def test_the_nested_bench_holds_one_run_against_separate_trials_by_passes():
    found = call("bench_nested")
    figures, passes = found["figures"], {row["method"]: row["passes"] for row in found["rows"]}
    assert figures["passes_ratio"] == 0.25
    assert passes == {"nested": 8, "separate": 32}
    assert 0 < figures["seconds_per_plan"] <= 5
    assert all(0.5 < figures[f"hv_{method}"] <= 0.8 for method in ("nested", "separate_4"))  # from 20 % of the MACs on


def test_the_simulation_drives_studies_of_all_sizes():
    found = call("simulate_cluster", "--only", "workers,grown")
    figures = found["figures"]
    assert 0 < figures["idle_share_8"] < figures["idle_share_64"] < 0.5
    assert {"driver_ms_100", "driver_ms_1000", "suggest_ms_1000", "driver_rss_mib_max", "open_seconds_1000"} <= set(
        figures
    )
    assert figures["driver_ms_1000"] > figures["suggest_ms_1000"] > 0
    assert 5 < figures["journal_mib_1000"] / figures["journal_mib_100"] < 12  # copies are as long as what they copy
    ends = [row["ends"] for row in found["rows"] if row["part"] == "workers"]
    assert all(sum(end.values()) - end.get("lost", 0) == 100 for end in ends)


def test_the_storage_bench_times_the_journal_and_sqlite():
    found = call("bench_storage", "--trials", "3")
    assert [row["storage"] for row in found["rows"]] == ["journal", "sqlite"]
    assert all(found["figures"][f"ms_per_trial_{row['storage']}"] == row["median ms"] > 0 for row in found["rows"])


def test_nothing_that_a_stranger_sends_runs_is_written_or_ends_in_a_traceback():
    figures = call("drill_strangers")["figures"]
    assert figures.pop("cases") >= 100
    assert figures == {"tracebacks": 0, "wrong_exit": 0, "executed": 0, "secrets_written": 0}


def test_the_tasks_bench_compares_the_search_with_every_control(tmp_path):
    """On a task from outside, whose net has no width: there is no narrower control."""
    (tmp_path / "own.py").write_text(
        "import ranksearch, torch\n\n"
        "def make():\n"
        "    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 2))\n"
        "    splits = dict(zip(('train', 'val', 'test'), (x.split(32)), strict=True))\n"
        "    splits = {name: (part, (part.sum(1) > 0).long()) for name, part in splits.items()}\n"
        "    return ranksearch.Task(model=net, trained=False, **splits)\n"
    )
    found = call(
        "bench_tasks",
        "--task",
        f"{tmp_path / 'own.py'}:make",
        "--steps",
        "30,6",
        "--trials",
        "2",
    )
    rows, figures = {row["task"]: row for row in found["rows"]}, found["figures"]
    assert set(rows) == {"make"}
    assert figures["tasks"] == 1
    assert all(
        row["at"]["0.5"][method] is not None for row in rows.values() for method in ("uniform", "solver", "ours")
    )
    assert rows["make"]["above"]["narrow"] is None
    assert {"tasks_above_uniform", "tasks_above_narrow", "tasks_above_solver", "far_below_share"} <= set(figures)
    assert 0 < figures["smallest_at_minus_1_make"] <= 1


def test_steps_on_factors_are_compared_from_a_dense_net_that_has_not_seen_the_validation_images(tmp_path, cifar):
    found = call("bench_factor_steps", "--out", str(tmp_path))
    assert {row["factor_steps"] for row in found["rows"]} >= {"plain", "matched"}
    assert {row["macs"] for row in found["rows"]} == {0.35, 0.2}
    names = {f"matched_above_{rival}_{share}" for rival in ("plain", "best_plain") for share in (0.35, 0.2)}
    assert set(found["figures"]) == {*names, "dense_val_accuracy"}
    assert len(list((tmp_path / "quick" / "runs").iterdir())) == len(found["rows"])
