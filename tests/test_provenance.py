import subprocess

from bundle.provenance import git_commit


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", "-C", folder, *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_that_of_the_checkout_and_tells_of_changes(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "new").write_text("")
    assert git_commit(tmp_path) == f"{commit}+changes"


def test_a_package_inside_the_checkout_of_something_else_has_no_commit(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") == "unknown"
    assert git_commit(tmp_path / "missing") == "unknown"
