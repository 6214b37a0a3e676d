"""examples/deployment/README.md, run as written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from .deployment import EXAMPLE, Deployment, Process

_BLOCKS = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_page_leads_from_nothing_to_an_adapter(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path, dirs_exist_ok=True)
    # what comes after needs machines that are not here
    page, several, _ = (EXAMPLE / "README.md").read_text().partition("## On several machines\n")
    commands = "\n".join(_BLOCKS.findall(page))
    assert several
    assert "kill $(jobs -p)" in commands  # up to the end
    (tmp_path / "page.sh").write_text(f"set -e\n{commands}\necho as written\n")
    environment = Deployment(tmp_path, ()).environment
    environment.pop("FLWR_HOME")  # the page says where
    with Process("bash", "page.sh", folder=tmp_path, log="page.log", environment=environment) as it:
        assert it.wait(2300) == 0, it.log
        assert it.log.endswith("as written\n")
    assert (tmp_path / "runs/clinics/adapter/adapter_model.safetensors").is_file()
    for clinic in ("clinic-a", "clinic-b", "clinic-c"):
        assert list((tmp_path / "state").glob(f"*/{clinic}/reference-*"))
