"""Files of circuits: as EAP-IG and MIB write them, and as we do."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpatch_core.circuits import Circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError
from tests.helpers.circuits import made_circuit, nodes_of, some_circuits

NODES = nodes_of(2, 2)
GROUPED = nodes_of(2, 4, group=2)
CONFIG = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 16}


def same(one: Circuit, other: Circuit) -> bool:
    """Whether two circuits are the same in all that they hold."""

    def equal(first: Any, second: Any) -> bool:
        if first is None or second is None:
            return first is second
        return bool(((first == second) | ((first != first) & (second != second))).all())

    return (
        one == other
        and equal(one.scores, other.scores)
        and equal(one.exact, other.exact)
        and dict(one.info) == dict(other.info)
    )


def written(nodes: Nodes = NODES, seed: int = 0) -> dict[str, Any]:
    """A file of EAP-IG: each edge has a score, and some are in the circuit."""
    draw = random.Random(seed)
    edges = {name: {"score": draw.gauss(0, 1), "in_graph": draw.random() < 0.3} for name in nodes}
    return {
        "cfg": {**CONFIG, "n_heads": nodes.query[0]},
        "nodes": {name: {"in_graph": True} for name in (*nodes.sender_names, "logits")},
        "edges": edges,
    }


def saved(nodes: Nodes = NODES, seed: int = 0) -> dict[str, Any]:
    """The same circuit as torch saves it; 0 where there is no edge."""
    content = written(nodes, seed)
    scores, marks = torch.zeros(nodes.mask.shape), torch.zeros(nodes.mask.shape).bool()
    for name, entry in content["edges"].items():
        scores[nodes.place(name)] = entry["score"]
        marks[nodes.place(name)] = entry["in_graph"]
    return {
        "cfg": content["cfg"],
        "src_nodes": list(nodes.sender_names),
        "dst_nodes": list(nodes.receiver_names),
        "edges_scores": scores,
        "edges_in_graph": marks,
        "nodes_in_graph": torch.ones(len(nodes.senders)).bool(),
    }


def put(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


# Both ways ----------------------------------------------------------------------------------------


@given(circuit=some_circuits(uniform=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(circuit: Circuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    circuit.to_json(path)
    assert same(Circuit.from_json(path), circuit)
    assert same(Circuit.from_json(path, circuit.nodes), circuit)
    # What others read: a key and a value for each query head.
    nodes = circuit.nodes
    apart = Circuit.from_json(path, Nodes(nodes.query, nodes.query, nodes.parallel))
    assert set(apart) >= {edge for edge in circuit if edge[-2:] not in ("k>", "v>")}
    apart.to_json(path)
    again = Circuit.from_json(path, nodes)
    assert again == circuit


def test_the_file_is_one_of_eap_ig(tmp_path: Path) -> None:
    """Each edge by each query head has a number and a mark; each node is there."""
    circuit = made_circuit(GROUPED, 20)
    path = tmp_path / "circuit.json"
    circuit.to_json(path, width=64)
    found = json.loads(path.read_text("utf-8"))
    assert found["cfg"] == {
        "n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 64
    }  # fmt: skip
    apart = nodes_of(2, 4)
    assert list(found["edges"]) == list(apart)
    assert list(found["nodes"]) == [*apart.sender_names, "logits"]
    for name, entry in found["edges"].items():
        sender, receiver = name.split("->")
        if receiver[-2:] in ("k>", "v>"):
            head = int(receiver.split(".h")[1][:-3]) // 2
            receiver = f"{receiver.split('.h')[0]}.h{head}{receiver[-3:]}"
        ours = f"{sender}->{receiver}"
        assert entry["in_graph"] is (ours in circuit)
        assert entry["score"] == float(circuit.scores[GROUPED.place(ours)])
    inside = {name for name, entry in found["nodes"].items() if entry["in_graph"]}
    assert inside == set(circuit.nodes_in_it)


def test_edges_without_a_score_have_one_that_eap_ig_reads(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    Circuit.of(NODES, ["input->m0"]).to_json(path)
    found = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    assert {entry["score"] for entry in found["edges"].values()} == {0.0}
    assert Circuit.from_json(path).scores is None
    scores = torch.where(torch.from_numpy(NODES.mask), 1.0, math.nan)
    scores[NODES.place("input->m0")] = math.nan
    partly = Circuit(NODES, Circuit.of(NODES, ["input->m0"]).kept, scores)
    partly.to_json(path)
    json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    assert same(Circuit.from_json(path), partly)


def test_the_width_is_kept(tmp_path: Path) -> None:
    path = put(tmp_path / "theirs.json", written())
    circuit = Circuit.from_json(path)
    assert circuit.info == {"width": "16"}
    circuit.to_json(path)
    assert json.loads(path.read_text("utf-8"))["cfg"] == CONFIG
    Circuit.of(NODES, []).to_json(path)
    assert json.loads(path.read_text("utf-8"))["cfg"]["d_model"] == 0


def test_a_file_of_eap_ig_is_read(tmp_path: Path) -> None:
    content = written()
    circuit = Circuit.from_json(put(tmp_path / "theirs.json", content))
    assert circuit.nodes == NODES
    assert set(circuit) == {name for name, entry in content["edges"].items() if entry["in_graph"]}
    assert circuit.exact is None
    for name, entry in content["edges"].items():
        assert float(circuit.scores[NODES.place(name)]) == entry["score"]
    torch.save(saved(), tmp_path / "theirs.pt")
    again = Circuit.from_pt(tmp_path / "theirs.pt")
    assert again == circuit
    known = torch.from_numpy(NODES.mask)
    assert torch.equal(again.scores[known], circuit.scores[known].float().double())
    assert again.scores[~known].isnan().all()


def test_files_of_mib_may_lack_scores_or_edges(tmp_path: Path) -> None:
    content = written()
    content["nodes"] = dict.fromkeys(content["nodes"], True)  # as older files have them
    content["edges"] = {
        name: {"in_graph": entry["in_graph"]}
        for name, entry in content["edges"].items()
        if entry["in_graph"] or name == "input->m1"
    }
    circuit = Circuit.from_json(put(tmp_path / "binary.json", content))
    assert set(circuit) == {name for name, entry in content["edges"].items() if entry["in_graph"]}
    assert circuit.scores is None
    content["edges"]["input->m1"] = {"score": 0.5}
    content["edges"]["m0->m1"] = {"score": None, "in_graph": 1}
    content["edges"]["a0.h0->m1"] = {"score": math.nan, "in_graph": 0.0}
    circuit = Circuit.from_json(put(tmp_path / "mixed.json", content))
    assert "input->m1" not in circuit
    assert "m0->m1" in circuit
    assert int((~circuit.scores.isnan()).sum()) == 1


def test_nodes_of_whole_rows_are_marked_beyond_the_edges(tmp_path: Path) -> None:
    """As EAP-IG does it where it chooses nodes."""
    content = saved()
    content["edges_in_graph"][NODES.sender("m0")] = True
    torch.save(content, tmp_path / "theirs.pt")
    circuit = Circuit.from_pt(tmp_path / "theirs.pt")
    assert {edge for edge in circuit if edge.startswith("m0->")} == {
        edge for edge in NODES if edge.startswith("m0->")
    }


def test_parallel_blocks_are_kept(tmp_path: Path) -> None:
    nodes = nodes_of(2, 2, parallel=True)
    circuit = made_circuit(nodes, 6)
    circuit.to_json(tmp_path / "circuit.json")
    assert Circuit.from_json(tmp_path / "circuit.json") == circuit
    with pytest.raises(EdgeError, match="layers of 2 heads, 2 of them parallel, and nodes= are"):
        Circuit.from_json(tmp_path / "circuit.json", NODES)


# Shared keys and values ---------------------------------------------------------------------------


def test_copies_of_a_key_must_agree(tmp_path: Path) -> None:
    content = written(nodes_of(2, 4))
    for name, entry in content["edges"].items():
        sender, receiver = name.split("->")
        if receiver[-2:] in ("k>", "v>"):
            layer, head = receiver[:-3].split(".h")
            first = f"{sender}->{layer}.h{int(head) // 2 * 2}{receiver[-3:]}"
            entry |= content["edges"][first]
    path = put(tmp_path / "circuit.json", content)
    circuit = Circuit.from_json(path, GROUPED)
    assert circuit.nodes == GROUPED
    assert len(Circuit.from_json(path)) >= len(circuit)
    edge = content["edges"]["m0->a1.h3<v>"]
    for key, other, what in (("in_graph", not edge["in_graph"], "marks"), ("score", 9.0, "scores")):
        changed = copy.deepcopy(content)
        changed["edges"]["m0->a1.h3<v>"][key] = other
        words = f"the {what} of these differ: m0->a1.h2<v> and ->a1.h3<v>; without nodes="
        with pytest.raises(EdgeError, match=words):
            Circuit.from_json(put(path, changed), GROUPED)
        Circuit.from_json(path)
    many = written(nodes_of(2, 4))
    with pytest.raises(
        EdgeError, match=r"->a0.h2<k> and ->a0.h3<k>; .* and \d+ more; without nodes= each head"
    ):
        Circuit.from_json(put(path, many), GROUPED)
    grouped = saved(nodes_of(2, 4))
    grouped["edges_scores"][:] = 1
    grouped["edges_in_graph"][:] = False
    torch.save(grouped, tmp_path / "circuit.pt")
    assert len(Circuit.from_pt(tmp_path / "circuit.pt", GROUPED)) == 0
    grouped["edges_in_graph"][0, 5] = True
    torch.save(grouped, tmp_path / "circuit.pt")
    with pytest.raises(EdgeError, match=r"input->a0.h0<k> and ->a0.h1<k>"):
        Circuit.from_pt(tmp_path / "circuit.pt", GROUPED)


def test_layers_that_differ_cannot_be_written(tmp_path: Path) -> None:
    for nodes in (
        Nodes((2, 4), (2, 2), (False, False)),
        Nodes((2, 2), (2, 2), (False, True)),
    ):
        with pytest.raises(EdgeError, match="the format has one number of heads for all layers"):
            Circuit.of(nodes, []).to_json(tmp_path / "circuit.json")
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - hidden files count


# What is no circuit's file ------------------------------------------------------------------------


def changed(*keys: str, to: Any) -> Callable[[Any], None]:
    """Change an entry within entries; `...` takes it away."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        if to is ...:
            del content[keys[-1]]
        else:
            content[keys[-1]] = to

    return change


OURS = "nnpatch"
EDGE = ("edges", "input->m0")
FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (changed("edges", to=...), "it must have the entries cfg, nodes, edges, got"),
    (changed("cfg", to=3), "cfg must have the sizes of the model, got 3"),
    (changed("cfg", "n_heads", to=...), "cfg lacks n_heads: it has"),
    (changed("cfg", "n_layers", to="2"), "n_layers in cfg must be an integer, got '2'"),
    (changed("cfg", "n_layers", to=True), "n_layers in cfg must be an integer, got True"),
    (changed("cfg", "n_layers", to=0), "n_layers in cfg must be at least 1, got 0"),
    (changed("cfg", "n_layers", to=10**9), "more than a file can be about"),
    (changed("cfg", "n_heads", to=1), "1 query heads cannot share 2 key/value heads"),
    (changed("cfg", "parallel_attn_mlp", to=...), "parallel_attn_mlp in cfg must be true or false"),
    (changed("cfg", "parallel_attn_mlp", to=True), "'a0.h0->m0' is no edge: in layer 0 attention"),
    (changed("nodes", to=[]), r"nodes must be an object, got \[\]"),
    (
        changed("nodes", "m0", to={"neurons": [True, False]}),
        "it is a circuit of neurons: node 'm0'",
    ),
    (changed("edges", to=[]), r"edges must be an object, got \[\]"),
    (changed("edges", "m1->m0", to={"in_graph": True}), "m1 writes after m0 has read the stream"),
    (changed("edges", "a0.h1->q", to={"in_graph": True}), "the model has no receiver 'q'"),
    (changed("edges", "nonsense", to={"in_graph": True}), "an edge is named like"),
    (changed(*EDGE, to={}), r"edge 'input->m0' must have in_graph or score, got \{\}"),
    (changed(*EDGE, to=True), "edge 'input->m0' must have in_graph or score, got True"),
    (changed(*EDGE, "in_graph", to="yes"), "in_graph of edge 'input->m0' must be true or false"),
    (changed(*EDGE, "in_graph", to=[]), "in_graph of edge 'input->m0' must be true or false"),
    (changed(*EDGE, "exact", to=2), "exact of edge 'input->m0' must be true or false, got 2"),
    (changed(*EDGE, "score", to="1"), "the score of edge 'input->m0' must be a number, got '1'"),
    (changed(*EDGE, "score", to=True), "the score of edge 'input->m0' must be a number, got True"),
    (changed(*EDGE, "score", to=10**400), "the score of edge 'input->m0' is too large"),
    (changed(OURS, to={"format": 2}), "its entry 'nnpatch' has the format 2, and this version"),
    (changed(OURS, to=[]), "its entry 'nnpatch' has the format"),
    (changed(OURS, "key_value", to=[1]), r"key_value of 'nnpatch' must have a number a layer"),
    (changed(OURS, "key_value", to=[3, 1]), "2 query heads cannot share 3 key/value heads"),
    (changed(OURS, "key_value", to=["2", 1]), "key_value must be a positive number of heads"),
    (changed(OURS, "scores", to=None), "scores of 'nnpatch' must be true or false, got None"),
    (changed(OURS, "info", to={"a": 1}), "info of 'nnpatch' must be texts by name"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_faults_of_json(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    content = written()
    content[OURS] = {"format": 1, "key_value": [2, 2], "scores": True, "info": {}}
    path = put(tmp_path / "circuit.json", content)
    Circuit.from_json(path)
    change(content)
    with pytest.raises(EdgeError, match=words) as caught:
        Circuit.from_json(put(path, content))
    assert str(caught.value).startswith(f"{path} holds no circuit that can be read: ")
    assert "\n" not in str(caught.value)


def test_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    for text, words in (
        ("", "is not JSON: Expecting value"),
        ('{"cfg": ', "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON"),
        ("3", "it must have the entries cfg, nodes, edges, got 3"),
        ('{"cfg": 1, "cfg": 2}', "it has 'cfg' twice in one object"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(EdgeError, match=words):
            Circuit.from_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(EdgeError, match="is not JSON"):
        Circuit.from_json(path)


PT_FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (changed("dst_nodes", to=...), "it must have the entries cfg, src_nodes, dst_nodes, edges_s"),
    (changed("cfg", "n_layers", to=3), "src_nodes has nothing at place 7, where 'a2.h0' belongs"),
    (changed("cfg", "n_layers", to=1), "src_nodes has 7 names, and the model of cfg has 4"),
    (changed("src_nodes", to="input"), "src_nodes must be names of nodes, got 'input'"),
    (changed("src_nodes", to=["input", "m0"]), "src_nodes has 'm0' at place 1, where 'a0.h0'"),
    (changed("edges_scores", to=[1]), r"edges_scores must be a tensor \[7, 15\]"),
    (changed("edges_scores", to=torch.zeros(2, 2)), r"edges_scores must be a tensor \[7, 15\]"),
    (
        changed("edges_scores", to=torch.zeros(7, 15).to_sparse()),
        r"edges_scores must be a tensor \[7, 15\]",
    ),
    (changed("edges_in_graph", to=torch.full((7, 15), 0.5)), "edges_in_graph must have marks"),
    (changed("neurons_in_graph", to=torch.zeros(7, 16)), "it is a circuit of neurons"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), PT_FAULTS)
def test_faults_of_pt(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    path, content = tmp_path / "circuit.pt", saved()
    content["neurons_in_graph"] = torch.ones(7, 16)
    torch.save(content, path)
    Circuit.from_pt(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(EdgeError, match=words) as caught:
        Circuit.from_pt(path)
    assert str(caught.value).startswith(f"{path} holds no circuit that can be read: ")


class Runs:
    """Something whose reading would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_pt_file_is_run(tmp_path: Path) -> None:
    path, made = tmp_path / "circuit.pt", tmp_path / "made"
    torch.save({**saved(), "cfg": Runs(made)}, path)
    for content in (None, b"", b"nonsense"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(EdgeError, match="is no file of torch that can be read without running"):
            Circuit.from_pt(path)
    assert not made.exists()


@pytest.mark.parametrize("read", [Circuit.from_json, Circuit.from_pt])
def test_files_that_are_not_there(read: Any, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "nothing", "nothing holds no circuit: there is no such file"),
        (tmp_path, "is not a file: it is a folder"),
        (3, "a file is named by a string or a path, got 3"),
        ("", "a file is named by a string or a path, got ''"),
    ):
        with pytest.raises(EdgeError, match=words):
            read(path)


def test_nodes_that_are_none(tmp_path: Path) -> None:
    path = put(tmp_path / "circuit.json", written())
    with pytest.raises(EdgeError, match="nodes must be the Nodes of a model, got 'nodes'"):
        Circuit.from_json(path, "nodes")
    with pytest.raises(EdgeError, match="it is of 2 layers of 2 heads, and nodes= are of 3 layers"):
        Circuit.from_json(path, nodes_of(3, 2))


# Written whole or not at all ----------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "circuit.json"
    Circuit.of(NODES, ["input->m0"]).to_json(path)
    before = path.read_bytes()
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(EdgeError, match=r"circuit.json could not be written: full"):
        made_circuit(NODES, 5).to_json(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["circuit.json"]  # noqa: PTH208 - hidden files count


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    circuit = Circuit.of(NODES, ["input->m0"])
    for path, words in (
        (tmp_path, "is not a file: it is a folder"),
        (tmp_path / "no" / "circuit.json", "there is no folder"),
        (None, "a file is named by a string or a path, got None"),
    ):
        with pytest.raises(EdgeError, match=words):
            circuit.to_json(path)
    for width, words in ((0, "width must be at least 1"), ("8", "width must be an integer")):
        with pytest.raises(EdgeError, match=words):
            circuit.to_json(tmp_path / "circuit.json", width=width)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - hidden files count


# Damage -------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_damaged_file_is_an_error_of_ours_or_read(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    path = tmp_path / "circuit.json"
    made_circuit(GROUPED, 9).to_json(path)
    torch.save(saved(), tmp_path / "circuit.pt")
    for each, read in ((path, Circuit.from_json), (tmp_path / "circuit.pt", Circuit.from_pt)):
        data = bytearray(each.read_bytes())
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            if draw.random() < 0.3:
                del data[place : place + draw.randint(1, 40)]
            else:
                data[place] ^= 1 << draw.randrange(8)
        each.write_bytes(bytes(data))
        with contextlib.suppress(EdgeError):
            assert isinstance(read(each), Circuit)
