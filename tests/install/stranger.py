"""Run commands as a user who owns neither the installation nor a home, and list the files they leave.

``python -m tests.install.stranger make demo SIZE=smoke`` runs a make target of the checkout so, with an OUTPUT of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NUMBER = 61234
PRUNED = ("/proc", "/sys", "/usr", "/lib", "/opt", "*/site-packages")


class Stranger:
    """A user id that stands in no list of users, with a working folder, a TMPDIR and an output of its own in ``folder``.

    Only root can be somebody else; anybody else runs the commands as themselves, and ``created`` is of no use.
    """

    def __init__(self, folder: Path, python: Path) -> None:
        self.other = os.getuid() == 0
        self.cwd, self.tmp, self.output = folder / "cwd", folder / "tmp", folder / "output"
        for path in (self.cwd, self.tmp, self.output):
            path.mkdir(parents=True)
            if self.other:
                os.chown(path, NUMBER, NUMBER)
        self.prefix = _prefix(python) if self.other else []
        self.start = folder / "start"
        self.start.touch()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/nonexistent",
            "TMPDIR": str(self.tmp),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        words = [*self.prefix, *(str(word) for word in command)]
        return subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=self.cwd, env=self.environment
        )  # fmt: skip

    def created(self) -> list[str]:
        """The files that this user has written since this object was made, outside its output and its TMPDIR. Folders
        that are pruned are not writable for it."""
        pruned = [*PRUNED, str(self.output), str(self.tmp)]
        conditions = [word for path in pruned for word in ("-o", "-path", path)][1:]
        command = ["find", "/", "/dev/shm", "-xdev", "(", *conditions, ")", "-prune", "-o"]
        # The time of the last change of a file's state: the time of its contents can be set to any value.
        command += ["-uid", str(NUMBER), "-cnewer", str(self.start), "-print"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return sorted(set(found.stdout.splitlines()) - {str(self.cwd)})


def _prefix(python: Path) -> list[str]:
    """Become the stranger; if ``python`` is in a folder that only root may enter, keep the right to read everything."""
    plain = ["setpriv", f"--reuid={NUMBER}", f"--regid={NUMBER}", "--clear-groups"]
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True); print(sys.version)"
    probe = subprocess.run([*plain, str(python), "-c", code], capture_output=True, text=True, check=False, cwd="/")
    if probe.returncode == 0 and probe.stdout.strip() == sys.version:
        return plain
    return [*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def main(command: list[str]) -> int:
    """Run ``command`` in the checkout; returns 1 if it wrote outside its output and TMPDIR."""
    folder = Path(tempfile.mkdtemp(prefix="stranger-"))
    folder.chmod(0o755)
    try:
        user = Stranger(folder, Path(sys.executable))
        words = [*user.prefix, *command, f"OUTPUT={user.output / 'demo'}"]
        code = subprocess.run(words, check=False, env=user.environment).returncode
        strays = user.created() if user.other else []
        for path in strays:
            print(f"written outside the output and TMPDIR: {path}", file=sys.stderr)
        return code or int(bool(strays))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
