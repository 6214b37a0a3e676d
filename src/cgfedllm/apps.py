"""The ServerApp and the ClientApp as Flower's engines load them (``[tool.flwr.app.components]``).

``flwr run`` starts them behind a SuperLink: its simulation engine, or SuperNodes somewhere else.
`cgfedllm run --superlink` fills in the run configuration.
"""

from __future__ import annotations

import sys
import warnings

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cgfedllm.config import config_from_toml
from cgfedllm.federation.client_app import make_client_app

if not sys.warnoptions:  # as for the command line: nothing a user can act on
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)

server = ServerApp()
client = make_client_app()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment, or go on with it where an earlier start was stopped."""
    from cgfedllm import api
    from cgfedllm.report.console import watch_run

    settings = context.run_config
    config = config_from_toml(str(settings["config"]))
    overwrite = bool(settings.get("overwrite", False))
    watch_run(lambda: api.serve(config, grid, overwrite=overwrite), config, "plain")
