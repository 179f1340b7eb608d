# SPDX-License-Identifier: Apache-2.0
"""What a tag publishes has one version, and the changelog its date."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import genperf

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".github" / "workflows" / "wheels.yml"
FILES = [".ci/check-version", "genperf/_version.py", "CITATION.cff", "recipes/conda/recipe.yaml", "CHANGELOG.md"]
UNRELEASED = "## 0.3.0 (unreleased)"


@pytest.fixture
def release(tmp_path):
    """A copy of the files that state the version, as 0.3.0 dated 2027-01-31, and the check."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for file in FILES[1:4]:
        replace(tmp_path / file, genperf.__version__, "0.3.0")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.3.0 (2027-01-31)\n\nNew ops.\n\n## 0.2.0 (2026-12-01)\n")
    return tmp_path


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def check(folder, *tag):
    return subprocess.run([sys.executable, "-I", folder / ".ci" / "check-version", *tag], capture_output=True, text=True)


def test_all_files_state_this_version():
    run = check(ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"genperf {genperf.__version__}\n", "")


def test_a_release_has_one_version_and_a_date(release):
    run = check(release, "v0.3.0")
    assert (run.returncode, run.stdout, run.stderr) == (0, "genperf 0.3.0\n", "")


@pytest.mark.parametrize(
    ("file", "old", "new", "tag", "sentence"),
    [
        ("CITATION.cff", "0.3.0", "0.2.0", "v0.3.0", "genperf/_version.py 0.3.0, but CITATION.cff 0.2.0."),
        ("recipes/conda/recipe.yaml", "0.3.0", "0.2.0", "v0.3.0", "genperf/_version.py 0.3.0, but recipes/conda/recipe.yaml 0.2.0."),
        ("CHANGELOG.md", "## 0.3.0 (2027-01-31)\n\nNew ops.\n\n", "", "v0.3.0", "genperf/_version.py 0.3.0, but CHANGELOG.md 0.2.0."),
        ("CHANGELOG.md", "## 0.3.0 (2027-01-31)", "## 0.3.0", "v0.3.0", "CHANGELOG.md states no version"),
        ("CHANGELOG.md", "## 0.3.0 (2027-01-31)", UNRELEASED, "v0.3.0", "'## 0.3.0 (YYYY-MM-DD)', got '## 0.3.0 (unreleased)'."),
        ("CHANGELOG.md", "0.3.0", "0.3.0", "v0.3.1", "genperf/_version.py 0.3.0, but the tag 0.3.1."),
    ],
)
def test_a_release_that_disagrees_is_not_published(file, old, new, tag, sentence, release):
    replace(release / file, old, new)
    run = check(release, tag)
    assert run.returncode == 1
    assert sentence in run.stderr
    assert run.stdout == ""


@pytest.mark.skipif(not WHEELS.exists(), reason="a source distribution has no workflows")
def test_publishing_waits_for_the_check():
    jobs = WHEELS.read_text()
    sdist, publish = jobs.index("\n  sdist:"), jobs.index("\n  publish:")
    assert '.ci/check-version "$GITHUB_REF_NAME"' in jobs[sdist:publish]
    assert "needs: [wheel, sdist]" in jobs[publish:]
