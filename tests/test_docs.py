"""What the pages say is so: their examples run, their commands are taken by the command line, their links lead somewhere.

Python blocks (```python) of the pages in `EXECUTED` are run in their order, in one namespace per page and a folder with the repository's
search spaces, the digits' one with few steps. Of their commands, those in `CHEAP` are run there too; all others are parsed.
"""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import ranksearch
from ranksearch.cli import app
from ranksearch.deploy.formats import FORMATS
from ranksearch.tasks.probe import check_task
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "scripts"))

import make_schema_page

PAGES = sorted(
    path for place in ("*.md", "docs/*.md", "ranksearch/*/*.md", "scripts/*.md") for path in REPOSITORY.glob(place)
)
EXECUTED = ("docs/python.md", "README.md")
CHEAP = ("layers", "check", "front", "report", "export")
REFUSED = typer.BadParameter.__mro__[1]
"""Click's UsageError, typer's own copy of click or not."""
VERBS = typer.main.get_command(app).commands
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def named(path):
    return path.relative_to(REPOSITORY).as_posix()


def blocks(text, language):
    return [body for found, body in BLOCK.findall(text) if found == language]


def commands(text):
    """Arguments of every `ranksearch` in a shell block, or in a table's or a sentence's code."""
    lines = [line for body in blocks(text, "") for line in body.splitlines()]
    spans = re.findall(r"`(ranksearch [^`]+)`", BLOCK.sub("", text))
    for line in [*lines, *spans]:
        for part in line.replace("\\|", "|").split("&&"):
            words = shlex.split(part, comments=True) if part.strip().startswith("ranksearch ") else []
            if len(words) > 1 and words[1] in VERBS:
                yield words[1:]


# Pages that are written from the code ------------------------------------------------------------------------------


def test_the_page_of_the_search_space_is_what_the_schema_says():
    assert make_schema_page.PAGE.read_text(encoding="utf-8") == make_schema_page.page(), (
        f"a key or its text was changed; write the page anew: {make_schema_page.COMMAND}"
    )


def test_the_check_of_the_page_fails_where_it_is_out_of_date(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_schema_page, "PAGE", tmp_path / "search_space.md")
    monkeypatch.setattr(sys, "argv", ["make_schema_page", "--check"])
    assert make_schema_page.main() == 1
    assert make_schema_page.COMMAND in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make_schema_page"])
    assert make_schema_page.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_schema_page", "--check"])
    assert make_schema_page.main() == 0


def test_every_key_of_a_space_says_what_it_is():
    keys = {key.name: key for group in make_schema_page.groups() for key in group.keys}
    assert [name for name, key in keys.items() if not key.text] == [], "write a docstring under the key"
    assert keys["recipe.lr"].searched
    assert keys["recipe.lr"].kind == "number, 1e-08 to 100"
    assert not keys["search.trials"].searched
    assert (keys["search.trials"].kind, keys["search.trials"].default) == ("whole number, ≥ 1", "`16`")
    assert keys["recipe.optimizer"].kind == "`sgd`, `adamw`"
    assert keys["recipe.steps"].default == "**required**"


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_that_is_taken(verb):
    told = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert told.exit_code == 0
    assert "Example: ranksearch" in told.stdout
    (example,) = re.findall(r"Example: ranksearch (.+)", VERBS[verb].help)
    parsed(shlex.split(example))


def parsed(words):
    """Lets the real command line read the arguments of a verb; nothing runs."""
    with VERBS[words[0]].make_context(words[0], list(words[1:])):
        pass


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_a_page_are_taken_by_the_command_line(page):
    text = page.read_text(encoding="utf-8")
    shown = [shlex.join(words) for body in blocks(text, "") for words in commands(f"```\n{body}```\n")]
    for words in commands(text):
        if len(words) == 1 or words[-1] == "--help":
            continue  # a verb by its name
        try:
            parsed(words)
        except REFUSED as error:
            if "Missing" in error.format_message() and shlex.join(words) not in shown:
                continue  # a sentence names the verb and what it is about
            pytest.fail(f"{named(page)}: ranksearch {shlex.join(words)}: {error.format_message()}")
        for word in words:
            if word.startswith("search_spaces/"):
                assert (REPOSITORY / word).exists(), f"{named(page)}: there is no {word}"


def test_a_command_that_is_not_taken_would_be_noticed():
    with pytest.raises(REFUSED, match="No such option"):
        parsed(["search", "search_spaces/digits_resnet8.yaml", "--budgets", "flops=50%"])
    with pytest.raises(REFUSED, match="Missing"):
        parsed(["resume"])
    assert list(commands("say `ranksearch front NAME`\n```\npip install . && ranksearch ui x\n```\n")) == [
        ["ui", "x"],
        ["front", "NAME"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_scripts_of_a_page_are_there_with_their_options(page):
    for script, options in re.findall(r"python scripts/(\w+)\.py([^`\n&#]*)", page.read_text(encoding="utf-8")):
        path = REPOSITORY / "scripts" / f"{script}.py"
        assert path.is_file(), f"{named(page)}: there is no scripts/{script}.py"
        known = path.read_text() + (REPOSITORY / "scripts" / "report.py").read_text()
        for option in re.findall(r"--([a-z-]+)", options):
            written = (f'"--{option}"', f"{option.replace('-', '_')}=")
            assert any(form in known for form in written), f"{named(page)}: scripts/{script}.py has no --{option}"


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), f"{named(page)}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {named(target)} has no heading #{anchor}"


# Examples ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))


def train(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def names():
    """What the pages take as given."""
    torch.manual_seed(0)
    model, loader = Net(), [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(12)]
    return {
        "model": model, "loader": loader, "batches": [x for x, _ in loader[:2]], "example_input": torch.randn(1, 3, 8, 8), "train": train,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the search spaces, the digits' study a matter of seconds."""
    spaces = tmp_path / "search_spaces"
    spaces.mkdir()
    for path in (REPOSITORY / "search_spaces").glob("*.*"):
        (spaces / path.name).write_text(path.read_text())
    digits = spaces / "digits_resnet8.yaml"
    reduced = re.sub(r"steps: \d+", "steps: 20, bn_batches: 2".replace(", ", "\n  "), digits.read_text(), count=1)
    digits.write_text(f"{reduced}\ntracking: {{models: false}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same(small, model):
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(600)
def test_examples_of_the_pages_run_in_their_order(folder):
    done = set()
    for page in EXECUTED:
        text, space = (REPOSITORY / page).read_text(encoding="utf-8"), names()
        found = blocks(text, "python")
        assert len(found) >= 4
        for number, body in enumerate(found, 1):
            if body not in done:  # the study is the same on both pages
                exec(compile(body, f"{page}, example {number}", "exec"), space)
            done.add(body)
        same(space["small"], space["model"])  # both pages end on a projection
        if "best" in space:
            assert space["best"]["macs_ratio"] <= 0.3
            assert isinstance(space["net"], nn.Module)
    check_task(space["make_task"]())
    onnx = all(map(importlib.util.find_spec, FORMATS["onnx"].needs))
    for words in (words for page in EXECUTED for words in commands((REPOSITORY / page).read_text(encoding="utf-8"))):
        if words[0] in CHEAP and not {"NAME", "SPACE.yaml"} & set(words) and (onnx or "onnx" not in words):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"ranksearch {shlex.join(words)}: {result.output}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_of_a_page_is_python(page):
    for body in blocks(page.read_text(encoding="utf-8"), "python"):
        compile(body, named(page), "exec")


def test_public_names_are_there_and_import_nothing_heavy():
    assert all(getattr(ranksearch, name) is not None for name in ranksearch.__all__)
    code = "import sys, ranksearch; sys.exit(bool({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
