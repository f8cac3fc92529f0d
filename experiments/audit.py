"""``make audit``: what is pinned in ``requirements.lock``, against PyPI's list of known vulnerabilities.

pip-audit passes over packages that it cannot look up; here that is told, and is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from experiments.figures import ROOT

LOCK = ROOT / "requirements.lock"


def audit(pip_audit: str, lock: Path = LOCK) -> tuple[int, list[str]]:
    """Ask pip-audit.

    Args:
        pip_audit: its command.
        lock: requirements with hashes, which it takes as they are.

    Returns:
        an exit status (0: nothing is known against any package, 1: something is, 2: not all could be looked up), and
        lines that say so.
    """
    options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(
        [pip_audit, *options, "--requirement", str(lock)], capture_output=True, text=True, check=False
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        words = done.stderr.strip().splitlines() or ["it says nothing"]
        return 2, [f"audit: the list of vulnerabilities cannot be asked ({words[-1][:200]}): nothing was checked"]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", ())
    ]
    looked_up = [package for package in packages if "vulns" in package]
    known = f"audit: {len(looked_up)} of {len(packages)} packages looked up, {len(lines)} vulnerabilities known"
    if not packages or len(looked_up) < len(packages):
        reasons = [package["skip_reason"] for package in packages if "skip_reason" in package]
        why = f" ({reasons[0][:120]})" if reasons else ""
        return 1 if lines else 2, [*lines, f"{known}: of the others nothing can be said here{why}"]
    return bool(lines), [*lines, known]


if __name__ == "__main__":
    status, told = audit(sys.argv[1])
    print("\n".join(told))
    sys.exit(status)
