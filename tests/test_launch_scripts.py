"""The launchers of pods and clusters start commands that the library accepts; their tools are replaced by recorders."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from fmjax.experiments import workdir

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
if not LAUNCH.exists() or not (ROOT / ".git").exists():
    pytest.skip("the launchers are files of a checkout", allow_module_level=True)


def run(tmp_path, script, *arguments, tools=(), environment=None):
    """Run a script with recorders in the place of some tools; return the process and the recorded calls."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for tool in tools:
        (folder / tool).write_text(
            f'#!/bin/sh\nprintf "%s\\0" {tool} "$@" >> "{record}"\nprintf "\\n\\0" >> "{record}"\n'
        )
        (folder / tool).chmod(0o755)
    variables = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | (environment or {})
    done = subprocess.run(
        ["bash", str(script), *arguments], env=variables, capture_output=True, text=True, cwd=tmp_path
    )
    calls = record.read_text().split("\n\0") if record.exists() else []
    return done, [call.split("\0") for call in calls if call]


@pytest.mark.parametrize(
    ("place", "folder"), [("gs://bucket/runs/digits", "/mnt/fmjax/runs/digits"), ("/shared/digits", "/shared/digits")]
)
def test_the_tpu_script_starts_what_the_library_accepts(tmp_path, place, folder):
    arguments = ["pod", "us-central2-b", "configs/digits.py", place, "--config.steps=10"]
    done, calls = run(tmp_path, LAUNCH / "tpu_pod.sh", *arguments, tools=["gcloud"])
    assert done.returncode == 0, done.stderr
    command = next(a for call in calls for a in call if a.startswith("--command="))
    started = re.search(r"--workdir=(\S+)", command)[1]
    assert str(workdir.local(started)) == folder
    assert "--config.steps=10" in command and "FMJAX_DISTRIBUTED=1" in command
    assert ("gcsfuse --implicit-dirs bucket /mnt/fmjax" in command) == place.startswith("gs://")


def test_the_tpu_script_refuses_a_folder_of_one_host(tmp_path):
    done, calls = run(tmp_path, LAUNCH / "tpu_pod.sh", "pod", "zone", "config.py", "workdir", tools=["gcloud"])
    assert done.returncode == 2 and "WORKDIR=workdir" in done.stderr and not calls


def test_the_jobset_starts_what_the_library_accepts():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    for name, value in {"IMAGE": "image", "CONFIG": "configs/digits.py", "BUCKET": "bucket", "RUN": "digits"}.items():
        assert f"${{{name}}}" in text and re.search(rf"export .*{name}=", text), name
        text = text.replace(f"${{{name}}}", value)
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    container, volume = pod["spec"]["containers"][0], pod["spec"]["volumes"][0]
    started = container["command"][-1].removeprefix("--workdir=")
    assert workdir.local(started) == Path("/workdir/digits")
    assert started.startswith(container["volumeMounts"][0]["mountPath"])
    assert container["volumeMounts"][0]["name"] == volume["name"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_the_slurm_script_starts_what_the_library_accepts(tmp_path):
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path)}
    arguments = ["configs/digits.py", "runs/digits", "--config.steps=10"]
    done, (call,) = run(tmp_path, LAUNCH / "slurm.sbatch", *arguments, tools=["srun"], environment=environment)
    assert done.returncode == 0, done.stderr
    assert "--config=configs/digits.py" in call and "--config.steps=10" in call
    started = next(a for a in call if a.startswith("--workdir=")).removeprefix("--workdir=")
    assert workdir.local(started) == Path.cwd() / "runs/digits"
