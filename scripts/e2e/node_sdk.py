"""The real Node openai SDK: runs `openai_sdk.mjs` and every JavaScript snippet through node.

Skipped if there is no node, or no folder with the SDK (`cargo xtask e2e` makes one if there is npm).
"""

import os
import subprocess
from pathlib import Path

from suite import Skipped

SCRIPT = Path(__file__).with_suffix("").with_name("openai_sdk.mjs")


def client(server):
    """Nothing: every check starts its own process."""
    return None


def run(server, source):
    """Runs an ES module that may import the SDK; returns what it printed."""
    if server.node_folder is None:
        raise Skipped("no node, or no npm to install the SDK with")
    constrained = "0" if server.forced_call_status == 422 else "1"
    environment = {**os.environ, "FATHOM_URL": server.url, "FATHOM_CONSTRAINED": constrained}
    # Imports of a module on standard input are looked up from the working directory.
    done = subprocess.run(
        ["node", "--input-type=module", "-"],
        input=source,
        cwd=server.node_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_the_node_sdk(_, server):
    for line in run(server, SCRIPT.read_text()).splitlines():
        print("   ", line)
