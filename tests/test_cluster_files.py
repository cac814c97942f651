"""The files of `scripts/cluster/`, read by Ray's own validator, by shells, by the command line that they call. Mistakes in them are found.

What no test here can say (that a cloud accepts them, that images exist) is listed in `scripts/cluster/README.md`.
"""

import copy
import fnmatch
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

from ranksearch.cli import app

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "cluster"
LAUNCHERS = ["aws", "gcp"]
SHELLS = sorted(FOLDER.glob("*.sh"))
COMMANDS = typer.main.get_command(app)
USAGE_ERROR = typer.BadParameter.__mro__[1]
"""Of the click that typer brings along."""


# Every command of ranksearch that they name


def commands(text: str) -> list[list[str]]:
    """The calls of ranksearch in a file, as lists of words, up to the line's end or what ends a command; a verb alone is a mention."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"(?:^|[\s`(])ranksearch +([a-z]+ [^\n`&|;]*)", joined)
    calls = [call for call in found if call.split()[0] in COMMANDS.commands or " --" in call]
    words = [shlex.split(re.split(r" {3,}|\[options", call)[0]) for call in calls]
    return [call for call in words if len(call) > 1]


def parse(call: list[str]) -> None:
    """Reads a call as the command line does, without running it; raises a usage error where it would not be taken."""
    verb, *arguments = [word for word in call if word != "$@"]
    if verb not in COMMANDS.commands:
        raise typer.BadParameter(f"no verb {verb}")
    COMMANDS.commands[verb].make_context(verb, arguments)


def calls_of(path: Path) -> list[list[str]]:
    return commands(path.read_text())


@pytest.mark.parametrize(
    "path", sorted(p for p in FOLDER.iterdir() if p.name != "Dockerfile.dockerignore"), ids=lambda p: p.name
)
def test_every_command_of_ranksearch_is_one(path):
    calls = calls_of(path)
    if path.suffix in (".yaml", ".md") and path.name != "rayjob.yaml":
        assert any(call[0] == "submit" for call in calls)
    for call in calls:
        parse(call)
        for word in call:
            if word.startswith("search_spaces/"):
                assert (ROOT / word).is_file(), word


def test_the_scripts_search_and_resume():
    for path in SHELLS:
        assert {call[0] for call in calls_of(path)} >= {"search", "resume"}


@pytest.mark.parametrize(
    "wrong",
    [
        "ranksearch search a.yaml --budgets flops=50%",
        "ranksearch resume NAME --runs",
        "ranksearch serch a.yaml --trials 3",
        "ranksearch search a.yaml --trials many",
        "`ranksearch stop --address http://head:8265`",
    ],
)
def test_a_wrong_command_would_be_found(wrong):
    (call,) = commands(wrong)
    with pytest.raises(USAGE_ERROR):
        parse(call)


# Ray's cluster launcher


def launcher(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def validate(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_takes_the_cluster(name):
    config = launcher(name)
    validate(config)
    head, workers = config["available_node_types"]["head"], config["available_node_types"]["gpu_spot"]
    assert head["resources"] == {"CPU": 0}
    assert workers["resources"]["GPU"] > 0
    spot = {
        "aws": lambda node: node["InstanceMarketOptions"]["MarketType"] == "spot",
        "gcp": lambda node: node["scheduling"]["provisioningModel"] == "SPOT",
    }[name]
    assert spot(workers["node_config"])
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f":{pinned}-py311" in config["docker"]["image"]
    for kind in ("head", "worker"):
        assert any("RAY_AUTH_MODE=token" in command for command in config[f"{kind}_start_ray_commands"])
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.update(max_worker=4), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["gpu_spot"].update(max_worker=4), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["gpu_spot"].pop("node_config"), jsonschema.ValidationError),
        (lambda c: c["available_node_types"]["gpu_spot"]["resources"].update(GPU="one"), jsonschema.ValidationError),
        (lambda c: c.update(setup_commands="pip install ray"), Exception),
        (lambda c: c.update(head_node_type="haed"), ValueError),
        (lambda c: c.update(max_workers=1), ValueError),
        (lambda c: c["docker"].pop("container_name"), AssertionError),
    ],
)
def test_a_mistake_in_a_cluster_would_be_found(name, change, error):
    config = launcher(name)
    change(config)
    with pytest.raises(error):
        validate(config)


# KubeRay: no schema of its resources is at hand, so field names are held against the tables below


POD = {
    "spec": {
        "restartPolicy", "automountServiceAccountToken", "securityContext", "nodeSelector", "tolerations", "terminationGracePeriodSeconds",
        "containers", "volumes",
    },
    "container": {"name", "image", "securityContext", "ports", "resources", "volumeMounts", "env", "command", "args"},
}  # fmt: skip
GROUP = {"rayStartParams", "template", "serviceType", "groupName", "replicas", "minReplicas", "maxReplicas"}
RAYJOB = {
    "entrypoint", "runtimeEnvYAML", "metadata", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "activeDeadlineSeconds", "submitterPodTemplate", "rayClusterSpec",
}  # fmt: skip
CLUSTER = {
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
}


def check_pod(template, labels):
    spec = template["spec"]
    assert template["metadata"]["labels"] == labels
    assert set(spec) <= POD["spec"], set(spec) - POD["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        assert set(container) <= POD["container"], set(container) - POD["container"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
        assert set(container["resources"]) <= {"requests", "limits"}


def check_rayjob(documents):
    """Fields that are there, claims, labels and selectors that name each other, nothing open to the outside."""
    claim, policy, job = documents
    assert [d["kind"] for d in documents] == ["PersistentVolumeClaim", "NetworkPolicy", "RayJob"]
    assert (claim["apiVersion"], policy["apiVersion"], job["apiVersion"]) == ("v1", "networking.k8s.io/v1", "ray.io/v1")
    spec, labels = job["spec"], policy["spec"]["podSelector"]["matchLabels"]
    assert set(spec) <= RAYJOB, set(spec) - RAYJOB
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER, set(cluster) - CLUSTER
    assert cluster.get("authOptions") == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    check_pod(spec["submitterPodTemplate"], labels)
    for group in (head, *workers):
        assert set(group) <= GROUP, set(group) - GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"], labels)
        (claimed,) = [
            v["persistentVolumeClaim"]["claimName"]
            for v in group["template"]["spec"]["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert claimed == claim["metadata"]["name"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] >= 1
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) <= {"env_vars", "working_dir", "py_modules", "pip"}
    script, space, runs, study, *options = shlex.split(spec["entrypoint"])[1:]
    assert (ROOT / Path(script).relative_to("/opt/ranksearch")).is_file()
    assert (ROOT / Path(space).relative_to("/opt/ranksearch")).is_file()
    assert spec["metadata"] == {"ranksearch.study": study, "ranksearch.runs": runs}
    parse(["search", space, *options])
    assert spec["shutdownAfterJobFinishes"]


def rayjob():
    return list(yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text()))


def test_the_rayjob_holds_together():
    check_rayjob(rayjob())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[2]["spec"].update(entryPoint="x"),
        lambda d: d[2]["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
        lambda d: d[2]["spec"]["rayClusterSpec"].pop("authOptions"),
        lambda d: d[2]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=1),
        lambda d: d[2]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"].update(contaners=[]),
        lambda d: d[0]["metadata"].update(name="other"),
        lambda d: d[1]["spec"]["podSelector"]["matchLabels"].update(app="other"),
        lambda d: d[2]["spec"].update(entrypoint=d[2]["spec"]["entrypoint"].replace("--set", "--sett")),
    ],
)
def test_a_mistake_in_the_rayjob_would_be_found(change):
    documents = copy.deepcopy(rayjob())
    change(documents)
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check_rayjob(documents)


# The image

INSTRUCTIONS = {
    "FROM",
    "RUN",
    "COPY",
    "WORKDIR",
    "ENV",
    "USER",
    "CMD",
    "ENTRYPOINT",
    "ARG",
    "LABEL",
    "EXPOSE",
    "VOLUME",
}


def check_dockerfile(text, ignore):
    """Known instructions, FROM first, every source of COPY in the repository and in what `ignore` leaves of it, no root at the end."""
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).split("\n")
    steps = [line.split(None, 1) for line in lines if line.strip()]
    assert {step[0] for step in steps} <= INSTRUCTIONS
    assert steps[0][0] == "FROM"
    rules = [line for line in ignore.split("\n") if line and not line.startswith("#")]
    for _, words in [step for step in steps if step[0] == "COPY"]:
        for source in shlex.split(words)[:-1]:
            assert (ROOT / source).exists(), source
            last = [rule for rule in rules if fnmatch.fnmatch(source, rule.removeprefix("!").removeprefix("**/"))][-1]
            assert last.startswith("!"), f"{source} is not in the context"
    assert [step[1] for step in steps if step[0] == "USER"][-1] not in ("root", "0")


def test_the_image_is_made_of_what_is_there():
    text, ignore = (FOLDER / "Dockerfile").read_text(), (FOLDER / "Dockerfile.dockerignore").read_text()
    check_dockerfile(text, ignore)
    extras = re.search(r"'\.\[(.+)\]'", text)[1].split(",")
    declared = re.search(
        r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )[1]
    assert all(re.search(rf"^{extra} = ", declared, re.MULTILINE) for extra in extras)
    for wrong in (
        text.replace("COPY ranksearch ranksearch", "COPY ranksaerch ranksearch"),
        text.replace("COPY ranksearch ranksearch", "COPY tests tests"),
        text.replace("WORKDIR", "WORKDRI"),
        text.replace("USER ray", "USER root"),
    ):
        assert wrong != text
        with pytest.raises((AssertionError, IndexError)):
            check_dockerfile(wrong, ignore)


# The scripts


@pytest.mark.parametrize("path", SHELLS, ids=lambda p: p.name)
def test_shells_read_the_scripts(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & stat.S_IXUSR
    if (shellcheck := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    subprocess.run([shellcheck, path], check=True)


STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> $LOG; if [ "$1" = show ]; then echo node1; echo node2; fi',
    "srun": 'echo "srun $*" >> $LOG; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 127.0.0.1 ::1",
    "ray": 'echo "ray $* token=$RAY_AUTH_TOKEN mode=$RAY_AUTH_MODE" >> $LOG; echo $$ >> $LOG.pids; exec sleep 300',
    "python": 'if [[ $2 == *secrets* ]]; then echo secret$$; else wc -l < $LOG.pids; fi',
    "ranksearch": 'echo "ranksearch $*" >> $LOG; trap "exit 130" INT; if [ -n "$LONG" ]; then for i in {1..300}; do sleep 0.1; done; fi; '
    "exit ${CODE:-0}",
}  # fmt: skip


def runs(pid: str) -> bool:
    """Whether a process is there, and not only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Slurm:
    """A Slurm of stand-ins on PATH: every call of the script is written to a log."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.log, self.runs, programs = folder / "log", folder / "runs", folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, body in STAND_INS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        for file in (self.log, folder / "log.pids"):
            file.write_text("")
        self.environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LOG": str(self.log), "RANKSEARCH_RUNS": str(self.runs),
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3",
            "SLURM_GPUS_ON_NODE": "1", "LONG": "",
        } | variables  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [FOLDER / "slurm.sh", *arguments],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls(self, program: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(f"{program} ")]

    def end(self, script: subprocess.Popen) -> tuple[int, str]:
        """Exit code and what was said; nothing that the script started is left."""
        said = script.communicate(timeout=30)[1]
        end = time.monotonic() + 10
        while left := [pid for pid in (self.log.parent / "log.pids").read_text().split() if runs(pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.02)
        return script.returncode, said


def test_the_slurm_script_starts_a_cluster_searches_and_ends_it(tmp_path):
    slurm = Slurm(tmp_path, CODE="2")
    code, _ = slurm.end(
        slurm.start("spaces/mine.yaml", "--budget", "flops=50%", "--set", "recipe.lr={low: 1, high: 2}")
    )
    assert code == 2  # the search's own
    assert slurm.calls("ranksearch") == [
        f"ranksearch search spaces/mine.yaml --name mine --runs {slurm.runs} --address 127.0.0.1:29422 --budget flops=50% "
        "--set recipe.lr={low: 1, high: 2}"
    ]
    head, workers = slurm.calls("ray")
    assert "start --head" in head
    assert "--include-dashboard=false" in head
    assert "--num-cpus=3 --num-gpus=1" in workers
    tokens = {re.search(r"token=(\S+) mode=token", call)[1] for call in (head, workers)}
    assert len(tokens) == 1
    assert any("--nodelist=node1 ray start --head" in call for call in slurm.calls("srun"))
    assert any("--exclude=node1 ray start --address=127.0.0.1:29422" in call for call in slurm.calls("srun"))
    assert not [call for call in slurm.calls("scontrol") if "requeue" in call]


@pytest.mark.parametrize(("signal_", "queued_again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_slurm_script_is_interrupted_and_goes_on_with_its_study(tmp_path, signal_, queued_again):
    slurm = Slurm(tmp_path, LONG="yes", RANKSEARCH_STUDY="named")
    script = slurm.start("mine.yaml")
    end = time.monotonic() + 20
    while not slurm.calls("ranksearch"):
        assert time.monotonic() < end
        time.sleep(0.05)
    script.send_signal(signal_)
    code, _ = slurm.end(script)
    assert code == 130
    assert ("scontrol requeue 4711" in slurm.calls("scontrol")) == queued_again
    (slurm.runs / "named").mkdir(parents=True)
    (slurm.runs / "named" / "study.json").touch()
    again = Slurm(tmp_path, RANKSEARCH_STUDY="named")
    assert again.end(again.start("mine.yaml"))[0] == 0
    assert again.calls("ranksearch") == [f"ranksearch resume named --runs {slurm.runs} --address 127.0.0.1:29422"]


def test_the_slurm_script_says_what_is_missing(tmp_path):
    slurm = Slurm(tmp_path)
    code, said = slurm.end(slurm.start())
    assert code != 0
    assert "usage: sbatch slurm.sh SPACE.yaml" in said
    code, said = slurm.end(slurm.start("mine.yaml", "--name", "other"))
    assert code == 2
    assert "RANKSEARCH_STUDY" in said


def test_search_or_resume_begins_and_goes_on(tmp_path):
    slurm = Slurm(tmp_path)
    command = [FOLDER / "search_or_resume.sh", "mine.yaml", slurm.runs, "named", "--trials", "3"]
    subprocess.run(command, check=True, env=slurm.environment)
    (slurm.runs / "named").mkdir(parents=True)
    (slurm.runs / "named" / "study.json").touch()
    subprocess.run(command, check=True, env=slurm.environment)
    assert slurm.calls("ranksearch") == [
        f"ranksearch search mine.yaml --name named --runs {slurm.runs} --address auto --trials 3",
        f"ranksearch resume named --runs {slurm.runs} --address auto",
    ]
