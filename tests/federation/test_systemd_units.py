"""examples/deployment/systemd: units that systemd reads without a complaint."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .deployment import EXAMPLE

UNITS = sorted((EXAMPLE / "systemd").glob("*.service"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    # the program has to be there; here it lies in the repository
    text = unit.read_text().replace("ExecStart=/srv/cgfedllm/", f"ExecStart={EXAMPLE}/")
    assert str(EXAMPLE) in text
    (tmp_path / unit.name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stderr) == (0, "")
