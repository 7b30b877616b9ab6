#!/usr/bin/env python3
"""Everything that clients do, against one freshly started server with its embedded model.

Starts `fathom serve` on a free port, runs the suites below one after another, stops the server and
ends with `N passed, M failed`. Run by `cargo xtask e2e`, which builds the server, the Python
environment and the folder with Node's packages.
"""

import argparse
import importlib
import sys

from server_process import ServerProcess
from suite import Tally, checks_of

LOG_LINES = 40
SUITES = [
    "openai_sdk",
    "openai_structured",
    "anthropic_sdk",
    "node_sdk",
    "langchain_sdk",
    "agents",
    "documents",
    "retries",
    "image",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", required=True, help="the built `fathom` binary")
    parser.add_argument("--node-folder", help="folder whose node_modules holds the openai package")
    parser.add_argument("--only", default="", help="run the checks whose SUITE.NAME contains this")
    args = parser.parse_args()

    tally = Tally(args.only)
    with ServerProcess(args.fathom, []) as server:
        server.node_folder = args.node_folder
        for name in SUITES:
            if not tally.wants(name):
                continue
            module = importlib.import_module(name)
            checks = module.snippets() if name == "documents" else checks_of(module)
            tally.run(name, checks, module.client(server), server)
        if tally.failed:
            print("end of the server's log:", *server.log().splitlines()[-LOG_LINES:], sep="\n")
    print(f"{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
