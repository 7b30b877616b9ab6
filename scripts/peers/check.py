#!/usr/bin/env python3
"""The peer scripts without a GPU: shapes, turns, the table, layouts, and what is said of absent peers.

Part of `cargo xtask check`; by hand: python3 scripts/peers/check.py --fathom PATH. Where Python has
PyTorch, what peers compute is checked too (`check_torch.py`). Ends with `N passed, M failed`.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import layer
import prepare
import run
from layouts import FLASHMLA_PAGE, expert_blocks, expert_of, marlin_place, marlin_scale_place
from peers import OPERATORS, PEERS
from work import Absent, copies, rotating


def shapes_are_read_and_grouped(fathom: str) -> None:
    shapes = run.read_shapes(fathom)
    groups = run.operators(shapes)
    assert len(shapes) == len({shape["name"] for shape in shapes}) > 20, shapes
    rows = [shape["rows"] for shape in groups["FP8 wq_b [32768, 1024]"]]
    assert rows == [1, 8, 64, 1024, 2048, 4096, 8192], groups
    assert {shape["operator"] for shape in shapes} > OPERATORS | {"boundary", "router", "queries"}


def a_dry_run_names_operators_and_peers(fathom: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run.main(["--fathom", fathom, "--dry-run", "--only", "wo_b"]) == 0
    text = out.getvalue()
    assert "FP8 wo_b [4096, 8192]: rows 1, 8, 64, 1024, 4096\n" in text and "deepgemm" in text, text


def only_operators_that_a_peer_has_are_compared(fathom: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run.main(["--fathom", fathom, "--dry-run", "--rows", "2,128"]) == 0
    text = out.getvalue()
    assert "experts, 256 of width 4096,: rows 2, 128\n" in text, text
    assert "boundary" not in text and "router" not in text, text


def turns_alternate_and_ratios_are_those_of_medians(_fathom: str) -> None:
    turns: list[str] = []
    own = iter([{"A x 1": 2.0}, {"A x 1": 4.0}, {"A x 1": 2.0}])

    def time_ours(operator: str) -> dict[str, float]:
        turns.append(operator)
        return next(own)

    def time_peer(peer: str, _shape: dict) -> run.Sample | None:
        turns.append(peer)
        if peer == "deepgemm":
            raise Absent("not here")
        if peer == "marlin":
            raise RuntimeError("wrong\nargument")
        return run.Sample(3.0, 1e-3, 1e-2, "", "one scale") if peer == "torch" else None

    groups = {"A": [{"name": "A x 1"}]}
    rows, absent = run.compare(groups, 3, time_ours, time_peer, lambda: 1.0)
    assert turns[: 1 + len(PEERS)] == ["A", *PEERS] and turns.count("torch") == 3, turns
    assert turns.count("deepgemm") == turns.count("marlin") == 1, turns
    assert absent == {"deepgemm": "not here", "marlin": "failed: RuntimeError: wrong"}, absent
    one = {"seconds": 3.0, "spread": 0.0, "note": "one scale", "error": 1e-3, "tolerance": 1e-2}
    one["times_ours"] = 1.5
    assert rows[0]["peers"] == {"torch": one}, rows
    assert rows[0]["spread"] == 1.0, rows
    text = run.table(rows, absent)
    assert "torch: 3000000.0 +-0.0%, 1.50, 1.0e-03" in text and "absent: deepgemm: not here" in text, text
    assert "\ntorch: one scale\n" in text, text
    assert run.compare(groups, 3, time_ours, time_peer, lambda: 0.0) == ([], {})


def another_result_gets_no_ratio_and_one_that_is_not_compared_says_so(_fathom: str) -> None:
    turns = [run.Sample(1.0, error, 1e-2, "", "") for error in (1e-3, 0.7, 1e-3)]
    one = run.beside(turns, 2.0)
    assert one["result_differs"] and one["error"] == 0.7 and "times_ours" not in one, one
    text = run.told("x", one)
    assert text == "x: 1000000.0 +-0.0%, result differs (error 7.0e-01, allowed 1e-02)", text
    no_number = run.beside([run.Sample(1.0, math.inf, 1e-2, "", "")], 2.0)
    assert "no number" in run.told("x", no_number) and json.loads(json.dumps(no_number)) == no_number
    unknown = run.beside([run.Sample(1.0, None, 1e-2, "its layout is not known", "")], 2.0)
    assert run.told("x", unknown) == "x: 1000000.0 +-0.0%, 0.50, not compared: its layout is not known"


def layouts_put_every_value_somewhere_and_no_two_in_one_place(_fathom: str) -> None:
    places = {marlin_place(at) for at in range(1024)}
    assert places == {(k, n) for k in range(16) for n in range(64)}
    # The first word: the first lane's inputs 0, 1, 8, 9 of outputs 0 and 8.
    first = [(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)]
    assert [marlin_place(at) for at in range(8)] == first
    assert sorted(map(marlin_scale_place, range(64))) == list(range(64))
    assert [marlin_scale_place(at) for at in range(5)] == [0, 16, 8, 24, 32]
    assert FLASHMLA_PAGE == 65 * 576 >= 64 * 584


def peers_without_their_library_are_absent_with_the_reason(_fathom: str) -> None:
    shape = {"operator": "fp8_linear", "rows": 1, "n": 128, "k": 128}
    try:
        PEERS["deepgemm"](shape, Path("/nowhere"))
    except Absent as error:
        assert str(error), error
    else:
        raise AssertionError("it is there")
    for peer in ("torch experts", "marlin", "humming", "flashmla", "deepgemm and topk"):
        assert PEERS[peer](shape, Path("/nowhere")) is None, peer
    assert copies(1 << 20) == 240 and copies(1 << 40) == 2
    call = rotating([lambda: 0, lambda: 1])
    assert [call() for _ in range(3)] == [1, 0, 1]


def experts_get_their_pairs_in_whole_blocks(_fathom: str) -> None:
    n_pairs, n_experts, block = 18, 5, 4
    counts = [sum(expert_of(pair, n_experts) == e for pair in range(n_pairs)) for e in range(n_experts)]
    assert sum(counts) == n_pairs and max(counts) - min(counts) <= 1, counts
    pairs, experts = expert_blocks(n_pairs, n_experts, block)
    assert len(pairs) == block * len(experts), (pairs, experts)
    assert sorted(pair for pair in pairs if pair < n_pairs) == list(range(n_pairs)), pairs
    for at, pair in enumerate(pairs):
        assert pair == n_pairs or expert_of(pair, n_experts) == experts[at // block], (pairs, experts)


def only_what_is_needed_is_taken_out_of_a_wheel(_fathom: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in ["vllm/_moe_C.abi3.so", "vllm/_C.abi3.so", "vllm/model.py"]:
                archive.writestr(name, "content")
        taken = prepare.unpack(wheel, prepare.PEERS["marlin"][1], Path(folder) / "marlin")
        assert taken == 1 and (Path(folder) / "marlin/vllm/_moe_C.abi3.so").exists()
        assert prepare.folder_bytes(Path(folder) / "marlin") == 7
        packed = prepare.archive(Path(folder) / "marlin")
        assert packed == Path(folder) / "marlin.tar.xz", packed
        with tarfile.open(packed) as archive:
            assert "marlin/vllm/_moe_C.abi3.so" in archive.getnames(), archive.getnames()
    assert prepare.wanted("anything", [])


def one_layer_has_the_sizes_of_flash_and_rows_of_both_sides(_fathom: str) -> None:
    root = Path(__file__).resolve().parents[2]
    config = json.loads((root / "models/flash/config.json").read_text())
    assert {name: config[name] for name in layer.FLASH} == layer.FLASH
    requirements = (root / "scripts/bench/requirements.txt").read_text().split()
    assert prepare.TRANSFORMERS in requirements, requirements
    kinds = {"window": {"seconds": 2.0}, "ratio-4": {"seconds": 1.0}}
    own = layer.of_cases({"cases": [{"batch": 8, "kinds": kinds}]})
    assert own == {("window", 8): 2.0, ("ratio-4", 8): 1.0}
    theirs = [{("window", 8): seconds, ("ratio-128", 8): 9.0} for seconds in (4.0, 6.0, 8.0)]
    window, other = layer.rows([own, own | {("window", 8): 3.0}], theirs)
    assert (window["peer_s"], window["seconds"], window["times_ours"]) == (6.0, 2.5, 2.4), window
    assert "times_ours" not in other and other["peer_s"] == 9.0, other
    text = layer.table([window, other])
    assert "2500000.0   40.0%        6000000.0        2.40" in text, text


CHECKS = [
    shapes_are_read_and_grouped,
    a_dry_run_names_operators_and_peers,
    only_operators_that_a_peer_has_are_compared,
    turns_alternate_and_ratios_are_those_of_medians,
    another_result_gets_no_ratio_and_one_that_is_not_compared_says_so,
    layouts_put_every_value_somewhere_and_no_two_in_one_place,
    peers_without_their_library_are_absent_with_the_reason,
    experts_get_their_pairs_in_whole_blocks,
    only_what_is_needed_is_taken_out_of_a_wheel,
    one_layer_has_the_sizes_of_flash_and_rows_of_both_sides,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fathom", required=True, help="the fathom binary")
    args = parser.parse_args()
    checks = list(CHECKS)
    if importlib.util.find_spec("torch"):
        import check_torch

        check_torch.setup()
        checks += check_torch.CHECKS
    else:
        print("no PyTorch: what peers compute is not checked")
    failed = 0
    for check in checks:
        try:
            check(args.fathom)
        except Exception as error:
            failed += 1
            print(f"FAILED {check.__name__}: {error!r}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
