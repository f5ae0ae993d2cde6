"""What launch/ has for clusters: scripts that shellcheck passes, and manifests with the fields that Kubeflow reads."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import load

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ["mpirun.sh", "slurm.sbatch", "slurm-here.sh", "torchrun.sh"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing: apt-get install shellcheck")
def test_shellcheck_passes() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_read_by_bash(name: str) -> None:
    assert subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["mpirun.sh"], "the first argument must be the number of ranks, got ''"),
        (["mpirun.sh", "0"], "must be the number of ranks, got '0'"),
        (["env", "MPIRUN=/no/such/mpirun", "mpirun.sh", "2"], "/no/such/mpirun does not run"),
        (["env", "-u", "SLURM_JOB_ID", "slurm.sbatch"], "this is a batch script"),
        (["slurm-here.sh"], "no command given"),
    ],
)
def test_scripts_refuse_in_words(command: list[str], words: str) -> None:
    resolved = [str(LAUNCH / part) if part in SCRIPTS else part for part in command]
    done = subprocess.run(resolved, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


# A field's type, or a dictionary of what is below it; "?" = may be missing. What these manifests are to say, no more:
# the schemas are those of test_manifests_fit_the_schemas, but for PyTorchJob outside its pods: the package of its
# models wants a whole Kubernetes client. The fields are as in its version 1.9.
ENV = [{"name": str, "value": str}]
RESOURCES = {"requests": {"cpu": str, "memory": str}, "limits": {"cpu": str, "memory": str, "nvidia.com/gpu?": int}}
POD = {
    "spec": {
        "containers": [
            {
                "name": str,
                "image": str,
                "command": [str],
                "args": [str],
                "env": ENV,
                "resources": RESOURCES,
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    }
}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": POD}
HEAD = {"apiVersion": str, "kind": str, "metadata": {"name": str, "labels": {"generation": str}}}
SCHEMAS: dict[str, Any] = {
    "TrainJob": {
        **HEAD,
        "spec": {
            "runtimeRef": {"name": str},
            "trainer": {
                "image": str,
                "numNodes": int,
                "numProcPerNode": int,
                "command": [str],
                "args": [str],
                "env": ENV,
                "resourcesPerNode": RESOURCES,
            },
        },
    },
    "PyTorchJob": {
        **HEAD,
        "spec": {
            "nprocPerNode": str,
            "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
            "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
        },
    },
}


def misfits(value: Any, schema: Any, where: str = "") -> list[str]:
    """Where ``value`` is not what the schema says."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where} is {value!r}, must be {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where} must be a list"]
        return [text for i, item in enumerate(value) for text in misfits(item, schema[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where} must be a mapping"]
    known = {name.removesuffix("?"): below for name, below in schema.items()}
    found = [f"{where}.{name} is unknown" for name in value if name not in known]
    found += [f"{where}.{name} is missing" for name in schema if not name.endswith("?") and name not in value]
    return found + [t for n, below in known.items() if n in value for t in misfits(value[n], below, f"{where}.{n}")]


def manifests() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_manifests_have_the_fields_that_kubeflow_reads() -> None:
    found = manifests()
    assert set(found) == set(SCHEMAS)
    for kind, document in found.items():
        assert misfits(document, SCHEMAS[kind], kind) == []
    assert found["TrainJob"]["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert found["PyTorchJob"]["apiVersion"] == "kubeflow.org/v1"


def test_the_schema_check_finds_mistakes() -> None:
    wrong = manifests()["TrainJob"]
    wrong["spec"]["trainer"]["numNodes"] = "4"
    wrong["spec"]["trainer"]["numProcPerNod"] = wrong["spec"]["trainer"].pop("numProcPerNode")
    assert misfits(wrong, SCHEMAS["TrainJob"], "") == [
        ".spec.trainer.numProcPerNod is unknown",
        ".spec.trainer.numProcPerNode is missing",
        ".spec.trainer.numNodes is '4', must be int",
    ]


def fitted(document: dict[str, Any]) -> list[Any]:
    """What Kubeflow's and Kubernetes' own models make of a manifest, part by part. Raises ValidationError."""
    from kubeflow_trainer_api import models

    if document["kind"] == "TrainJob":
        return [models.TrainerV1alpha1TrainJob.from_dict(document)]
    replicas = document["spec"]["pytorchReplicaSpecs"].values()
    return [models.IoK8sApiCoreV1PodTemplateSpec.from_dict(replica["template"]) for replica in replicas]


@pytest.mark.skipif(find_spec("kubeflow_trainer_api") is None, reason="pip install kubeflow-trainer-api")
def test_manifests_fit_the_schemas() -> None:
    """TrainJob whole, PyTorchJob's pods. A field that a schema does not know is dropped, and missed afterwards."""
    found = manifests()
    (job,) = fitted(found["TrainJob"])
    assert job.to_dict() == found["TrainJob"]
    replicas = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"].values()
    assert [pod.to_dict() for pod in fitted(found["PyTorchJob"])] == [replica["template"] for replica in replicas]
    trainer = found["TrainJob"]["spec"]["trainer"]
    trainer["numNode"] = 4
    assert fitted(found["TrainJob"])[0].to_dict() != found["TrainJob"]
    trainer["numNodes"] = "4"
    with pytest.raises(ValueError, match="numNodes"):
        fitted(found["TrainJob"])


def test_both_manifests_start_what_there_is() -> None:
    """As many pods either way; a container with the name that the operator wants; a command that this version takes."""
    found = manifests()
    trainer, operator = found["TrainJob"]["spec"]["trainer"], found["PyTorchJob"]["spec"]
    replicas = operator["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert 1 + replicas["Worker"]["replicas"] == trainer["numNodes"]
    assert int(operator["nprocPerNode"]) == trainer["numProcPerNode"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    for part in (trainer, container):
        assert part["command"][0] == "torchrun"
        here = [text.replace("/workspace/sparcomm", str(LAUNCH.parent)) for text in (*part["command"], *part["args"])]
        assert Path(here[1]).is_file()
        assert here[2] == "--config"
        load(Path(here[3]), here[4:])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is missing: pip install 'ray[train]'")
def test_two_workers_of_ray_train(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(LAUNCH / "ray_train.py"),
        *shlex.split(f"--workers 2 --steps 40 --storage {tmp_path}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found["launcher"], found["ranks"], found["backend"]) == ("ray", 2, "gloo")
    assert found["identical"]
    assert found["last_loss"] < 0.9 * found["first_loss"]
    assert {"hook-rank0.pt", "hook-rank1.pt", "model.pt"} <= set(found["checkpoint"])
    assert "launcher ray: 2 ranks, backend gloo" in done.stdout + done.stderr


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_script_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, str(LAUNCH / "ray_train.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'ray[train]'" in done.stderr
