"""The search-space file: every mistake gets one message with its place and the nearest valid name."""

import json
from pathlib import Path

import pytest
import yaml

from ranksearch.errors import UsageError
from ranksearch.space.reading import parse_space, read_space
from ranksearch.space.recipe import DistillationSpace, ProjectionSpace, RecipeSpace
from ranksearch.space.settings import Choices, Range, values_of
from ranksearch.tables import check_record
from ranksearch.trial.recipe import Recipe, flattened, middle, searched_settings

SPACES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
SMALL = {"name": "x", "task": "digits", "model": "resnet8", "validation": 100, "recipe": {"steps": 10}}


@pytest.mark.parametrize("path", SPACES, ids=lambda p: p.stem)
def test_every_shipped_space_is_valid_and_reachable(path):
    space = read_space(path)
    record = check_record(space)
    assert space.name == path.stem
    assert record["valid"]
    assert record["layers_lowered"] > 0
    for cost in record["costs"].values():
        assert cost["smallest"] <= (cost["limit"] or cost["dense"]) <= cost["dense"]


def test_there_are_spaces():
    assert len(SPACES) >= 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"serach": {}}, "serach: there is no such key. Did you mean 'search'"),
        ({"search": {"trails": 3}}, "search.trails: there is no such key. Did you mean 'trials'"),
        ({"search": {"trials": 0}}, "search.trials: .*greater than or equal to 1.*got 0"),
        ({"search": {"trials": "many"}}, "search.trials: .*valid integer.*'many'"),
        ({"search": {"sampler": "tpee"}}, "search.sampler: 'tpee' is not possible. Did you mean 'tpe'"),
        ({"search": {"objectives": ["macs"]}}, "search.objectives: .*accuracy among them"),
        ({"search": {"objectives": ["accuracy"]}}, "accuracy alone .* needs a budget"),
        ({"search": {"measure": "log_energy"}}, "search.measure: .*Did you mean 'log_kept_energy'"),
        ({"recipe": {}}, "recipe.steps: this key is missing"),
        ({"recipe": {"steps": 10, "lr": {"low": 1, "high": 0.1}}}, r"recipe\.lr.*low 1 must be below high 0\.1"),
        ({"recipe": {"steps": 10, "lr": {"low": 0, "high": 0.1, "log": True}}}, r"recipe\.lr.*low > 0"),
        ({"recipe": {"steps": 10, "lr": {"lo": 0, "high": 0.1}}}, r"recipe\.lr\.lo: there is no such key.*'low'"),
        ({"recipe": {"steps": 10, "factor_share": 1.5}}, r"recipe\.factor_share: 1\.5 is outside 0\.\.1"),
        (
            {"recipe": {"steps": 10, "projection": {"period": 2.5}}},
            r"recipe\.projection\.period: 2\.5 is not a whole number",
        ),
        ({"recipe": {"steps": 10, "projection": {"perod": 5}}}, r"recipe\.projection\.perod.*Did you mean 'period'"),
        ({"recipe": {"steps": 10, "optimizer": "adam"}}, r"recipe\.optimizer: 'adam' is not possible.*'adamw'"),
        ({"recipe": {"steps": 10, "schedule": {"choices": ["cosin", "step"]}}}, r"recipe\.schedule: 'cosin'.*'cosine'"),
        ({"recipe": {"steps": 10, "optimizer": None}}, r"recipe\.optimizer: expected one value or {choices}, got None"),
        ({"recipe": {"steps": 10, "optimizer": {"choices": []}}}, r"recipe\.optimizer\.choices: .*at least 1 item"),
        ({"recipe": {"steps": 10, "schedule": 3}}, r"recipe\.schedule: 3\.0 is not possible"),
        (
            {"recipe": {"steps": 10, "projection": {"schedule": "learning-rate"}}},
            r"recipe\.projection\.schedule: 'learning-rate' is not possible.*'learning_rate'",
        ),
        (
            {"recipe": {"steps": 10, "projection": {"energy_transfer": 1}}},
            r"projection\.energy_transfer: 1\.0 is not pos",
        ),
        ({"recipe": {"steps": 10, "lr": {"choices": ["fast"]}}}, r"recipe\.lr: expected a number, got 'fast'"),
        (
            {"recipe": {"steps": 10, "projection": {"start": 0.6, "until_end": 0.5}}},
            r"recipe\.projection: start 0\.6 is after until_end 0\.5",
        ),
        ({"recipe": {"steps": 10, "projection": {"until_end": False}}}, r"projection\.until_end: expected a number"),
        ({"recipe": {"steps": 10, "ema": 1}}, r"recipe\.ema: 1 is outside"),
        ({"budgets": {"flop": "50%"}}, "budgets: .*Did you mean 'flops'"),
        ({"budgets": {"flops": "0.5"}}, "written in percent"),
        ({"layers": {"lowerings": ["im2cool"]}}, r"layers\.lowerings: .*Did you mean 'im2col'"),
        ({"layers": {"rules": [{"match": "a", "lowering": ["im2col"]}]}}, r"layers\.rules\.0\.lowering.*'lowerings'"),
        ({"recipe": {"steps": 10, "lr": "abc"}}, r"recipe\.lr: expected a number, .*got 'abc'"),
        ({"recipe": {"steps": 10, "lr": True}}, r"recipe\.lr: expected a number"),
        ({"resources": {"gpus_per_trial": 1.5}}, r"resources\.gpus_per_trial: 1\.5 is neither a fraction"),
        ({"search": {"weight_range": float("inf")}}, r"search\.weight_range"),
        ({"name": "a/b"}, "name: 'a/b' may hold only letters"),
        ({"resources": {"cpus_per_trial": 0}}, r"resources\.cpus_per_trial"),
    ],
)
def test_a_mistake_has_its_place_and_the_nearest_name(change, says):
    with pytest.raises(UsageError, match=f"file.yaml: .*{says}") as caught:
        parse_space(SMALL | change, "file.yaml")
    assert len(str(caught.value).splitlines()) <= 2  # a misspelled key of a distribution is missing, too


def test_several_mistakes_are_told_at_once():
    with pytest.raises(UsageError) as caught:
        parse_space({**SMALL, "mode": 1, "search": {"seeds": 1}}, "f")
    assert len(str(caught.value).splitlines()) == 2


def test_a_layer_that_does_not_exist_is_found_by_check():
    space = parse_space({**SMALL, "layers": {"exclude": ["layer4.*"]}}, "f")
    with pytest.raises(UsageError, match=r"layers\.exclude: 'layer4\.\*' matches no layer.*layer"):
        check_record(space)


def test_unknown_model_and_task_are_found_by_check():
    with pytest.raises(UsageError, match="Did you mean 'resnet8'"):
        check_record(parse_space(SMALL | {"model": "resnet9"}, "f"))
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        check_record(parse_space(SMALL | {"task": "digit"}, "f"))


def test_command_line_lies_over_the_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "budgets": {"flops": "60%", "size": "1MiB"}}))
    space = read_space(
        path,
        budgets=["macs=30%", "params=40%"],
        settings=["recipe.lr={low: 0.1, high: 0.2}", "data=/d"],
        trials=5,
        name="y",
    )
    assert space.budgets == {"size": "1MiB", "macs": "30%", "params": "40%"}
    assert space.recipe.lr == Range(low=0.1, high=0.2)
    assert (space.search.trials, space.name, space.data) == (5, "y", "/d")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"settings": ["recipe.steps"]}, "expected key=value"),
        ({"settings": ["name.x=1"]}, "'name' is a value, not a group"),
        ({"settings": ["recipe.lr={"]}, "no YAML value"),
        ({"budgets": ["flops"]}, "expected cost=limit"),
        ({"settings": ["recipe.stepps=3"]}, "Did you mean 'steps'"),
    ],
)
def test_a_wrong_option_says_how_it_is_written(tmp_path, options, says):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(UsageError, match=says):
        read_space(path, **options)


@pytest.mark.parametrize(
    ("content", "says"), [("a: [", "no valid YAML"), ("- 1", "mapping of keys"), ("", "mapping of keys")]
)
def test_a_file_that_is_no_space(tmp_path, content, says):
    path = tmp_path / "s.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        read_space(path)


def test_an_empty_group_of_keys_takes_a_setting(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "search:\n")
    assert read_space(path, trials=3).search.trials == 3
    path.write_text(yaml.safe_dump(SMALL) + "budgets: [flops=50%]\n")
    with pytest.raises(UsageError, match="expected cost: limit pairs"):
        read_space(path, budgets=["flops=40%"])


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "digits.yaml").write_text("")
    with pytest.raises(UsageError, match=r"digits\.yaml"):
        read_space(tmp_path / "digit.yaml")


def test_middles_of_distributions():
    assert Range(low=0.01, high=1, log=True).middle == pytest.approx(0.1)
    assert Range(low=1, high=3).middle == 2
    assert Range(low=1, high=3, default=1.5).middle == 1.5
    assert Choices(choices=[3, 1]).middle == 3


def test_every_part_of_the_recipe_can_be_searched():
    """Numbers, whole numbers, names and switches come out of a distribution as what the recipe wants."""
    recipe = {
        "steps": 10, "optimizer": {"choices": ["adamw", "sgd"]}, "schedule": {"choices": ["step", "cosine"], "default": "cosine"},
        "ema": {"low": 0.5, "high": 0.9}, "momentum": {"choices": [0.8, 0.9]},
        "projection": {
            "period": {"low": 5, "high": 20, "log": True}, "energy_transfer": {"choices": [False, True], "default": True},
            "schedule": {"choices": ["removed_energy", "constant"]}, "until_end": True,
        },
    }  # fmt: skip
    space = parse_space(SMALL | {"recipe": recipe}, "f")
    settled = Recipe.settled(space.recipe, middle)
    assert (settled.optimizer, settled.schedule, settled.ema, settled.momentum) == ("adamw", "cosine", 0.7, 0.8)
    projection = settled.projection
    assert (projection.period, projection.energy_transfer, projection.schedule) == (10, True, "removed_energy")
    assert type(projection.period) is int
    assert projection.until_end == 1.0
    assert Recipe.from_dict(json.loads(json.dumps(settled.to_dict()))) == settled
    names = {"optimizer", "schedule", "ema", "momentum", "projection.period", "projection.energy_transfer"}
    assert set(searched_settings(space.recipe)) == names | {"projection.schedule"}
    assert set(check_record(space)["recipe_searched"]) == names | {"projection.schedule"}
    drawn = [Recipe.settled(space.recipe, lambda name, setting, whole: values_of(setting)[-1])]
    assert drawn[0].projection.period == 20
    assert (drawn[0].optimizer, drawn[0].projection.schedule) == ("sgd", "constant")


def test_every_field_of_the_schema_reaches_the_recipe():
    flat = dict(flattened(Recipe.settled(RecipeSpace(steps=1), middle).to_dict()))
    schema = set(RecipeSpace.model_fields) - {"projection", "distillation"}
    schema |= {f"projection.{name}" for name in ProjectionSpace.model_fields}
    schema |= {f"distillation.{name}" for name in DistillationSpace.model_fields}
    assert set(flat) == schema


def test_a_resolved_space_is_read_back_the_same(digits_yaml):
    space = read_space(digits_yaml)
    assert parse_space(yaml.safe_load(yaml.safe_dump(space.model_dump())), "again") == space


@pytest.mark.parametrize(
    "budgets", ["flops=40%, size=1MiB", ["flops=40%", "size=1MiB"], {"flops": "40%", "size": "1MiB"}], ids=str
)
@pytest.mark.parametrize(
    "settings",
    [
        ["recipe.steps=7", "recipe.lr={low: 0.01, high: 0.1}", "layers.exclude=[linear]"],
        {"recipe": {"steps": 7, "lr": {"low": 0.01, "high": 0.1}}, "layers.exclude": ["linear"]},
    ],
    ids=["texts", "values"],
)  # fmt: skip
def test_budgets_and_settings_mean_the_same_however_they_are_spelled(digits_yaml, budgets, settings):
    space = read_space(digits_yaml, budgets=budgets, settings=settings)
    assert space.budgets == {"flops": "40%", "size": "1MiB"}
    assert (space.recipe.steps, space.recipe.lr.high, space.layers.exclude) == (7, 0.1, ["linear"])


def test_budgets_that_are_nothing_of_the_kind_are_refused(digits_yaml):
    with pytest.raises(UsageError, match=r'budgets: expected "flops=50%", a list of such'):
        read_space(digits_yaml, budgets=0.5)


@pytest.mark.parametrize("lr", ["1e-3", "1.e-3", "1E-3", "0.001", "1.0e-3"])
def test_a_number_with_an_exponent_is_a_number(tmp_path, digits_yaml, lr):
    recipe = f"recipe: {{steps: 10, lr: {lr}, weight_decay: {{low: 1e-5, high: {lr}}}}}"
    text = f"name: n\ntask: digits\nmodel: resnet8\nvalidation: 360\n{recipe}\n"
    (tmp_path / "n.yaml").write_text(text)
    assert read_space(tmp_path / "n.yaml").recipe.lr == 0.001
    assert read_space(digits_yaml, settings=[f"recipe.lr={lr}"]).recipe.lr == 0.001
    assert read_space(digits_yaml, settings={"recipe": {"lr": 1e-5}}).recipe.lr == 1e-5
