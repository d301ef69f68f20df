"""The tree as a whole: nothing of one machine in it, and a lock that covers everything."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
LOCK = (ROOT / "locks" / "all.txt").read_text()


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


# Each is broken by a `+`, so that this file does not hold what it forbids.
PLACES = ["/wo" + "rk/", "/tmp/" + "env", "/tmp/" + "house", "/ro" + "ot/", "/op" + "t/"]
HOSTS = [
    *("pypi" + ".org", "python" + "hosted", "npm" + "js.", "debian" + ".org", "crates" + ".io"),
    *("conda" + ".anaconda", "py" + "torch.org/whl", "proxy." + "golang", "astral" + ".sh"),
]


@pytest.mark.parametrize("forbidden", PLACES + HOSTS)
def test_no_file_names_a_machines_path_or_a_registry(forbidden):
    exact = re.compile(rb"(?<![\w.~}-])" + re.escape(forbidden.encode()))
    found = [
        f"{path.relative_to(ROOT)}:{content[: match.start()].count(b'\n') + 1}"
        for path in tracked()
        for content in [path.read_bytes()]
        for match in exact.finditer(content)
    ]
    assert not found, f"{forbidden} is in {', '.join(found)}"


def names(requirements: list) -> set[str]:
    """The packages of a list of requirements, by their normal names."""
    texts = [entry for entry in requirements if isinstance(entry, str)]
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", t)[0]).lower() for t in texts}


def test_the_lock_holds_every_direct_requirement():
    """What is not in the lock would be installed unpinned and unverified: run `make lock`."""
    locked = {line.split("==")[0] for line in LOCK.splitlines() if re.match(r"\w.*==", line)}
    wanted = names(PROJECT["project"]["dependencies"]) | names(PROJECT["build-system"]["requires"])
    for requirements in [*EXTRAS.values(), *GROUPS.values()]:
        wanted |= names(requirements)
    assert wanted <= locked


def test_every_locked_package_has_its_hashes():
    for entry in re.split(r"\n(?=\w)", LOCK.strip()):
        assert "--hash=sha256:" in entry, entry


def test_dev_installs_every_extra_but_those_of_a_device():
    """`make dev` names them one by one; a new extra must not be forgotten there."""
    makefile = (ROOT / "Makefile").read_text()

    def listed(name: str) -> set[str]:
        return {*re.search(rf"^{name} *:= *(.*)$", makefile, re.MULTILINE)[1].split()}

    assert listed("EXTRAS") | listed("DEVICE_EXTRAS") == {*EXTRAS}
    assert listed("DEVICE_EXTRAS") == {"cuda", "tpu"}
    assert listed("GROUPS") | {"build"} == {*GROUPS}


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert {line.split()[1] for line in shown.stdout.splitlines()} == {*phony}
