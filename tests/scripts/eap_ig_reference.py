"""Writes tests/edges/files/eap_ig_*.json: what EAP-IG's and MIB's own code say of tiny models.

    python tests/scripts/eap_ig_reference.py FOLDER

Run it where `eap` (https://github.com/hannamw/EAP-IG) and `MIB_circuit_track`
(https://github.com/hannamw/MIB-circuit-track) can be imported, with transformer-lens 2.15 to 2.18;
nnpatch need not be there. FOLDER gets the models, a tokenizer and a file of numbers for each model.
The models are those of tests/helpers/formula_models.py, loaded with no processing of weights and in
float64, so that a difference between two tools is a difference between their definitions.

docs/edges-and-eap-ig.md says which number is what, and what is compared with what.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from eap.attribute import attribute
from eap.evaluate import evaluate_baseline, evaluate_graph
from eap.graph import Graph
from eap.utils import compute_mean_activations
from MIB_circuit_track import evaluation
from MIB_circuit_track.metrics import logit_diff
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from eap_ig import edge_names, groups, packed  # noqa: E402 - by the line above
from formula_models import MODELS, VOCAB, checksum, formula_model  # noqa: E402 - by the line above

#: The tokenizer's: EAP-IG takes texts and puts a first token before each.
FIRST, PAD, UNKNOWN = 0, 1, 2
#: Clean and corrupted, without the first token.
EQUAL = [
    ([5, 9, 33, 12, 7, 20], [5, 9, 31, 12, 7, 20]),
    ([14, 40, 8, 22, 35, 11], [14, 26, 8, 29, 35, 11]),
    ([45, 3, 18, 27, 6, 38], [10, 3, 18, 27, 41, 38]),
]
RAGGED = [
    ([5, 9, 33, 12, 7, 20], [5, 9, 31, 12, 7, 20]),
    ([14, 40, 8, 11], [14, 26, 8, 11]),
    ([45, 3, 18, 6, 38], [10, 3, 18, 41, 38]),
]
STEPS = 5
METHODS = {
    "eap": "EAP",
    "eap-ig-inputs": "EAP-IG-inputs",
    "eap-ig-activations": "EAP-IG-activations",
    "clean-corrupted": "clean-corrupted",
}
Batches = list[tuple[list[str], list[str], list[list[int]]]]


class OnCpu(TorchFunctionMode):
    """EAP-IG asks for some tensors on "cuda" by that name; here they are where the model is."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def tokenizer(folder: Path) -> Any:
    """A word for each token: "t5" is 5."""
    words = {"<first>": FIRST, "<pad>": PAD, "<unknown>": UNKNOWN}
    words |= {f"t{token}": token for token in range(UNKNOWN + 1, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<first>", "eos_token": "<first>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unknown>", **names
    )
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def lens_config(name: str, config: Any) -> tuple[HookedTransformerConfig, Callable[..., Any]]:
    """What TransformerLens calls what a model's config says, and what translates its weights."""
    shared = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_heads": config.num_attention_heads,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "dtype": torch.float64,
        "device": "cpu",
    }
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": shared["d_head"]}
    gated = {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True}
    if name == "gpt2":
        own = {
            "d_mlp": 4 * config.hidden_size,
            "act_fn": "gelu_new",
            "eps": config.layer_norm_epsilon,
            "normalization_type": "LN",
        }
        return HookedTransformerConfig(**shared, **own), convert_gpt2_weights
    shared["d_mlp"] = config.intermediate_size
    if name == "neox":
        own = {
            "act_fn": config.hidden_act,
            "eps": config.layer_norm_eps,
            "normalization_type": "LN",
            "parallel_attn_mlp": True,
            "positional_embedding_type": "rotary",
            "rotary_dim": round(config.rotary_pct * shared["d_head"]),
        }
        return HookedTransformerConfig(**shared, **own), convert_neox_weights
    grouped = {"n_key_value_heads": config.num_key_value_heads, "eps": config.rms_norm_eps}
    if name == "llama":
        own = {"act_fn": config.hidden_act}
        made = HookedTransformerConfig(**shared, **rotary, **gated, **grouped, **own)
        return made, convert_llama_weights
    own = {
        "act_fn": "gelu_pytorch_tanh",
        "attn_scores_soft_cap": config.attn_logit_softcapping,
        "output_logits_soft_cap": config.final_logit_softcapping,
        "use_normalization_before_and_after": True,
    }
    made = HookedTransformerConfig(**shared, **rotary, **gated, **grouped, **own)
    return made, convert_gemma_weights


def lens_model(name: str, folder: Path) -> tuple[Any, str, float]:
    """A model in TransformerLens, its checksum, and how far its logits are from transformers'."""
    formula_model(name).save_pretrained(folder / name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, attn_implementation="eager", dtype=torch.float64
    ).eval()
    config, convert = lens_config(name, plain.config)
    model = HookedTransformer(config, tokenizer=tokenizer(folder / "tokenizer"))
    model.load_and_process_state_dict(
        convert(plain, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    model.cfg.use_attn_result = True
    model.cfg.use_split_qkv_input = True
    model.cfg.use_hook_mlp_in = True
    if config.n_key_value_heads is not None:
        model.cfg.ungroup_grouped_query_attention = True
    tokens = torch.tensor([[FIRST, *clean] for clean, _ in EQUAL])
    with torch.no_grad():
        gap = (model(tokens) - plain(tokens).logits).abs().max().item()
    if gap > 1e-4:
        raise ValueError(f"TransformerLens computes other logits for {name}: {gap}")
    return model, checksum(plain.float()), gap


def answers(model: Any, pairs: Sequence[Any]) -> list[list[int]]:
    """Good and bad token of each pair: those that tell its two prompts apart best."""
    found = []
    for clean, corrupted in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([[FIRST, *clean], [FIRST, *corrupted]]))[:, -1]
        change = logits[0] - logits[1]
        found.append([change.argmax().item(), change.argmin().item()])
    return found


def batches(pairs: Sequence[Any], labels: Sequence[list[int]], sizes: Sequence[int]) -> Batches:
    """Pairs as EAP-IG's loaders give them."""

    def text(prompt: Sequence[int]) -> str:
        return " ".join(f"t{token}" for token in prompt)

    found, start = [], 0
    for size in sizes:
        part, told = pairs[start : start + size], list(labels[start : start + size])
        found.append(([text(a) for a, _ in part], [text(b) for _, b in part], told))
        start += size
    return found


def listed(values: Iterable[float], digits: int = 6) -> list[float]:
    """Numbers as the file has them."""
    return [float(f"{float(value):.{digits}g}") for value in values]


def scores(model: Any, data: Batches, method: str, **kwargs: Any) -> list[float]:
    """EAP-IG's score of each edge, in the order of its graph's edges."""
    graph = Graph.from_model(model)
    metric = partial(logit_diff, mean=True, loss=False)
    attribute(model, graph, data, metric, method, ig_steps=STEPS, quiet=True, **kwargs)
    return listed(edge.score for edge in graph.edges.values())


class Subject:
    """One model and its pairs, as EAP-IG sees them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.model, self.checksum, self.gap = lens_model(name, folder)
        self.answers = answers(self.model, EQUAL)
        self.ragged_answers = answers(self.model, RAGGED)
        self.single = batches(EQUAL, self.answers, [1] * len(EQUAL))
        self.graph = Graph.from_model(self.model)
        self.edges = list(self.graph.edges)
        cfg = self.model.cfg
        self.shared = cfg.n_heads // (cfg.n_key_value_heads or cfg.n_heads)
        if self.edges != edge_names(cfg.n_layers, cfg.n_heads, cfg.parallel_attn_mlp):
            raise ValueError("EAP-IG's edges are not those that tests/helpers/eap_ig.py names")

    def circuit(self, edges: Iterable[str]) -> Any:
        """A graph that has these edges, unpruned."""
        graph = Graph.from_model(self.model)
        for edge in edges:
            graph.edges[edge].in_graph = True
        graph.nodes_in_graph[:] = True
        return graph

    def values(self, graph: Any, data: Batches | None = None, **kwargs: Any) -> list[float]:
        """The metric of each pair in a circuit's run; the graph is then as pruning left it."""
        metric = partial(logit_diff, mean=False, loss=False)
        data = data or self.single
        with torch.no_grad():
            found = evaluate_graph(self.model, graph, data, metric, quiet=True, **kwargs)
        return found.tolist()

    def left(self, graph: Any) -> list[str]:
        """The edges that are in a graph."""
        return [edge.name for edge in graph.edges.values() if edge.in_graph]

    def baseline(self, corrupted: bool, data: Batches | None = None) -> list[float]:
        """The metric of each pair in a plain run."""
        metric = partial(logit_diff, mean=False, loss=False)
        data = data or self.single
        return evaluate_baseline(
            self.model, data, metric, run_corrupted=corrupted, quiet=True
        ).tolist()

    def exact_edges(self, edges: Iterable[Sequence[str]]) -> list[float]:
        """For each set of edges: what the metric loses if a fresh whole graph lacks it."""
        clean = sum(self.baseline(corrupted=False)) / len(EQUAL)
        found = []
        for without in edges:
            left = [edge for edge in self.edges if edge not in without]
            patched = self.values(self.circuit(left))
            found.append(sum(patched) / len(EQUAL) - clean)
        return listed(found)


def circuits(subject: Subject, ranked: Sequence[float]) -> list[dict[str, Any]]:
    """Given circuits, drawn and strongest, alike for all query heads of a key/value head."""
    members = groups(subject.edges, subject.shared)
    score = dict(zip(subject.edges, ranked, strict=True))
    strength = {name: abs(sum(score[edge] for edge in own)) for name, own in members.items()}
    order = sorted(members, key=lambda name: strength[name], reverse=True)
    draw = random.Random(16)
    chosen = {"none": [], "all": list(members)}
    for share in (0.05, 0.2, 0.5):
        chosen[f"strongest {share}"] = order[: int(share * len(order))]
    for share in (0.7, 0.9):
        chosen[f"drawn {share}"] = [name for name in members if draw.random() < share]
    clean, corrupted = (sum(subject.baseline(corrupted=way)) for way in (False, True))
    found = []
    for title, names in chosen.items():
        edges = [edge for name in names for edge in members[name]]
        graph = subject.circuit(edges)
        values = subject.values(graph)
        found.append(
            {
                "title": title,
                "edges": packed(edges, subject.edges),
                "left_by_pruning": packed(subject.left(graph), subject.edges),
                "faithfulness": listed([(sum(values) - corrupted) / (clean - corrupted)])[0],
                "values": listed(values),
                # The means are those of the clean prompts.
                **{
                    way: listed(
                        subject.values(
                            subject.circuit(edges),
                            intervention=way,
                            intervention_dataloader=subject.single,
                        )
                    )
                    for way in ("zero", "mean-positional")
                },
            }
        )
    return found


def curve(subject: Subject, absolute: bool, grouped: bool) -> dict[str, Any]:
    """MIB's curve: scores as it makes them (of a loss), its fractions, its areas.

    With `grouped` the edges that are ranked and counted are the key/value heads' own, which its
    code is told by a graph whose edges and whose choice of the first n are such.
    """
    graph = Graph.from_model(subject.model)
    loss = partial(logit_diff, mean=True, loss=True)
    attribute(
        subject.model, graph, subject.single, loss, "EAP-IG-inputs", ig_steps=STEPS, quiet=True
    )
    if grouped:
        own = dict(graph.edges)
        members = groups(own, subject.shared)
        strength = {
            name: sum(own[edge].score.item() for edge in edges) for name, edges in members.items()
        }

        def first(
            self: Any, n: int, absolute: bool = True, level: str = "edge", prune: bool = True
        ) -> None:
            order = sorted(
                members, key=lambda x: abs(strength[x]) if absolute else strength[x], reverse=True
            )
            self.reset()
            for name in order[:n]:
                for edge in members[name]:
                    own[edge].in_graph = True
            if prune:
                self.prune()

        graph.edges = members
        graph.apply_topn = types.MethodType(first, graph)
    found = evaluation.evaluate_area_under_curve(
        subject.model,
        graph,
        subject.single,
        partial(logit_diff, mean=False, loss=False),
        quiet=True,
        absolute=absolute,
    )
    counts, under, from_one, _, faithfulness = found
    return {
        "absolute": absolute,
        "grouped": grouped,
        "left_by_pruning": counts,
        "cpr": listed([under])[0],
        "cmd": listed([from_one])[0],
        "faithfulness": listed(faithfulness),
    }


def ragged(subject: Subject) -> dict[str, Any]:
    """Pairs of several lengths, which EAP-IG pads on the right."""
    data = batches(RAGGED, subject.ragged_answers, [len(RAGGED)])
    part = subject.circuit(subject.edges[::3])
    return {
        "answers": subject.ragged_answers,
        "clean": listed(subject.baseline(corrupted=False, data=data)),
        "corrupted": listed(subject.baseline(corrupted=True, data=data)),
        # In one batch: three times smaller than the mean over pairs. Of every third edge.
        "eap, one batch": scores(subject.model, data, "EAP")[::3],
        "circuit of every third edge": listed(subject.values(part, data)),
    }


def means(subject: Subject) -> dict[str, Any]:
    """What its means are: the largest difference of each from what the name says."""
    data = [(clean, corrupted, label) for clean, corrupted, label in subject.single]
    own = compute_mean_activations(subject.model, subject.graph, data)
    positional = compute_mean_activations(subject.model, subject.graph, data, per_position=True)
    seen: list[Any] = []
    hooks = {
        node.out_hook: subject.graph.forward_index(node)
        for node in subject.graph.nodes.values()
        if node.name != "logits"
    }

    def record(where: Any, activations: Any, hook: Any) -> None:
        seen[-1][:, where] = activations[0].detach()

    for clean, _, _ in data:
        width = subject.model.cfg.d_model
        seen.append(torch.zeros(len(EQUAL[0][0]) + 1, subject.graph.n_forward, width).double())
        forward = [(name, partial(record, where)) for name, where in hooks.items()]
        with torch.no_grad(), subject.model.hooks(fwd_hooks=forward):
            subject.model(subject.model.to_tokens(clean))
    every = torch.stack(seen)  # [pair, position, sender, width]
    last = every[:, -1].mean((0, 1)) / every.shape[1]
    nothing = subject.circuit([])
    apart = {
        "from the mean over pairs and positions, of each sender": own - every.mean((0, 1)),
        "from the last position's, over all senders, divided by the length": own - last,
        "per position, from the mean over pairs": positional - every.mean(0),
        "largest of the true means": every.mean((0, 1)),
    }
    return {
        "metric with every edge at its mean": listed(
            subject.values(nothing, intervention="mean", intervention_dataloader=data)
        ),
        "its mean has shape": list(own.shape),
        **{name: listed([gap.abs().max()], digits=3)[0] for name, gap in apart.items()},
    }


def ablated(subject: Subject) -> dict[str, Any]:
    """Zero ablation in a circuit whose m0 reads nothing: pruning takes it out."""
    only = [edge for edge in subject.edges if not edge.endswith("->m0")]
    found: dict[str, Any] = {"edges": len(only)}
    for way in ("zero", "patching"):
        pruned, whole = subject.circuit(only), subject.circuit(only)
        whole.prune = lambda: None
        found[f"{way}, pruned"] = listed(subject.values(pruned, intervention=way))
        found[f"{way}, unpruned"] = listed(subject.values(whole, intervention=way))
        found["left_by_pruning"] = len(subject.left(pruned))
    return found


def measured(name: str, folder: Path) -> dict[str, Any]:
    """All numbers of one model."""
    subject = Subject(name, folder)
    model = subject.model
    found: dict[str, Any] = {
        "layers": model.cfg.n_layers,
        "heads": model.cfg.n_heads,
        "parallel": model.cfg.parallel_attn_mlp,
        "shared": subject.shared,
        "checksum": subject.checksum,
        "logits_from_transformers": listed([subject.gap], digits=2)[0],
        "answers": subject.answers,
        "clean": listed(subject.baseline(corrupted=False)),
        "corrupted": listed(subject.baseline(corrupted=True)),
        "scores": {ours: scores(model, subject.single, theirs) for ours, theirs in METHODS.items()},
    }
    one = [[edge] for edge in subject.edges]
    found["scores"]["exact"] = subject.exact_edges(one)
    exact = scores(model, subject.single, "exact")
    apart = [abs(a - b) for a, b in zip(exact, found["scores"]["exact"], strict=True)]
    found["its_exact_from_a_fresh_graph"] = {
        "largest": listed([max(apart)])[0],
        "first": next((e for e, d in zip(subject.edges, apart, strict=True) if d > 1e-5), None),
        "edges": sum(d > 1e-5 for d in apart),
    }
    if subject.shared > 1:
        members = groups(subject.edges, subject.shared)
        several = {name: edges for name, edges in members.items() if len(edges) > 1}
        found["exact_of_groups"] = {
            "edges": list(several),
            "scores": subject.exact_edges(several.values()),
        }
    found["circuits"] = circuits(subject, found["scores"]["eap-ig-inputs"])
    ways = [(True, False), (False, False)]
    ways += [(True, True), (False, True)] if subject.shared > 1 else []
    found["curves"] = [curve(subject, absolute, grouped) for absolute, grouped in ways]
    found["ragged"] = ragged(subject)
    found["means"] = means(subject)
    found["ablated"] = ablated(subject)
    found["batches"] = {
        # The first edge's score, of batches of these sizes.
        str(sizes): scores(model, batches(EQUAL, subject.answers, sizes), "EAP")[0]
        for sizes in ([1, 1, 1], [2, 1], [3])
    }
    return found


def main() -> None:
    """All models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if "optimal_ablation_path" not in inspect.signature(evaluate_graph).parameters:
        # MIB hands over an argument that only its own branch of EAP-IG has; it stays None.
        evaluation.evaluate_graph = lambda *a, optimal_ablation_path=None, **k: evaluate_graph(
            *a, **k
        )
    setting = {"steps": STEPS, "first_token": FIRST, "pairs": EQUAL, "ragged_pairs": RAGGED}
    for name in options.models:
        with OnCpu():
            found = {"class": MODELS[name][0], **setting, **measured(name, folder)}
        text = json.dumps(found, separators=(",", ":"))
        # A line for each entry, so that a change of one shows as one.
        text = text.replace(',"', ',\n"')
        (folder / f"eap_ig_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
